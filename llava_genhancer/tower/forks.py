"""Make LLaVA and its forks load every tower folder of this package, also those that they cannot load themselves.

A fork picks its tower class in one function, the builder, which its ``*_arch`` modules import by value.
:func:`register` replaces that function by a :class:`Chooser` wherever it is bound: at once in modules that are loaded,
and by an import hook in modules that are imported later. The chooser hands a path without our marker file to the
fork's builder. For a tower folder the chooser reads the builder's source (:mod:`llava_genhancer.tower.rules`): where
the fork's own class loads the folder, the fork's class stays, with all that it offers; else the chooser builds
:class:`~llava_genhancer.tower.tower.VisionTower`. Builders are found by the end of their module's name, so a fork of a
fork under another package name is found too.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from llava_genhancer.errors import InputError
from llava_genhancer.tower.export import VISION_MODELS, is_tower, read_marker, verify_tower
from llava_genhancer.tower.rules import TAKES_PATH, Rule, Unpredictable, find_expectation, find_problem, predict

BUILDER = ".multimodal_encoder.builder"  # of every fork but one:
FACTORY = ".model.vision_tower"  # TinyLLaVA Factory


class Chooser:
    """Calls a fork's builder, or builds this package's tower in its place.

    Attributes:
        original: the fork's builder.
        built: tower folders for which this package's class was built.
    """

    def __init__(self, original: Callable[..., Any], choose: Callable[..., Any]):
        functools.update_wrapper(self, original)
        self.original = original
        self.choose = choose
        self.built: list[str] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.choose(self, *args, **kwargs)

    def build(
        self, path: Any, config: Any, own: Callable[[], Any], ours: Callable[[], Any], given: str | None = None
    ) -> Any:
        """Build a tower by the fork's builder, or by this package where the fork's class does not load our folder.

        Args:
            path: the tower's path; a path that is no folder of ours is left to the fork.
            config: the fork's config, whose options its builder reads.
            own: calls the fork's builder.
            ours: builds this package's class.
            given: what the fork's builder gets, if not the path alone (TinyLLaVA Factory's ``name:path``).

        Raises:
            InputError: the folder is not as it was exported, or the fork expects more of a tower than features.
        """
        if not isinstance(path, str) or not is_tower(path):
            return own()
        model_type = str(read_marker(path).get("model_type"))
        if model_type in VISION_MODELS:  # this package's class names the model types that it knows
            feature = _first(config, "mm_vision_select_feature", "mm_vision_select_feature") or "patch"
            try:
                rule = self.rule()
                problem = find_problem(rule, model_type, predict(rule, given or path, config)[0], path, feature)
            except Unpredictable:
                tower = _try_own(own, path) if model_type == "clip" else None
                if tower is not None:
                    return tower
            else:
                if problem is None:
                    verify_tower(path)
                    return own()
                expected = find_expectation(rule)
                if expected is not None:
                    raise InputError(
                        f"{rule.function} cannot build {path}: the fork's class {problem}, and llava_genhancer's class "
                        f"cannot replace it: {expected}; see `llava-genhancer doctor --fork`"
                    )
        tower = ours()
        self.built.append(path)
        return tower

    def rule(self) -> Rule:
        """The fork's builder as source.

        Raises:
            Unpredictable: its source is not on the disk.
        """
        path = inspect.getsourcefile(inspect.unwrap(self.original))
        try:
            source = Path(str(path)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Unpredictable(f"{path} cannot be read ({error})") from None
        return Rule(Path(str(path)), self.original.__name__, source)

    @property
    def takes_path(self) -> bool:
        """Whether the fork's builder takes the path and not the config (VILA)."""
        return next(iter(inspect.signature(self.original).parameters)) == TAKES_PATH

    @property
    def needed_later(self) -> list[str]:
        """Tower folders that need :func:`register` again when a checkpoint that was trained on them is loaded."""
        return [] if self.takes_path else self.built  # VILA saves the tower and reads it with its own class


def _try_own(call: Callable[[], Any], path: str) -> Any:
    """The fork's own tower for a CLIP folder, or None where the fork refuses the folder or picks another model."""
    verify_tower(path)
    try:
        tower = call()
    except (ValueError, AssertionError, KeyError, NotImplementedError):
        return None
    return tower if "clip" in str(getattr(getattr(tower, "config", None), "model_type", "")) else None


