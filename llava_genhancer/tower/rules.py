"""Read from a LLaVA fork's source which tower class the fork builds for a path; nothing of the fork is run.

A fork (a LLaVA fork's checkout) builds its tower in one function, the builder. :data:`BUILDERS` lists the builders of
the known forks. A builder is a chain of tests of the path, each with the class that is built where the test holds:

    fork                                       tests, in this order                        classes
    LLaVA, Open-LLaVA-NeXT, ShareGPT4V,        exists, starts with openai or laion         CLIP
      LLaVA-Med, VCoder, Ferret, Video-LLaVA
    LLaVA-NeXT                                 the same, then contains siglip              CLIP, SigLIP of its own
    MoE-LLaVA                                  starts with openai or laion; google         CLIP; SigLIP less a patch
    LISA, GLaMM                                starts with openai or laion, contains clip  CLIP
    Parrot                                     contains /clip-vit; /siglip-so400m          CLIP; SigLIP of its own
    MGM                                        exists and contains openai                  CLIP
    Bunny                                      contains sig; eva; clip                     SigLIP; EVA; CLIP
    ross, VideoLLaMA2                          contains clip; siglip                       CLIP; SigLIP
    VILA                                       contains intern; radio; clip; siglip        CLIP; SigLIP less a patch
    LLaVA-UHD                                  contains siglip2; moonvit                   classes that need sizes
    Cambrian                                   contains openai/clip; siglip; 13 more       CLIP, open_clip's SigLIP, ...
    TinyLLaVA Factory                          contains a registered name                  CLIP; SigLIP less a patch

Seven of these forks name their package ``llava``, and each changes its tests between releases. So :func:`predict` takes
the tests from the source in the user's checkout: the first test that holds decides. Where the source has another form,
:class:`Unpredictable` names the line. :func:`find_problem` then reads the class's source.
"""

from __future__ import annotations

import ast
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_genhancer.errors import InputError

TAKES_PATH = "model_name_or_path"  # the first parameter of VILA's builder: the path instead of the config
DROPS_A_PATCH = "drops the first patch of SigLIP (SigLIP has no CLS) unless mm_vision_select_feature is cls_patch"
_LOADERS = {
    "clip": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "siglip": ("SiglipVisionModel",),
    "siglip2": ("Siglip2VisionModel",),
}
_OWN_WORDS = {"clip": ("clip", "openai", "laion"), "siglip": ("siglip", "google"), "siglip2": ("siglip2",)}
# The first of these satisfies most builders that look for a CLIP's name; the last two do not contain the user's own
# folder name, in which a fork may find a word that it takes for another model.
_NEW_NAMES = (
    "openai/{name}", "openai/clip-{name}", "google/{name}", "google/siglip-{name}",
    "openai/clip-enhanced", "google/siglip-enhanced",
)  # fmt: skip


class Unpredictable(Exception):
    """The source does not decide which class is built; the message names the line and the reason."""


@dataclass(frozen=True)
class Builder:
    """What the builders of some forks have in common.

    Args:
        function: the builder's name.
        argument: the trainer's argument for a tower; {} is the path.
        new_names: paths to try where the fork does not load the folder by its own: {name} is the folder's name, {path}
            its absolute path.
        saves_tower: the builder takes the path and not the config. Its fork saves the tower in the checkpoint and reads
            that with its own class (VILA).
    """

    function: str
    argument: str
    new_names: tuple[str, ...] = _NEW_NAMES
    saves_tower: bool = False


# Cambrian defines build_vision_tower too, which its training never calls, so the order decides.
CAMBRIAN = Builder("build_vision_tower_aux_list", "--vision_tower_aux_list '[\"{}\"]'")
FACTORY = Builder("VisionTowerFactory", "--vision_tower {}", ("clip:{path}", "siglip:{path}"))  # TinyLLaVA Factory
VILA = Builder("build_vision_tower", "--vision_tower {}", saves_tower=True)
LLAVA = Builder("build_vision_tower", "--vision_tower {}")
VIDEO_LLAVA = Builder("build_image_tower", "--image_tower {}")  # MoE-LLaVA's too
BUILDERS = (CAMBRIAN, VILA, LLAVA, VIDEO_LLAVA, FACTORY)


