"""How verbs are declared: errors of one line, a recipe's fields as options. Imports nothing heavy."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from llava_genhancer.errors import InputError, print_error
from llava_genhancer.fields import field_help, field_types, suggest, suggest_field, to_dict
from llava_genhancer.files import expand


def prepare_streams() -> None:
    """Make the standard streams safe to use: closed ones lead to nowhere, what cannot be encoded is written escaped.

    Where file names are not UTF-8 (``LC_ALL=C``), start this command again in Python's UTF-8 mode.
    """
    asked = sys.argv[1:]
    own_process = sys.orig_argv[len(sys.orig_argv) - len(asked) :] == asked  # not a call from somebody's Python
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1" and own_process:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    names = ("stdin", "stdout", "stderr")
    closed = [number for number, name in enumerate(names) if getattr(sys, name) is None]
    for number in closed:
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would get this number, and prints with it
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
    for number in closed:
        setattr(sys, names[number], open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """Errors as one line; long options must be written out, since any recipe field may follow."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's own, once every ``--name`` is an option of this verb: else its nearest is named first."""
        words = list(sys.argv[1:] if args is None else args)
        words = words[: words.index("--")] if "--" in words else words
        for word in words if self._subparsers is None else ():
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                fields = self._defaults.get("fields") is not None and field_types(type(self._defaults["any_recipe"]))
                known = [o.removeprefix("--") if o.removeprefix("--") in (fields or ()) else o for o in self._options()]
                near = suggest_field(name if name in known else name.removeprefix("--"), known)
                self.error(f"unknown argument {name}{near}{'' if near else f'; see `{self.prog} --help`'}")
        return super().parse_known_args(args, namespace)

    def _options(self) -> list[str]:
        return [option for option in self._option_string_actions if option.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Print the error once for all ranks, and exit with status 2."""
        print_error(f"error: {message}", self.prog)
        self.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's own check, with the nearest choice."""
        if action.choices is not None and value not in action.choices:
            near = suggest(str(value), map(str, action.choices))
            choices = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{near} (choose from {choices})")


def path(value: str) -> str:
    """The ``type`` of every argument that is a path, or may be one: see :func:`llava_genhancer.files.expand`."""
    try:
        return expand(value)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Verbs:
    """The verbs below a parser; ``dest`` is where the chosen one's name goes."""

    def __init__(self, parser: argparse.ArgumentParser, dest: str):
        self._verbs = parser.add_subparsers(dest=dest, required=True, metavar="VERB", parser_class=Parser)

    def add(self, name: str, run: Callable[[Any], int | None], help: str, **kwargs: Any) -> argparse.ArgumentParser:
        """A verb that calls ``run`` with the parsed arguments; what it returns is the exit status."""
        verb = self.group(name, help, **kwargs)
        verb.add_argument("--verbose", action="store_true", help="say what is being done")
        verb.set_defaults(run=run)
        return verb

    def group(self, name: str, help: str, **kwargs: Any) -> argparse.ArgumentParser:
        """A verb with verbs of its own."""
        return self._verbs.add_parser(name, help=help, description=help, **kwargs)


class _Field(argparse.Action):
    """Collects ``--name value`` in the dict ``fields``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.fields = {**namespace.fields, self.metavar: values}


def add_fields(parser: argparse.ArgumentParser, recipe: Any) -> None:
    """Make every field of ``recipe``'s class an option.

    As unknown arguments, their values would be taken for the RECIPE.
    """
    parser.set_defaults(fields={}, any_recipe=recipe)
    for name in field_types(type(recipe)):
        parser.add_argument(
            f"--{name}", metavar=name, dest="fields", action=_Field, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def print_made(made: object, *words: object) -> None:
    """Print what a verb made and where, and the command that comes next."""
    print(f"done: {made}\nnext: {shlex.join(['llava-genhancer', *map(str, words)])}")


def print_fields(recipe: Any, *, as_json: bool, unread: Collection[str] = ()) -> None:
    """Every field with its value and meaning, as it can be given back; ``unread`` ones in JSON alone."""
    values, helps = to_dict(recipe), field_help(type(recipe))
    if as_json:
        print(json.dumps(values, indent=2))
        return
    for name, value in values.items():
        if name not in unread:
            shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            print(f"--{name} {shown}\n      {helps[name]}")
