"""Predict which tower class a fork's builder picks for a path, from the fork's source: nothing of the fork is run.

A fork (a LLaVA fork's checkout) picks its tower class in one function, the builder, mostly by words in the tower's
path. :func:`predict` parses that function and follows it: comparisons of strings, options of the config, branches,
short loops. The fork's code is never compiled, imported or called. Where the function does more, :class:`Unpredictable`
names the line. :func:`find_problem` then reads the picked class.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_genhancer.errors import InputError

BUILDER_FUNCTIONS = ("build_vision_tower_aux_list", "build_vision_tower", "build_image_tower")
FACTORY = "VisionTowerFactory"  # of TinyLLaVA Factory, which reads `name:path`
TAKES_PATH = "model_name_or_path"  # the first parameter of VILA's builder: the path instead of the config
DROPS_A_PATCH = "drops the first patch of SigLIP (SigLIP has no CLS) unless mm_vision_select_feature is cls_patch"
_LOADERS = {
    "clip": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "siglip": ("SiglipVisionModel",),
    "siglip2": ("Siglip2VisionModel",),
}
_OWN_WORDS = {"clip": ("clip", "openai", "laion"), "siglip": ("siglip", "google"), "siglip2": ("siglip2",)}
_STRING_METHODS = (
    "casefold", "endswith", "find", "lower", "lstrip", "removeprefix", "removesuffix", "replace", "rsplit", "rstrip",
    "split", "startswith", "strip", "upper",
)  # fmt: skip
_EXISTS = ("exists", "isdir", "isfile", "is_dir", "is_file", "lexists")
_MOST_STEPS = 5000  # branches and loop rounds; a builder of the known forks needs fewer than 50


class Unpredictable(Exception):
    """The source does not decide which class is picked; the message names the line and the reason."""


@dataclass(frozen=True)
class Rule:
    """Where a fork picks its tower class.

    Args:
        path: the builder's file.
        function: the builder's name.
        source: the file's text.
        registers: whether :func:`llava_genhancer.tower.register` reaches this builder.
    """

    path: Path
    function: str
    source: str
    registers: bool = True

    @property
    def module(self) -> ast.Module:
        """The parsed file.

        Raises:
            Unpredictable: this Python cannot parse the file.
        """
        return _parse(self.source, self.path)

    @property
    def definition(self) -> ast.FunctionDef:
        """The builder's definition.

        Raises:
            Unpredictable: the file has no function of that name at its top level.
        """
        for node in self.module.body:
            if isinstance(node, ast.FunctionDef) and node.name == self.function:
                return node
        raise Unpredictable(f"{self.path} has no function {self.function} at its top level")

    @property
    def takes_path(self) -> bool:
        """Whether the builder's first argument is the path (VILA) and not the config."""
        try:
            arguments = self.definition.args.args
        except Unpredictable:
            return False
        return bool(arguments) and arguments[0].arg == TAKES_PATH


@dataclass(frozen=True)
class Prediction:
    """The class that a builder picks for a path.

    Args:
        chosen: the class's name, or None if the builder refuses the path.
        unset: options without a default in the source, which were taken as not set.
    """

    chosen: str | None
    unset: tuple[str, ...] = ()


def find_rule(fork: Path) -> Rule:
    """Find the builder in a fork's checkout.

    Raises:
        InputError: no folder, no builder, or several of the same depth; the message lists what was looked for.
    """
    if not fork.is_dir():
        raise InputError(f"--fork {fork} is not a folder: give the fork's checkout")
    found = [(path, True) for path in _find(fork, "multimodal_encoder/builder.py")]
    found += [(path, True) for path in _find(fork, "model/vision_tower/__init__.py")]
    rules = _read_rules(found) or _read_rules((path, False) for path in _find(fork, "*.py"))
    if not rules:
        raise InputError(
            f"--fork {fork}: no tower builder found. Looked for */multimodal_encoder/builder.py, then for any file, "
            f"with {', '.join(BUILDER_FUNCTIONS)}, and for */model/vision_tower/__init__.py with {FACTORY}. "
            f"{_describe_loaders(fork)}"
        )
    depth = min(len(rule.path.parts) for rule in rules)
    first = [rule for rule in rules if len(rule.path.parts) == depth]
    if len(first) > 1:
        folders = ", ".join(str(rule.path) for rule in first)
        raise InputError(f"--fork {fork} holds {len(first)} tower builders ({folders}): give the folder of one fork")
    return first[0]