@dataclass(frozen=True)
class Rule:
    """A builder in a fork's checkout.

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
    def builder(self) -> Builder:
        takes_path = re.search(rf"def {self.function}\(\s*{TAKES_PATH}\b", self.source) is not None
        return next(b for b in BUILDERS if b.function == self.function and b.saves_tower <= takes_path)

    @property
    def definition(self) -> ast.FunctionDef:
        """The builder's definition.

        Raises:
            Unpredictable: this Python cannot parse the file, or it has no function of that name at its top level.
        """
        for node in _parse(self.source, self.path).body:
            if isinstance(node, ast.FunctionDef) and node.name == self.function:
                return node
        raise Unpredictable(f"{self.path} has no function {self.function} at its top level")


def find_rule(fork: Path) -> Rule:
    """Find the builder in a fork's checkout.

    Raises:
        InputError: no folder, no builder, or several of the same depth; the message lists what was looked for.
    """
    if not fork.is_dir():
        raise InputError(f"--fork {fork} is not a folder: give the fork's checkout")
    known = [*_find(fork, "multimodal_encoder/builder.py"), *_find(fork, "model/vision_tower/__init__.py")]
    rules = _read_rules(known, True) or _read_rules(_find(fork, "*.py"), False)
    if not rules:
        functions = ", ".join(dict.fromkeys(b.function for b in BUILDERS if b is not FACTORY))
        raise InputError(
            f"--fork {fork}: no tower builder found. Looked for */multimodal_encoder/builder.py, then for any file, "
            f"with {functions}, and for */model/vision_tower/__init__.py with {FACTORY.function}. "
            f"{_describe_loaders(fork)}"
        )
    depth = min(len(rule.path.parts) for rule in rules)
    first = [rule for rule in rules if len(rule.path.parts) == depth]
    if len(first) > 1:
        folders = ", ".join(str(rule.path) for rule in first)
        raise InputError(f"--fork {fork} holds {len(first)} tower builders ({folders}): give the folder of one fork")
    return first[0]


def _read_rules(files: Iterable[Path], registers: bool) -> list[Rule]:
    rules = []
    for path in files:
        source = _read(path)
        names = set(re.findall(r"^def (\w+)\(", source, re.MULTILINE))
        function = next((b.function for b in BUILDERS if b.function in names), None)
        if function is not None:
            rules.append(Rule(path, function, source, registers))
    return rules


def _find(fork: Path, tail: str) -> list[Path]:
    found = [p for p in fork.rglob(tail) if not any(part.startswith(".") for part in p.relative_to(fork).parts)]
    return sorted((p for p in found if p.is_file()), key=lambda p: (len(p.parts), p))


def _describe_loaders(fork: Path) -> str:
    """Describe where a checkout without a known builder loads CLIP models."""
    for path in _find(fork, "*.py"):
        found = re.search(r"\b(CLIPVisionModel|CLIPModel)\.from_pretrained", _read(path))
        if found:
            return (
                f"{path.relative_to(fork)} calls {found[1]}.from_pretrained: a CLIP tower is an ordinary CLIP folder, "
                "so give its path there; whether other code checks the path cannot be predicted"
            )
    return "A CLIP tower is an ordinary CLIP folder: give its path where the fork takes a CLIP by its path"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parse(source: str, path: Path) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unpredictable(f"{path} cannot be parsed by this Python ({error})") from None


# --- which class is built -------------------------------------------------------------------------------------------


def predict(
    rule: Rule, path: str, config: Any = None, exists: Callable[[str], bool] = os.path.exists
) -> tuple[str | None, tuple[str, ...]]:
    """Predict which class a builder builds for a path.

    Args:
        path: the tower's path as the fork gets it.
        config: the fork's config, whose attributes are the options; default: no option is set.
        exists: replaces os.path.exists, to try a path that is not there yet.

    Returns:
        The class's name, or None if the builder refuses the path; and the options without a default in the source,
        which were taken as not set.

    Raises:
        Unpredictable: the source does not decide.
    """
    if rule.builder is FACTORY:
        return _predict_factory(rule, path), ()
    tests = _Tests(path, config, exists, of_list=rule.builder is CAMBRIAN)
    try:
        parameters = [argument.arg for argument in rule.definition.args.args]
        given = [path, _CONFIG] if rule.builder is VILA else [_CONFIG]
        tests.names.update(zip(parameters, given))  # noqa: B905 - fewer are given
        chosen = tests.follow(rule.definition.body)
    except (RecursionError, MemoryError):
        raise Unpredictable(f"{rule.path}: {rule.function} is nested too deeply to follow") from None
    except (TypeError, ValueError, IndexError) as error:  # Python of a form that no known builder has
        raise Unpredictable(f"{rule.path}: {rule.function} cannot be read ({error})") from None
    return chosen.name if isinstance(chosen, _Tower) else None, tuple(sorted(tests.unset))


def _predict_factory(rule: Rule, path: str) -> str | None:
    """TinyLLaVA Factory builds the last registered class whose name the part before the colon contains."""
    key, chosen = path.split(":")[0].lower(), None
    registered = re.compile(r"^@register_vision_tower\(['\"](.+?)['\"]\)\s*\nclass (\w+)", re.MULTILINE)
    for file in sorted(rule.path.parent.glob("*.py")):
        for word, name in registered.findall(_read(file)):
            chosen = name if word.lower() in key else chosen
    return chosen


@dataclass(frozen=True)
class _Tower:
    """A tower of the fork's, by its class."""

    name: str


