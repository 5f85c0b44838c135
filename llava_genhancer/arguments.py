"""How verbs are declared: errors of one line, a recipe's fields as options. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from llava_genhancer.errors import InputError, print_error
from llava_genhancer.fields import field_help, field_types, suggest, to_dict
from llava_genhancer.files import expand


class Parser(argparse.ArgumentParser):
    """Errors as one line; long options must be written out, since any recipe field may follow."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs, allow_abbrev=False)

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