def register() -> list[str]:
    """Make LLaVA and its forks load every tower folder of this package. A second call changes nothing.

    Returns:
        The builder modules that are loaded and whose builders are replaced; those imported later are replaced then.

    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    builders = [module for name, module in list(sys.modules.items()) if _is_builder(name)]
    for module in builders:
        _patch(module)
    return [module.__name__ for module in builders]


def describe_layouts() -> str:
    """What :func:`register` looks for, for messages."""
    return (
        f"a module *{BUILDER} with {', '.join(_CHOICES)}(...), or *{FACTORY} with VisionTowerFactory(name) "
        "(TinyLLaVA Factory)"
    )


# --- what is put in a fork's place ----------------------------------------------------------------------------------


def _from_config(chooser: Chooser, config: Any, *args: Any, kind: str, **kwargs: Any) -> Any:
    """``build_vision_tower(config, **kwargs)``; ``kind`` is "vision" or, in Video-LLaVA and MoE-LLaVA, "image"."""
    from llava_genhancer.tower.tower import VisionTower

    name = _first(config, f"mm_{kind}_tower", f"{kind}_tower")
    own = functools.partial(chooser.original, config, *args, **kwargs)
    return chooser.build(name, config, own, lambda: VisionTower(name, config, *args, **kwargs))


def _vision(chooser: Chooser, *args: Any, **kwargs: Any) -> Any:
    if not chooser.takes_path:
        return _from_config(chooser, *args, kind="vision", **kwargs)
    path, config = inspect.signature(chooser.original).bind(*args, **kwargs).arguments.values()
    own = functools.partial(chooser.original, path, config)
    return chooser.build(path, config, own, functools.partial(_build_for_vila, path, config))


def _build_for_vila(path: str, config: Any) -> Any:
    """Build this package's tower for VILA: loaded at once, in the config's dtype.

    VILA saves the tower with the model, without our marker, and reads it back with its own class.

    Raises:
        InputError: that class would drop a patch of SigLIP which the model was trained with, or cannot load the model.
    """
    import torch

    from llava_genhancer.tower.tower import VisionTower

    tower = VisionTower(path, config)
    reads = "VILA reads the tower it saved with its own class, which"
    if tower.model_type == "siglip2":
        raise InputError(f"{reads} does not load {path} (siglip2): use a CLIP or SigLIP tower")
    if tower.model_type != "clip" and tower.tokens == "patch":
        raise InputError(f"{reads} then drops a patch of SigLIP: give --mm_vision_select_feature cls_patch")
    config.mm_hidden_size = tower.hidden_size
    return tower.to(getattr(torch, str(config.model_dtype).replace("torch.", "")))


def _aux_list(chooser: Chooser, config: Any, **kwargs: Any) -> list[Any]:
    """Cambrian's list of towers, each resampled to a number of tokens of its own; the order is kept."""
    from llava_genhancer.tower.tower import VisionTower

    names = _first(config, "mm_vision_tower_aux_list", "vision_tower_aux_list")
    numbers = _first(config, "mm_vision_tower_aux_token_len_list", "vision_tower_aux_token_len_list")
    towers: list[Any] = []
    for name, number in zip(names, numbers):  # noqa: B905 - as the fork does
        one = _OneTower(config, name, number)
        own = functools.partial(chooser.original, one, **kwargs)
        ours = functools.partial(VisionTower, name, config, num_tokens=number, **kwargs)
        built = chooser.build(name, one, own, ours)
        towers.extend(built if isinstance(built, list) else [built])
    return towers


class _OneTower:
    """Cambrian's config, as if it listed one tower."""

    def __init__(self, config: Any, name: str, number: int):
        self.__dict__.update(vars(config))
        self.mm_vision_tower_aux_list = self.vision_tower_aux_list = [name]
        self.mm_vision_tower_aux_token_len_list = self.vision_tower_aux_token_len_list = [number]


def _factory(chooser: Chooser, vision_tower_name: str) -> Any:
    """TinyLLaVA Factory's choice of a class by ``name`` or ``name:path``."""
    from llava_genhancer.tower.tinyllava import FactoryTower

    path = vision_tower_name.split(":")[-1]
    own = functools.partial(chooser.original, vision_tower_name)
    return chooser.build(path, None, own, lambda: FactoryTower, given=vision_tower_name)


def _first(config: Any, name: str, other: str) -> Any:
    return getattr(config, name, getattr(config, other, None))


_CHOICES: dict[str, Callable[..., Any]] = {
    "build_vision_tower": _vision,
    "build_image_tower": functools.partial(_from_config, kind="image"),
    "build_vision_tower_aux_list": _aux_list,
}
_FACTORY_CHOICES: dict[str, Callable[..., Any]] = {"VisionTowerFactory": _factory}


# --- how it gets there ----------------------------------------------------------------------------------------------


def _is_builder(name: str) -> bool:
    # A module of such a name in another project may be anything, and is left alone without a function known here.
    known = _CHOICES if name.endswith(BUILDER) else _FACTORY_CHOICES if name.endswith(FACTORY) else ()
    return any(hasattr(sys.modules.get(name), function) for function in known)


def _patch(module: ModuleType) -> None:
    """Replace a builder module's functions by choosers, there and wherever else they are bound."""
    choices = _CHOICES if module.__name__.endswith(BUILDER) else _FACTORY_CHOICES
    for name in (name for name in choices if hasattr(module, name)):
        original = getattr(module, name)
        if isinstance(original, Chooser):
            continue
        chooser = Chooser(original, choices[name])
        for other in list(sys.modules.values()):
            bindings = getattr(other, "__dict__", {})
            for key, value in list(bindings.items()):
                if value is original:
                    bindings[key] = chooser


class _Finder(importlib.abc.MetaPathFinder):
    """Patches builder modules right after they ran, before anybody can import from them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.endswith((BUILDER, FACTORY)):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        loader: Any = spec.loader
        if loader is None:  # a folder without __init__.py
            return spec
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if _is_builder(module.__name__):
                _patch(module)

        loader.exec_module = exec_module
        return spec