_UNKNOWN, _CONFIG, _GOES_ON = object(), object(), object()
_TOWER_OPTIONS = ("vision_tower", "mm_vision_tower", "image_tower", "mm_image_tower")
_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.In: lambda word, text: word in text,
    ast.NotIn: lambda word, text: word not in text,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


@dataclass
class _Tests:
    """The tests of a builder for one path: whether each holds, or _UNKNOWN where it is more than a test of words."""

    path: str
    config: Any
    exists: Callable[[str], bool]
    of_list: bool  # Cambrian's builder loops over its towers and appends "-interpN" to each name
    names: dict[str, Any] = field(default_factory=dict)
    unset: set[str] = field(default_factory=set)

    def follow(self, statements: list[ast.stmt]) -> Any:
        """Return the tower that the statements build, None where they refuse the path, or _GOES_ON."""
        for node in statements:
            result = _GOES_ON
            if isinstance(node, ast.If):
                holds = self.value(node.test)
                if holds is not _UNKNOWN:
                    result = self.follow(node.body if holds else node.orelse)
                elif not all(isinstance(n, ast.Expr) for n in [*node.body, *node.orelse]):  # not only prints
                    raise Unpredictable(f"line {node.lineno}: if {ast.unparse(node.test)}")
            elif isinstance(node, ast.Return):
                result = None if node.value is None else self.value(node.value)
                if result is not None and not isinstance(result, _Tower):
                    raise Unpredictable(f"line {node.lineno}: {ast.unparse(node)}")
            elif isinstance(node, ast.Raise) or (isinstance(node, ast.Assert) and not self.value(node.test)):
                result = None
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                value = self.value(node.value) if node.value else _UNKNOWN
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    stored = [n for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
                    self.names.update(dict.fromkeys([n.id for n in stored], value if target in stored else _UNKNOWN))
            elif isinstance(node, ast.AugAssign) and not self.of_list:
                self.names[ast.unparse(node.target)] = _UNKNOWN
            elif isinstance(node, ast.For) and self.of_list and isinstance(node.target, ast.Tuple):
                self.names[ast.unparse(node.target.elts[0])] = self.path
                result = self.follow(node.body)
            elif isinstance(node, ast.Expr) and self.of_list and isinstance(node.value, ast.Call):
                built = [self.value(argument) for argument in node.value.args]  # towers.append(...)
                result = next((tower for tower in built if isinstance(tower, _Tower)), _GOES_ON)
            elif hasattr(node, "body") or hasattr(node, "cases"):  # loops, with, try, match
                raise Unpredictable(f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}")
            if result is not _GOES_ON:
                return result
        return _GOES_ON

    def value(self, node: ast.expr) -> Any:
        """Return whether a test holds, the path, a constant, an option's value or a tower; else _UNKNOWN."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.names.get(node.id, _UNKNOWN)
        if isinstance(node, ast.Attribute):
            return self.option(node.attr) if self.value(node.value) is _CONFIG else _UNKNOWN
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            values = tuple(self.value(element) for element in node.elts)
            return _UNKNOWN if _UNKNOWN in values else values
        if isinstance(node, ast.BoolOp):
            ends = isinstance(node.op, ast.Or)  # the truth that decides
            values = tuple(self.value(part) for part in node.values)
            decisive = [v for v in values if v is not _UNKNOWN and bool(v) is ends]
            if _UNKNOWN in values:
                return ends if decisive else _UNKNOWN
            return (decisive or values[-1:])[0]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self.value(node.operand)
            return _UNKNOWN if value is _UNKNOWN else not value
        if isinstance(node, ast.IfExp):
            holds = self.value(node.test)
            return _UNKNOWN if holds is _UNKNOWN else self.value(node.body if holds else node.orelse)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self.value(node.left), self.value(node.comparators[0])
            compare = _COMPARISONS.get(type(node.ops[0]))
            among = isinstance(node.ops[0], (ast.In, ast.NotIn))
            fits = not among or isinstance(right, tuple) or (isinstance(left, str) and isinstance(right, str))
            return _UNKNOWN if compare is None or not fits or _UNKNOWN in (left, right) else compare(left, right)
        return self.call(node) if isinstance(node, ast.Call) else _UNKNOWN

    def call(self, node: ast.Call) -> Any:
        name, arguments = ast.unparse(node.func), [self.value(argument) for argument in node.args]
        last = name.rsplit(".", 1)[-1]
        if name == "getattr" and arguments[0] is _CONFIG and isinstance(arguments[1], str):
            return self.option(*arguments[1:])
        if last in ("exists", "isdir") and arguments and isinstance(arguments[0], str):
            return self.exists(arguments[0])
        owner = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else _UNKNOWN
        if isinstance(owner, str) and last == "lower":
            return owner.lower()
        if isinstance(owner, str) and last in ("startswith", "endswith") and isinstance(arguments[0], (str, tuple)):
            return getattr(owner, last)(*arguments)
        return _Tower(last) if _is_class(last) else _UNKNOWN

    def option(self, name: str, *default: Any) -> Any:
        if name in _TOWER_OPTIONS:
            return self.path
        if hasattr(self.config, name):
            return getattr(self.config, name)
        if not default:
            self.unset.add(name)
        return default[0] if default else None


def _is_class(name: str) -> bool:
    return name[:1].isupper() and not name.isupper()


def tested_words(rule: Rule) -> tuple[str, ...]:
    """The words that a builder looks for in the path, in the order of the source."""
    try:
        return tuple(dict.fromkeys(_words(rule.definition)))
    except (Unpredictable, RecursionError):
        return ()


def _words(tree: ast.AST) -> Iterator[str]:
    """Yield the words of ``"eva" in name.lower()``, ``name == "eva"`` and ``name.startswith("eva")``."""
    for node in ast.walk(tree):
        found: list[ast.expr] = []
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.Eq)):
            word, text = sorted([node.left, node.comparators[0]], key=lambda n: not isinstance(n, ast.Constant))
            found = [word] if re.search(r"(name|path|tower)\w*(\.lower\(\))?$", ast.unparse(text)) else []
        elif isinstance(node, ast.Call) and re.search(r"\.(starts|ends)with$", ast.unparse(node.func)):
            found = node.args[:1]
        for part in (p for f in found for p in (f.elts if isinstance(f, ast.Tuple) else [f])):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value


# --- what the class loads -------------------------------------------------------------------------------------------


def find_problem(
    rule: Rule, model_type: str, chosen: str | None, path: str, select_feature: str = "patch"
) -> str | None:
    """Find what keeps a builder's class from loading a tower folder of this model type; None if nothing does.

    Args:
        chosen: the class, from :func:`predict`.
        select_feature: the option mm_vision_select_feature.

    Raises:
        Unpredictable: the class's source does not show which model it loads.
    """
    if chosen is None:
        return "refuses this path: the fork goes by words in the path"
    found = _read_class(rule, chosen)
    if not found:
        raise Unpredictable(f"{rule.path}: the source of {chosen} was not found")
    nodes = [node for _, definition in found for node in ast.walk(definition)]
    imported = {a.asname: a.name for module, _ in found for a in ast.walk(module) if isinstance(a, ast.alias)}
    names = {imported.get(n.id) or n.id for n in nodes if isinstance(n, ast.Name)}
    names |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    if not names & {*_LOADERS[model_type]}:
        if any(name.startswith("AutoModel") for name in names):
            raise Unpredictable(f"{chosen} loads whatever model AutoModel finds")
        return f"{chosen} does not use {_LOADERS[model_type][0]}, so it does not load {model_type} folders"
    for word in sorted({word.lower() for module, _ in found for word in _words(module)}):
        # ShareGPT4V's class looks for "eva", Cambrian's for "interp".
        if word in path.lower() and not any(own in word for own in _OWN_WORDS[model_type]):
            return f"{chosen} takes '{word}' in the path for another kind of model"
    if model_type == "siglip" and any(isinstance(n, ast.Subscript) and _drops_first(n.slice) for n in nodes):
        if not any(isinstance(n, ast.Constant) and n.value == "cls_patch" for n in nodes):
            return f"{chosen} always drops the first patch of SigLIP, which has no CLS"
        if select_feature != "cls_patch":
            return DROPS_A_PATCH
    return None


def _drops_first(index: ast.expr) -> bool:
    """Whether an index is ``[:, 1:]``: all but the first along the second axis."""
    return re.match(r"\(?:, 1:(,|\)|$)", ast.unparse(index)) is not None


def find_expectation(rule: Rule) -> str | None:
    """Find what a fork expects of its towers beyond images in and features out, so that our class cannot replace them.

    Returns:
        None if nothing; else a class whose forward always returns several values (GLaMM, FasterVLM), or, if every
        class of the builder requires them, arguments beside the images (LLaVA-UHD).
    """
    try:
        called = [ast.unparse(n.func).rsplit(".", 1)[-1] for n in ast.walk(rule.definition) if isinstance(n, ast.Call)]
    except (Unpredictable, RecursionError):
        return None
    requires = {}
    for name in dict.fromkeys(filter(_is_class, called)):
        parts = [part for _, definition in _read_class(rule, name) for part in definition.body]
        forward = next((p for p in parts if isinstance(p, ast.FunctionDef) and p.name == "forward"), None)
        if forward is not None:
            returned = [n.value for n in ast.walk(forward) if isinstance(n, ast.Return)]
            if returned and all(isinstance(value, ast.Tuple) and len(value.elts) > 1 for value in returned):
                return f"the fork's {name}.forward returns more than features"
        if parts:  # self and the images are required everywhere
            requires[name] = forward is not None and len(forward.args.args) - len(forward.args.defaults) > 2
    if requires and all(requires.values()):
        return f"the fork's {min(requires)}.forward requires more than images"
    return None


def _read_class(rule: Rule, name: str) -> list[tuple[ast.Module, ast.ClassDef]]:
    """Read a class and those of its bases that the fork defines, the class first; empty if its file is not found."""
    found: list[tuple[ast.Module, ast.ClassDef]] = []
    wanted, seen = [(rule.path, name)], set()
    while wanted:
        file, name = wanted.pop(0)
        located = None if (file, name) in seen else _locate(rule, file, name)
        seen.add((file, name))
        if located is not None:
            file, module, definition = located
            found.append((module, definition))
            wanted += [(file, ast.unparse(base).rsplit(".", 1)[-1]) for base in definition.bases]
    return found


def _locate(rule: Rule, file: Path, name: str) -> tuple[Path, ast.Module, ast.ClassDef] | None:
    """Locate a class that a file names: in the file, in the one that it imports the class from, or near the builder."""
    stem = "*"
    imports = [node for node in ast.walk(_parse(_read(file), file)) if isinstance(node, ast.ImportFrom)]
    for module_name, alias in ((node.module, alias) for node in imports for alias in node.names):
        if name in (alias.asname, alias.name):
            stem, name = (module_name or "*").rsplit(".", 1)[-1], alias.name
            break
    near = (p for folder in rule.path.parents[:2] for tail in (stem, "*") for p in sorted(folder.rglob(f"{tail}.py")))
    for path in (file, *near):
        source = _read(path)
        if re.search(rf"^\s*class {name}\b", source, re.MULTILINE):
            try:
                module = _parse(source, path)
            except Unpredictable:
                continue
            for node in ast.walk(module):
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return path, module, node
    return None
