"""What a fork will make of a tower folder, read from the fork's source: nothing of the fork is imported.

A fork chooses by the folder's path, in one function. That function alone is compiled here and called with the path,
in a world where the fork's tower classes are mere names and of Python there are only strings and lookups. So the answer
is the rule as it stands in that checkout, the user's own changes included.
"""

from __future__ import annotations

import ast
import builtins
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_genhancer.errors import InputError
from llava_genhancer.tower.export import verify_tower

WORKS, RENAME, REGISTER = "works", "rename", "register"  # rename: another path or argument is enough
LAUNCH = "`python -m llava_genhancer.launch TRAINER ...`"
CLS_PATCH = "give --mm_vision_select_feature cls_patch"
DROPS_A_PATCH = "drops the first patch of SigLIP, which has no CLS, unless it is told otherwise"
FACTORY = "VisionTowerFactory"  # of TinyLLaVA Factory, which reads `name:path`
FACTORY_NAMES = ("clip:{path}", "siglip:{path}")
# Tried in this order: the first satisfies every rule that takes a CLIP by its name, the last has no word of the user's.
NEW_NAMES = (
    "openai/{name}", "openai/clip-{name}", "google/{name}", "google/siglip-{name}",
    "openai/clip-enhanced", "google/siglip-enhanced",
)  # fmt: skip
_LOADERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
_SAFE = (
    "AttributeError", "Exception", "ValueError", "any", "dict", "enumerate", "float", "getattr", "hasattr", "int",
    "isinstance", "len", "list", "max", "min", "range", "str", "tuple", "zip",
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """Where a fork chooses."""

    path: Path  # the file
    function: str
    source: str


@dataclass(frozen=True)
class Choice:
    """What a fork does with a folder."""

    rule: Rule
    model_type: str
    chosen: str | None  # the class's name; None: the fork refuses the path
    verdict: str  # WORKS, RENAME or REGISTER
    reason: str
    todo: str


def fork_choice(fork: str, tower: str) -> Choice:
    """Which class a fork would build for a tower folder, and what to do about it.

    Args:
        fork: the fork's checkout, or its package's folder.
        tower: one of our tower folders, written as it would be given to ``--vision_tower``.

    Raises:
        InputError: no fork there whose layout is known, or not a tower as it was exported.
    """
    model_type = str(verify_tower(tower)["model_type"])
    rule = find_rule(Path(fork))
    chosen = ask(rule, tower)
    problem = find_problem(rule, model_type, chosen, tower)
    if problem is None:
        return Choice(rule, model_type, chosen, WORKS, f"loads {model_type} folders", "")
    register = f"start training as {LAUNCH}, or call llava_genhancer.tower.register() first"
    if problem == DROPS_A_PATCH:
        return Choice(rule, model_type, chosen, RENAME, problem, f"{CLS_PATCH}; or {register}")
    for pattern in FACTORY_NAMES if rule.function == FACTORY else NEW_NAMES:
        name = pattern.format(name=Path(tower).absolute().name, path=tower)
        left = find_problem(rule, model_type, ask(rule, name, exists=True), name)
        if left is None or left == DROPS_A_PATCH:
            todo = f"give --vision_tower {name}"
            if rule.function != FACTORY:
                todo = f"move or link the folder to {name}, below the folder you train in, and give that path"
            todo += f", and {CLS_PATCH}" if left else ""
            return Choice(rule, model_type, chosen, RENAME, problem, f"{todo}; or {register}")
    return Choice(rule, model_type, chosen, REGISTER, problem, register)


def find_problem(rule: Rule, model_type: str, chosen: str | None, path: str) -> str | None:
    """What is wrong with a fork's choice for a model of this type, or None."""
    if chosen is None:
        return "refuses this path: it goes by the path's words"
    module, names, slices = _read_class(rule, chosen)
    wanted = _LOADERS.get(model_type)
    if wanted not in names:
        return f"does not load {model_type} folders"
    # ShareGPT4V's class looks for "eva" once more, Cambrian's for "interp".
    for word in _tested_words(module):
        if word in path.lower() and word not in ("clip", "siglip", "openai/clip"):
            return f"reads '{word}' in the path as something else"
    return DROPS_A_PATCH if model_type == "siglip" and slices else None


def find_rule(fork: Path) -> Rule:
    """The function of a checkout that chooses a tower.

    Raises:
        InputError: none found; the message says what was looked for.
    """
    if not fork.is_dir():
        raise InputError(f"--fork {fork} is not a folder: give the fork's checkout")
    for path in (*_find(fork, "multimodal_encoder/builder.py"), *_find(fork, "model/vision_tower/__init__.py")):
        source = path.read_text(encoding="utf-8")
        functions = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        # Cambrian has a build_vision_tower too, which its training never calls.
        for name in ("build_vision_tower_aux_list", "build_vision_tower", "build_image_tower", FACTORY):
            if name in functions:
                return Rule(path, name, source)
    raise InputError(
        f"--fork {fork}: no tower builder known here. Looked for */multimodal_encoder/builder.py with "
        "build_vision_tower, build_image_tower or build_vision_tower_aux_list, and for "
        "*/model/vision_tower/__init__.py with VisionTowerFactory"
    )


def _find(fork: Path, tail: str) -> Iterator[Path]:
    found = [p for p in fork.rglob(tail) if not any(part.startswith(".") for part in p.relative_to(fork).parts)]
    return iter(sorted(found, key=lambda p: (len(p.parts), p)))


# --- reading the chosen class ---------------------------------------------------------------------------------------


def _read_class(rule: Rule, name: str) -> tuple[ast.Module | None, set[str], bool]:
    """The module of a tower class; the names that it and its bases use; whether any of them cuts off a first token."""
    for path in sorted(rule.path.parent.rglob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        for node in module.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                slices = any(isinstance(n, ast.Slice) and ast.unparse(n) == "1:" for n in ast.walk(node))
                for base in (b.id for b in node.bases if isinstance(b, ast.Name) and b.id != name):
                    _, inherited, cuts = _read_class(rule, base)
                    names, slices = names | inherited, slices or cuts
                return module, names, slices
    return None, set(), False


def _tested_words(module: ast.Module | None) -> set[str]:
    """Words that a module looks for in strings: ``"eva" in name.lower()``."""
    tests = [n for n in ast.walk(module) if isinstance(n, ast.Compare)] if module is not None else []
    return {
        test.left.value.lower()
        for test in tests
        if isinstance(test.ops[0], ast.In) and isinstance(test.left, ast.Constant) and isinstance(test.left.value, str)
    }


# --- asking the fork's function -------------------------------------------------------------------------------------


class _Name:
    """Stands for a name of the fork: a tower class when called, a logger or a module when looked into."""

    def __init__(self, name: str, called: list[str]):
        self._name, self._called = name, called

    def __call__(self, *args: Any, **kwargs: Any) -> _Name:
        if "Tower" in self._name or "Wrapper" in self._name:
            self._called.append(self._name)
        return self

    def __getattr__(self, name: str) -> _Name:
        return _Name(name, self._called)


def ask(rule: Rule, tower: str, *, exists: bool | None = None) -> str | None:
    """The class that the rule would build for a path, or None if it refuses the path.

    Args:
        exists: whether the path is to be taken for an existing one (default: whether it exists).
    """
    if rule.function == FACTORY:
        return _ask_factory(rule, tower)
    node = next(n for n in ast.parse(rule.source).body if isinstance(n, ast.FunctionDef) and n.name == rule.function)
    node.decorator_list = []
    for argument in (*node.args.args, *node.args.kwonlyargs):
        argument.annotation = None
    node.returns = None
    called: list[str] = []
    there = os.path.exists if exists is None else lambda path: exists
    safe: dict[str, Any] = {name: getattr(builtins, name) for name in _SAFE}
    world: dict[str, Any] = {
        n.id: _Name(n.id, called) for n in ast.walk(node) if isinstance(n, ast.Name) and n.id not in safe
    }
    world |= {
        "__builtins__": safe,
        "os": SimpleNamespace(path=SimpleNamespace(exists=there, isdir=there, isabs=os.path.isabs)),
        "copy": SimpleNamespace(deepcopy=copy.copy, copy=copy.copy),
    }
    exec(compile(ast.Module([node], type_ignores=[]), str(rule.path), "exec"), world)
    try:
        world[rule.function](*_arguments(node, tower))
    except ValueError:  # "Unknown vision tower"
        return None
    except Exception as error:
        raise InputError(f"{rule.path}: {rule.function} could not be followed ({error}): try it in training") from None
    return called[0] if called else None


def _arguments(node: ast.FunctionDef, tower: str) -> list[Any]:
    """The function's positional arguments, for a configuration that names the tower and asks for nothing special."""
    names = ("vision_tower", "image_tower", "mm_vision_tower", "mm_image_tower")
    lists = ("vision_tower_aux_list", "mm_vision_tower_aux_list")
    config = SimpleNamespace(
        **dict.fromkeys(names, tower),
        **{name: [tower] for name in lists},
        **{name: [576] for name in ("vision_tower_aux_token_len_list", "mm_vision_tower_aux_token_len_list")},
        resume_path=None,
        ps3=False,
        s2=False,
    )
    return [tower, config] if node.args.args[0].arg == "model_name_or_path" else [config]


def _ask_factory(rule: Rule, tower: str) -> str | None:
    """TinyLLaVA Factory: the last registered name that the part before the colon contains."""
    key, chosen = tower.split(":")[0].lower(), None
    for path in sorted(rule.path.parent.glob("*.py")):
        classes = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef)]
        for node, call in ((n, d) for n in classes for d in n.decorator_list if isinstance(d, ast.Call)):
            if ast.unparse(call.func) == "register_vision_tower" and isinstance(call.args[0], ast.Constant):
                chosen = node.name if str(call.args[0].value).lower() in key else chosen
    return chosen