def _read_rules(files: Any) -> list[Rule]:
    """One rule per file that defines a builder. Cambrian defines build_vision_tower too, which its training never
    calls, so the order of BUILDER_FUNCTIONS decides."""
    rules = []
    for path, registers in files:
        source = _read(path)
        names = set(re.findall(r"^def (\w+)\(", source, re.MULTILINE))
        function = next((name for name in (*BUILDER_FUNCTIONS, FACTORY) if name in names), None)
        if function is not None:
            rules.append(Rule(path, function, source, registers))
    return rules


def _find(fork: Path, tail: str) -> list[Path]:
    found = [p for p in fork.rglob(tail) if not any(part.startswith(".") for part in p.relative_to(fork).parts)]
    return sorted((p for p in found if p.is_file()), key=lambda p: (len(p.parts), p))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _describe_loaders(fork: Path) -> str:
    """What can be said of a checkout without a known builder: where it loads vision models."""
    for path in _find(fork, "*.py"):
        found = re.search(r"\b(CLIPVisionModel|CLIPModel)\.from_pretrained", _read(path))
        if found:
            return (
                f"{path.relative_to(fork)} calls {found[1]}.from_pretrained: a CLIP tower is an ordinary CLIP folder, "
                "so give its path there; whether other code checks the path cannot be predicted"
            )
    return "A CLIP tower is an ordinary CLIP folder: give its path where the fork takes a CLIP by its path"


def _parse(source: str, path: Path) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unpredictable(f"{path} cannot be parsed by this Python ({error})") from None


# --- following the builder ------------------------------------------------------------------------------------------


def predict(rule: Rule, path: str, config: Any = None, exists: Callable[[str], bool] = os.path.exists) -> Prediction:
    """Follow a builder for a path.

    Args:
        path: the tower's path as the fork gets it.
        config: the fork's config, whose attributes are the options; default: one that names only the tower.
        exists: replaces os.path.exists, to try a path that is not there yet.

    Raises:
        Unpredictable: the source does not decide.
    """
    if rule.function == FACTORY:
        return Prediction(_predict_factory(rule, path))
    follower = _Follower(config if config is not None else plain_config(path), exists)
    try:
        names = follower.constants(rule.module)
        names |= follower.arguments(rule, path)
        chosen = follower.run(rule.definition.body, names)
    except (RecursionError, MemoryError):
        raise Unpredictable(f"{rule.path}: {rule.function} is nested too deeply to follow") from None
    return Prediction(chosen, tuple(sorted(follower.unset)))


def plain_config(path: str) -> SimpleNamespace:
    """A config that names the tower as every fork does, and sets no other option."""
    names = ("vision_tower", "image_tower", "mm_vision_tower", "mm_image_tower")
    lists = ("vision_tower_aux_list", "mm_vision_tower_aux_list")
    lengths = ("vision_tower_aux_token_len_list", "mm_vision_tower_aux_token_len_list")
    return SimpleNamespace(
        **dict.fromkeys(names, path),
        **{name: [path] for name in lists},
        **{name: [576] for name in lengths},
    )


def _predict_factory(rule: Rule, path: str) -> str | None:
    """TinyLLaVA Factory: the last registered name that the part before the colon contains."""
    key, chosen = path.split(":")[0].lower(), None
    for file in sorted(rule.path.parent.glob("*.py")):
        classes = [n for n in _parse(_read(file), file).body if isinstance(n, ast.ClassDef)]
        for node, call in ((n, d) for n in classes for d in n.decorator_list if isinstance(d, ast.Call)):
            name = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
            if ast.unparse(call.func).endswith("register_vision_tower") and isinstance(name, str):
                chosen = node.name if name.lower() in key else chosen
    return chosen


class _Unknown:
    """A value that the source does not decide."""


class _Config:
    """The fork's config, wherever a name holds it."""


@dataclass(frozen=True)
class _Class:
    """A class of the fork, by its name."""

    name: str


@dataclass(frozen=True)
class _Built:
    """An object made by calling a class of the fork."""

    name: str


_UNKNOWN, _CONFIG, _NO_DEFAULT = _Unknown(), _Config(), object()


