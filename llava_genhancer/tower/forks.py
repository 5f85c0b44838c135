"""Towers of ours inside LLaVA and its forks, chosen by the folder's marker and never by its name.

A fork chooses its tower in one function, which its ``*_arch`` modules import by value. :func:`register` puts a chooser
in that function's place, wherever it is bound: at once in modules that are loaded, and by an import hook in those that
come later. The chooser builds our tower for a folder that carries our marker and hands everything else to the original.
Modules are known by how their names end, so that a fork of a fork, under another package name, is found too.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeGuard

from llava_genhancer.errors import InputError
from llava_genhancer.tower.export import is_tower

BUILDER = ".multimodal_encoder.builder"  # of every fork but one:
FACTORY = ".model.vision_tower"  # TinyLLaVA Factory


class Chooser:
    """A fork's own choosing function, and what comes before it."""

    def __init__(self, original: Callable[..., Any], choose: Callable[..., Any]):
        functools.update_wrapper(self, original)
        self.original = original
        self.choose = choose

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.choose(self.original, *args, **kwargs)


def register() -> list[str]:
    """Make LLaVA and its forks build our tower for our folders. Calling it again does no harm.

    Returns:
        The builder modules that are loaded and now choose our tower; ones imported later follow by themselves.

    Raises:
        InputError: a loaded module is called like a fork's builder and has none of the functions known here. For
            one that is imported later, its import raises this.
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


def _ours(name: Any) -> TypeGuard[str]:
    return isinstance(name, str) and is_tower(name)


def _from_config(original: Callable[..., Any], config: Any, *args: Any, kind: str, **kwargs: Any) -> Any:
    """``build_vision_tower(config, **kwargs)``; ``kind`` is "vision" or, in Video-LLaVA and MoE-LLaVA, "image"."""
    from llava_genhancer.tower.tower import VisionTower

    name = getattr(config, f"mm_{kind}_tower", getattr(config, f"{kind}_tower", None))
    return VisionTower(name, config, **kwargs) if _ours(name) else original(config, *args, **kwargs)


def _from_path(original: Callable[..., Any], model_name_or_path: Any, config: Any) -> Any:
    """VILA's ``build_vision_tower(path, config)``: loaded at once, in the config's dtype.

    VILA saves the tower with the model, without our marker, and reads it back with its own class.

    Raises:
        InputError: that class would drop a patch of SigLIP which the model was trained with.
    """
    import torch

    from llava_genhancer.tower.tower import VisionTower

    if not _ours(model_name_or_path):
        return original(model_name_or_path, config)
    dtype = getattr(torch, str(config.model_dtype).replace("torch.", ""))
    tower = VisionTower(model_name_or_path, config).to(dtype)
    if tower.model_type != "clip" and tower.select_feature == "patch":
        raise InputError(
            "VILA reads the tower it saved with its own class, which then drops a patch of SigLIP: "
            "give --mm_vision_select_feature cls_patch"
        )
    config.mm_hidden_size = tower.hidden_size
    return tower


def _vision(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if next(iter(inspect.signature(original).parameters)) == "model_name_or_path":
        return _from_path(original, *args, **kwargs)
    return _from_config(original, *args, kind="vision", **kwargs)


def _aux_list(original: Callable[..., Any], config: Any, **kwargs: Any) -> list[Any]:
    """Cambrian's list of towers, each resampled to a number of tokens of its own; the order is kept."""
    from llava_genhancer.tower.tower import VisionTower

    names = _first(config, "mm_vision_tower_aux_list", "vision_tower_aux_list")
    numbers = _first(config, "mm_vision_tower_aux_token_len_list", "vision_tower_aux_token_len_list")
    towers: list[Any] = []
    for name, number in zip(names, numbers):  # noqa: B905 - as the fork does
        if _ours(name):
            towers.append(VisionTower(name, config, num_tokens=number, **kwargs))
        else:
            towers.extend(original(_OneTower(config, name, number), **kwargs))
    return towers


class _OneTower:
    """Cambrian's config, as if it listed one tower."""

    def __init__(self, config: Any, name: str, number: int):
        self.__dict__.update(vars(config))
        self.mm_vision_tower_aux_list = self.vision_tower_aux_list = [name]
        self.mm_vision_tower_aux_token_len_list = self.vision_tower_aux_token_len_list = [number]


def _factory(original: Callable[..., Any], vision_tower_name: str) -> Any:
    """TinyLLaVA Factory's choice of a class by ``name`` or ``name:path``."""
    from llava_genhancer.tower.tinyllava import FactoryTower

    return FactoryTower if _ours(vision_tower_name.split(":")[-1]) else original(vision_tower_name)


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
    # `a.model.vision_tower` of another project may be anything: only a factory inside makes it TinyLLaVA's.
    return name.endswith(BUILDER) or (name.endswith(FACTORY) and hasattr(sys.modules.get(name), "VisionTowerFactory"))


def _patch(module: ModuleType) -> None:
    """Put choosers into a builder module, and wherever else its functions are bound."""
    choices = _CHOICES if module.__name__.endswith(BUILDER) else _FACTORY_CHOICES
    found = [name for name in choices if hasattr(module, name)]
    if not found:
        raise InputError(
            f"{module.__name__} is not laid out like a fork that is known here: looked for {describe_layouts()}. "
            "A CLIP tower may still go in by its path; see `llava-genhancer doctor --fork DIR --tower DIR`"
        )
    for name in found:
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