@dataclass
class _Bind:
    """One round of a loop: the target and its value, in place of a statement."""

    target: ast.expr
    value: Any


@dataclass
class _Follower:
    """Works out a builder's statements on strings, lists, numbers and None; all else is _UNKNOWN."""

    config: Any
    exists: Callable[[str], bool]
    unset: set[str] = field(default_factory=set)
    steps: int = 0

    def constants(self, module: ast.Module) -> dict[str, Any]:
        """The module's names for constants, and for lists and dicts of constants and classes."""
        names: dict[str, Any] = {}
        for node in module.body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(
                node.value, (ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict)
            ):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.bind(target, self.value(node.value, names), names)
        return names

    def arguments(self, rule: Rule, path: str) -> dict[str, Any]:
        """The builder's parameters at its call: the path (VILA) or the config first, defaults for the rest."""
        arguments = rule.definition.args
        values: dict[str, Any] = {a.arg: _UNKNOWN for a in (*arguments.args, *arguments.kwonlyargs)}
        given = [path, _CONFIG] if rule.takes_path else [_CONFIG]
        for argument, default in zip(arguments.args[::-1], arguments.defaults[::-1]):  # noqa: B905 - from the end
            values[argument.arg] = self.value(default, {})
        for argument, default_or_none in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            if default_or_none is not None:
                values[argument.arg] = self.value(default_or_none, {})
        return values | {a.arg: value for a, value in zip(arguments.args, given)}  # noqa: B905 - fewer are given

    # statements

    def run(self, statements: Sequence[Any], names: dict[str, Any]) -> str | None:
        """The name of the class whose object the statements return; None if they raise or return nothing."""
        for i, node in enumerate(statements):
            self.steps += 1
            if self.steps > _MOST_STEPS:
                raise Unpredictable(f"line {node.lineno}: too many branches to follow")
            rest = [*statements[i + 1 :]]
            if isinstance(node, _Bind):
                self.bind(node.target, node.value, names)
            elif isinstance(node, ast.Return):
                return self.returned(node, names)
            elif isinstance(node, ast.Raise):
                return None
            elif isinstance(node, ast.If):
                return self.branch(node, rest, names)
            elif isinstance(node, ast.Assert):
                if self.truth(node.test, names) is False:
                    return None
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                value = _UNKNOWN if node.value is None else self.value(node.value, names)
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.bind(target, value, names)
            elif isinstance(node, ast.AugAssign):
                self.bind(node.target, self.add(self.value(node.target, names), self.value(node.value, names)), names)
            elif isinstance(node, ast.For):
                return self.run([*self.rounds(node, names), *node.orelse, *rest], names)
            elif isinstance(node, ast.Try):
                return self.run([*node.body, *node.orelse, *node.finalbody, *rest], names)
            elif isinstance(node, ast.With):
                return self.run([*node.body, *rest], names)
            elif isinstance(node, ast.Expr):
                self.append(node.value, names)
            elif any(isinstance(n, (ast.Return, ast.Raise)) for n in ast.walk(node)) and not isinstance(
                node, (ast.FunctionDef, ast.ClassDef)
            ):
                raise Unpredictable(f"line {node.lineno}: {_first_line(node)}")
        return None

    def branch(self, node: ast.If, rest: list[Any], names: dict[str, Any]) -> str | None:
        """The taken branch and what follows; an undecided test is of no account where both branches agree."""
        true = self.truth(node.test, names)
        if true is not None:
            return self.run([*(node.body if true else node.orelse), *rest], names)
        results = {self.run([*branch, *rest], dict(names)) for branch in (node.body, node.orelse)}
        if len(results) > 1:
            raise Unpredictable(f"line {node.lineno}: if {ast.unparse(node.test)}")
        return results.pop()

    def rounds(self, node: ast.For, names: dict[str, Any]) -> list[Any]:
        """A loop over a known list, written out."""
        items = self.value(node.iter, names)
        jumps = any(isinstance(n, (ast.Break, ast.Continue)) for n in ast.walk(node))
        if not isinstance(items, list) or jumps:
            raise Unpredictable(f"line {node.lineno}: {_first_line(node)}")
        return [part for item in items for part in (_Bind(node.target, item), *node.body)]

    def returned(self, node: ast.Return, names: dict[str, Any]) -> str | None:
        value = None if node.value is None else self.value(node.value, names)
        if isinstance(value, list):
            value = next((item for item in value if isinstance(item, _Built)), None)
        if value is None or isinstance(value, _Built):
            return None if value is None else value.name
        raise Unpredictable(f"line {node.lineno}: {_first_line(node)}")

    def bind(self, target: ast.expr, value: Any, names: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            values = value if isinstance(value, list) and len(value) == len(target.elts) else None
            for i, element in enumerate(target.elts):
                self.bind(element, _UNKNOWN if values is None else values[i], names)

    def append(self, node: ast.expr, names: dict[str, Any]) -> None:
        """``towers.append(...)``, the one call without a result that matters."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
            owner = self.value(node.func.value, names)
            if isinstance(owner, list) and isinstance(node.func.value, ast.Name) and len(node.args) == 1:
                names[node.func.value.id] = [*owner, self.value(node.args[0], names)]

    # expressions

    def truth(self, node: ast.expr, names: dict[str, Any]) -> bool | None:
        return _truth(self.value(node, names))

    def value(self, node: ast.expr, names: dict[str, Any]) -> Any:
        """An expression's value, or _UNKNOWN."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return names.get(node.id, _Class(node.id) if _is_class(node.id) else _UNKNOWN)
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            return [self.value(element, names) for element in node.elts]
        if isinstance(node, ast.Dict):
            pairs = [(self.value(k, names) if k else _UNKNOWN, self.value(v, names)) for k, v in _pairs(node)]
            return dict(pairs) if all(isinstance(k, (str, int)) for k, _ in pairs) else _UNKNOWN
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value, names)
            if owner is _CONFIG:
                return self.option(node.attr)
            return _Class(node.attr) if _is_class(node.attr) else _UNKNOWN
        if isinstance(node, ast.JoinedStr):
            parts = [self.value(part, names) for part in node.values]
            return "".join(map(str, parts)) if all(isinstance(p, (str, int)) for p in parts) else _UNKNOWN
        if isinstance(node, ast.FormattedValue):
            return self.value(node.value, names) if node.format_spec is None and node.conversion == -1 else _UNKNOWN
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.add(self.value(node.left, names), self.value(node.right, names))
        if isinstance(node, ast.BoolOp):
            return self.bool_op(node, names)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            true = self.truth(node.operand, names)
            return _UNKNOWN if true is None else not true
        if isinstance(node, ast.IfExp):
            true = self.truth(node.test, names)
            return _UNKNOWN if true is None else self.value(node.body if true else node.orelse, names)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return _compare(node.ops[0], self.value(node.left, names), self.value(node.comparators[0], names))
        if isinstance(node, ast.Subscript):
            return self.item(self.value(node.value, names), node.slice, names)
        if isinstance(node, ast.Call):
            return self.call(node, names)
        return _UNKNOWN

    def bool_op(self, node: ast.BoolOp, names: dict[str, Any]) -> Any:
        decides = isinstance(node.op, ast.Or)  # the truth that ends the evaluation
        unknown, value = False, None
        for part in node.values:
            value = self.value(part, names)
            true = _truth(value)
            if true is decides:
                return _UNKNOWN if unknown and not isinstance(value, bool) else value
            unknown |= true is None
        return _UNKNOWN if unknown else value

    def add(self, left: Any, right: Any) -> Any:
        same = any(isinstance(left, kind) and isinstance(right, kind) for kind in (str, list))
        return left + right if same else _UNKNOWN

    def item(self, owner: Any, index: ast.expr, names: dict[str, Any]) -> Any:
        key = self.value(index, names)
        if owner is _CONFIG and isinstance(key, str):
            return self.option(key)
        try:
            return owner[key] if isinstance(owner, (str, list, tuple, dict)) else _UNKNOWN
        except (KeyError, IndexError, TypeError):
            return _UNKNOWN

    def option(self, name: str, default: Any = _NO_DEFAULT) -> Any:
        """An attribute of the config; one that is missing and has no default counts as not set."""
        if hasattr(self.config, name):
            value = getattr(self.config, name)
            return list(value) if isinstance(value, tuple) else value
        if default is _NO_DEFAULT:
            self.unset.add(name)
            return None
        return default

    def call(self, node: ast.Call, names: dict[str, Any]) -> Any:
        name, arguments = ast.unparse(node.func), [self.value(a, names) for a in node.args]
        first = arguments[0] if arguments else _UNKNOWN
        last = name.rsplit(".", 1)[-1]
        if name in ("getattr", "hasattr") and len(arguments) > 1 and first is _CONFIG:
            if not isinstance(arguments[1], str):
                return _UNKNOWN
            if name == "hasattr":
                return hasattr(self.config, arguments[1])
            return self.option(*arguments[1:3])
        if name in ("any", "all") and len(node.args) == 1:
            return self.any_or_all(name == "any", node.args[0], names)
        if last in _EXISTS and isinstance(first, str):
            return self.exists(first)
        if name in ("Path", "pathlib.Path", "str", "os.fspath", "os.path.normpath") and isinstance(first, str):
            return first
        if last in ("basename", "isabs", "dirname") and isinstance(first, str):
            return getattr(os.path, last)(first)
        if last in ("deepcopy", "copy", "list", "tuple", "sorted", "set") and len(arguments) == 1:
            return first
        if name == "zip" and all(isinstance(a, list) for a in arguments):
            return [list(row) for row in zip(*arguments)]  # noqa: B905 - as the fork does
        if name == "enumerate" and isinstance(first, list):
            return [list(pair) for pair in enumerate(first)]
        if name == "len" and isinstance(first, (str, list)):
            return len(first)
        if name == "isinstance" and len(node.args) == 2 and not isinstance(first, (_Unknown, _Built, _Class)):
            kinds = {"str": str, "list": list, "dict": dict, "int": int}
            kind = kinds.get(ast.unparse(node.args[1]))
            return _UNKNOWN if kind is None else isinstance(first, kind)
        if isinstance(node.func, ast.Attribute):
            return self.method(self.value(node.func.value, names), node.func.attr, arguments, bool(node.keywords))
        callee = self.value(node.func, names)
        return _Built(callee.name) if isinstance(callee, _Class) else _UNKNOWN

    def method(self, owner: Any, name: str, arguments: list[Any], keywords: bool) -> Any:
        if isinstance(owner, str) and not keywords:
            if name in _EXISTS and not arguments:  # of a pathlib.Path
                return self.exists(owner)
            if name == "format" and "{" not in owner.replace("{}", "") and owner.count("{}") == len(arguments):
                plain = all(isinstance(a, (str, int)) for a in arguments)
                return owner.format(*arguments) if plain else _UNKNOWN
            if name in _STRING_METHODS and not any(isinstance(a, _Unknown) for a in arguments):
                given = [tuple(a) if isinstance(a, list) else a for a in arguments]  # startswith(("a", "b"))
                try:
                    return getattr(owner, name)(*given)
                except (TypeError, ValueError):
                    return _UNKNOWN
        if isinstance(owner, dict) and not keywords:
            if name == "items":
                return [[key, value] for key, value in owner.items()]
            if name in ("keys", "values"):
                return list(getattr(owner, name)())
            if name == "get" and arguments and isinstance(arguments[0], (str, int)):
                return owner.get(*arguments[:2])
        if isinstance(owner, _Built):  # tower.to(dtype)
            return owner
        return _Built(name) if _is_class(name) else _UNKNOWN  # clip_encoder.CLIPVisionTower(...)

    def any_or_all(self, is_any: bool, node: ast.expr, names: dict[str, Any]) -> Any:
        if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
            if len(node.generators) != 1 or node.generators[0].ifs:
                return _UNKNOWN
            items = self.value(node.generators[0].iter, names)
            if not isinstance(items, list):
                return _UNKNOWN
            truths = []
            for item in items:
                inner = dict(names)
                self.bind(node.generators[0].target, item, inner)
                truths.append(self.truth(node.elt, inner))
        else:
            items = self.value(node, names)
            if not isinstance(items, list):
                return _UNKNOWN
            truths = [_truth(item) for item in items]
        if is_any in truths:
            return is_any
        return _UNKNOWN if None in truths else not is_any


def _truth(value: Any) -> bool | None:
    if isinstance(value, _Unknown):
        return None
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _compare(operator: ast.cmpop, left: Any, right: Any) -> Any:
    if isinstance(left, _Unknown) or isinstance(right, _Unknown):
        return _UNKNOWN
    try:
        if isinstance(operator, (ast.In, ast.NotIn)):
            undecided = isinstance(right, list) and left not in right and any(isinstance(r, _Unknown) for r in right)
            return _UNKNOWN if undecided else (left in right) is isinstance(operator, ast.In)
        if isinstance(operator, (ast.Eq, ast.Is)):
            return bool(left == right)
        if isinstance(operator, (ast.NotEq, ast.IsNot)):
            return bool(left != right)
    except (TypeError, ValueError, RuntimeError):
        pass
    return _UNKNOWN


def _is_class(name: str) -> bool:
    return name[:1].isupper() and not name.isupper()


def _pairs(node: ast.Dict) -> Iterator[tuple[ast.expr | None, ast.expr]]:
    return zip(node.keys, node.values)  # noqa: B905 - equally long


def _first_line(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0]


# --- reading the picked class ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerClass:
    """What the source of a tower class and of its bases shows.

    Args:
        names: names that they use, imports under their own names.
        words: words that their files look for in the path.
        drops_first: they cut off the first token of the features.
        selects: they compare the feature selection with cls_patch.
        returns_more: forward always returns several values.
        takes_more: forward requires more arguments than the images.
    """

    names: frozenset[str]
    words: frozenset[str]
    drops_first: bool
    selects: bool
    returns_more: bool
    takes_more: bool


def read_class(rule: Rule, name: str) -> TowerClass | None:
    """Read a tower class from the file where the builder's imports find it, or None if no file defines it."""
    try:
        return _read_class(rule.path, name, depth=0)
    except RecursionError:
        return None


def _read_class(path: Path, name: str, depth: int) -> TowerClass | None:
    found = _locate(path, name, depth) if depth < 8 else None
    if found is None:
        return None
    file, module, node = found
    own = {a.asname: a.name for n in ast.walk(module) if isinstance(n, ast.ImportFrom) for a in n.names if a.asname}
    names = {own.get(n.id, n.id) for n in ast.walk(node) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    drops = any(isinstance(n, ast.Subscript) and _drops_first(n.slice) for n in ast.walk(node))
    selects = any(isinstance(n, ast.Constant) and n.value == "cls_patch" for n in ast.walk(node))
    words = {word.lower() for word in _words(module)}
    forward = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "forward"), None)
    returns = [n.value for n in ast.walk(forward) if isinstance(n, ast.Return)] if forward else []
    more = bool(returns) and all(isinstance(r, ast.Tuple) and len(r.elts) > 1 for r in returns)
    takes = forward is not None and len(forward.args.args) - len(forward.args.defaults) > 2  # self and the images
    for base in (ast.unparse(b).rsplit(".", 1)[-1] for b in node.bases):
        inherited = None if base == name else _read_class(file, base, depth + 1)
        if inherited is not None:
            names, words = names | inherited.names, words | inherited.words
            drops, selects = drops or inherited.drops_first, selects or inherited.selects
            more = more if forward else inherited.returns_more
            takes = takes if forward else inherited.takes_more
    return TowerClass(frozenset(names), frozenset(words), drops, selects, more, takes)


def _locate(path: Path, name: str, depth: int) -> tuple[Path, ast.Module, ast.ClassDef] | None:
    """A class's file: this one, the one an import names, or any beside it."""
    here = _class_in(path, name)
    if here is not None:
        return here
    try:
        module = _parse(_read(path), path)
    except Unpredictable:
        return None
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and depth < 8:
            for alias in (a for a in node.names if (a.asname or a.name) == name):
                target = _imported_file(path, node)
                found = None if target is None or target == path else _locate(target, alias.name, depth + 1)
                if found is not None:
                    return found
    beside = (_class_in(other, name) for other in sorted(path.parent.rglob("*.py")))
    return next((found for found in beside if found is not None), None)


def _class_in(path: Path, name: str) -> tuple[Path, ast.Module, ast.ClassDef] | None:
    source = _read(path)
    if f"class {name}" not in source:
        return None
    try:
        module = _parse(source, path)
    except Unpredictable:
        return None
    nodes = [n for n in ast.walk(module) if isinstance(n, ast.ClassDef) and n.name == name]
    return (path, module, nodes[0]) if nodes else None


def _imported_file(path: Path, node: ast.ImportFrom) -> Path | None:
    """The file of ``from X import ...``; an absolute X is looked for below the folders above this file."""
    parts = (node.module or "").split(".") if node.module else []
    folders = [path.parents[node.level - 1]] if 0 < node.level <= len(path.parents) else list(path.parents)
    for folder in folders:
        target = folder.joinpath(*parts)
        for file in (target.with_suffix(".py") if parts else target / "__init__.py", target / "__init__.py"):
            if file.is_file():
                return file
    return None


def _drops_first(index: ast.expr) -> bool:
    """``[:, 1:]``: all but the first along a later axis."""
    later = index.elts[1:] if isinstance(index, ast.Tuple) else []
    return any(
        isinstance(s, ast.Slice) and s.upper is None and isinstance(s.lower, ast.Constant) and s.lower.value == 1
        for s in later[:1]
    )


def tested_words(rule: Rule) -> tuple[str, ...]:
    """The words that a builder looks for in the path, in the order of the source."""
    if rule.function == FACTORY:
        return ()
    try:
        return tuple(dict.fromkeys(_words(rule.definition, r"\.(starts|ends)with$")))
    except (Unpredictable, RecursionError):
        return ()


def _words(tree: ast.AST, calls: str = "$^") -> list[str]:
    """Words in ``"eva" in name.lower()``, and first arguments of methods that match a pattern, such as startswith."""
    words: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In) and _is_path(node.comparators[0]):
            words += _strings(node.left)
        elif isinstance(node, ast.Call) and node.args and re.search(calls, ast.unparse(node.func)):
            words += _strings(node.args[0])
    return words


def _strings(node: ast.expr) -> list[str]:
    parts = node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node]
    return [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]


def _is_path(node: ast.expr) -> bool:
    """Whether an expression is, by its name, a path or name of a tower."""
    return re.search(r"(name|path|tower)\w*(\.lower\(\))?$", ast.unparse(node)) is not None


def find_problem(
    rule: Rule, model_type: str, chosen: str | None, path: str, select_feature: str = "patch"
) -> str | None:
    """What keeps a builder's class from loading a tower folder of this model type, or None.

    Args:
        chosen: the class, from :func:`predict`.
        select_feature: the option mm_vision_select_feature.

    Raises:
        Unpredictable: the class's source does not show which model it loads.
    """
    if chosen is None:
        return "refuses this path: the fork goes by words in the path"
    found = read_class(rule, chosen)
    if found is None:
        raise Unpredictable(f"{rule.path}: the source of {chosen} was not found")
    if not found.names & {*_LOADERS[model_type]}:
        if any(name.startswith("AutoModel") for name in found.names):
            raise Unpredictable(f"{chosen} loads whatever model AutoModel finds")
        return f"{chosen} does not use {_LOADERS[model_type][0]}, so it does not load {model_type} folders"
    for word in sorted(found.words):  # ShareGPT4V's class looks for "eva", Cambrian's for "interp"
        if word in path.lower() and not any(own in word for own in _OWN_WORDS[model_type]):
            return f"{chosen} takes '{word}' in the path for another kind of model"
    if model_type == "siglip" and found.drops_first:
        if not found.selects:
            return f"{chosen} always drops the first patch of SigLIP, which has no CLS"
        if select_feature != "cls_patch":
            return DROPS_A_PATCH
    return None


def find_expectation(rule: Rule) -> str | None:
    """What a fork expects of its towers beyond images in and features out, so that no other class can replace them.

    Returns:
        None if nothing; else a class whose forward always returns several values (GLaMM, FasterVLM), or, if every
        class of the builder requires them, arguments beside the images (LLaVA-UHD).
    """
    if rule.function == FACTORY:
        return None
    try:
        called = [ast.unparse(n.func).rsplit(".", 1)[-1] for n in ast.walk(rule.definition) if isinstance(n, ast.Call)]
    except (Unpredictable, RecursionError):
        return None
    classes = {name: read_class(rule, name) for name in dict.fromkeys(called) if _is_class(name)}
    found = {name: tower for name, tower in classes.items() if tower is not None}
    for name, tower in found.items():
        if tower.returns_more:
            return f"the fork's {name}.forward returns more than features"
    if found and all(tower.takes_more for tower in found.values()):
        return f"the fork's {min(found)}.forward requires more than images"
    return None
