"""What every recipe class shares: documented fields, changes by name, and the way through JSON and back.

A recipe is a flat, frozen dataclass whose stages are nested tables of the same kind; a field inside a table is named
with a dot (``stage1.max_steps``). Nothing in this file imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from llava_genhancer.errors import InputError
from llava_genhancer.files import expand

T = TypeVar("T")
R = TypeVar("R")  # a recipe class: Recipe in recipes.py, LlavaRecipe in llava/recipes.py


def option(default: T, help: str, *, path: Literal["path", "name"] | None = None, at_most: str | None = None) -> T:
    """A dataclass field with a default and the sentence that documents it (``--help`` and ``recipes`` print it).

    Args:
        path: ``"path"`` for a file or folder, ``"name"`` for a path or else a model's hub id; see
            :func:`resolve_paths`.
        at_most: a field of the same class; where that one is lowered, :func:`override` lowers this default with it.
    """
    return typing.cast(T, field(default=default, metadata={"help": help, "path": path, "at_most": at_most}))


def resolve_paths(recipe: Any) -> None:
    """Replace ``~`` and relative paths in a recipe's path fields, once, when the recipe is built.

    A run's manifest so names the same files from every folder. Of a field that may hold a hub id, only what exists
    here is made absolute; the field's default stays as written.

    Raises:
        InputError: ``~user`` names no user.
    """
    for f in dataclasses.fields(recipe):
        kind, value = f.metadata.get("path"), getattr(recipe, f.name)
        if kind is None or not value or value == f.default:
            continue
        value = expand(value)
        named = value.startswith(("hf:", "{")) or (kind == "name" and not os.path.exists(value))
        object.__setattr__(recipe, f.name, value if named else os.path.abspath(value))


@dataclass(frozen=True, kw_only=True)
class Guards:
    """What a training does about steps gone bad and ranks that hang: fields of every recipe."""

    on_bad_step: Literal["stop", "skip"] = option(
        "stop",
        "where a loss or gradient is not finite, or a loss spikes: end, or leave the step out; costs a sync a step",
    )
    spike_factor: float = option(
        0.0, "a loss this multiple of the median of the 50 steps before is a spike; 0 = never (ours)"
    )
    max_skipped_steps: int = option(10, "skipped steps of a training above which it ends all the same")
    timeout_minutes: float = option(30.0, "time without progress after which a rank that hangs is an error")

    def check_guards(self) -> None:
        """Refuse what no training can go by.

        Raises:
            InputError: a factor that ordinary losses exceed, a negative count, no time at all.
        """
        if self.spike_factor != 0 and self.spike_factor <= 1:
            raise InputError(f"spike_factor={self.spike_factor} must be above 1, or 0 for never")
        if self.max_skipped_steps < 0:
            raise InputError(f"max_skipped_steps={self.max_skipped_steps} must not be negative")
        if self.timeout_minutes <= 0:
            raise InputError(f"timeout_minutes={self.timeout_minutes} must be positive")


# They say what to do where a run would end: they may change between two starts of it.
GUARD_FIELDS = tuple(f.name for f in dataclasses.fields(Guards))


def field_types(cls: type) -> dict[str, Any]:
    """Names and resolved types of a recipe class's fields, stages as dotted names (``stage1.max_steps``)."""
    flat: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            flat.update({f"{name}.{inner}": t for inner, t in field_types(typing.cast(type, kind)).items()})
        else:
            flat[name] = kind
    return flat


def field_help(cls: type) -> dict[str, str]:
    """The sentence behind every dotted field name of a recipe class."""
    texts: dict[str, str] = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.default):
            texts.update({f"{f.name}.{inner}": text for inner, text in field_help(type(f.default)).items()})
        else:
            texts[f.name] = f.metadata["help"]
    return texts


def override(recipe: R, changes: Mapping[str, Any]) -> R:
    """A copy of ``recipe`` with fields changed by dotted name; strings are parsed by the field's type.

    Raises:
        InputError: unknown field (with a suggestion) or a value that does not fit.
    """
    known = field_types(type(recipe))
    top: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name not in known:
            raise InputError(
                f"unknown recipe field '{name}'{suggest_field(name, known)}; `llava-genhancer recipes` lists all"
            )
        parsed = _parse(name, value, known[name])
        stage, _, inner = name.rpartition(".")
        if stage:
            nested.setdefault(stage, {})[inner] = parsed
        else:
            top[name] = parsed
    for stage, fields in nested.items():
        try:
            table = getattr(recipe, stage)
            top[stage] = dataclasses.replace(table, **_lowered(table, fields), **fields)
        except InputError as error:
            raise InputError(f"{stage}: {error}") from None
    return typing.cast(R, dataclasses.replace(typing.cast(Any, recipe), **top))


def _lowered(table: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stage config that ``changes`` leave alone, and that must not exceed a changed one."""
    lowered: dict[str, Any] = {}
    for f in dataclasses.fields(table):
        top = changes.get(f.metadata.get("at_most") or "")
        if top is not None and f.name not in changes:
            value = getattr(table, f.name)
            lowered[f.name] = (
                tuple(v for v in value if v <= top) if isinstance(value, tuple) else min(value, max(top, 0))
            )
    return lowered


def to_dict(recipe: Any) -> dict[str, Any]:
    """Plain JSON types, dotted names flattened, in field order."""
    flat = {}
    for name in field_types(type(recipe)):
        value: Any = recipe
        for part in name.split("."):
            value = getattr(value, part)
        flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def from_dict(values: Mapping[str, Any], cls: type[R]) -> R:
    """The inverse of :func:`to_dict`; unknown keys are errors, absent ones take the default."""
    return override(cls(), values)


def differences(ours: R, theirs: R, ignore: tuple[str, ...] = ()) -> list[str]:
    """One line per field that differs, ``name: theirs -> ours``."""
    a, b = to_dict(theirs), to_dict(ours)
    return [f"{k}: {json.dumps(a[k])} -> {json.dumps(b[k])}" for k in b if k not in ignore and a[k] != b[k]]


def suggest(name: str, known: typing.Iterable[str]) -> str:
    """``, did you mean 'NEAREST'?`` for an unknown name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean '{near[0]}'?" if near else ""


# What other trainers call our fields.
ALIASES = {
    "lr": ("learning_rate",), "max_lr": ("learning_rate",), "batch_size": ("global_batch_size",),
    "bs": ("global_batch_size",), "batch": ("global_batch_size",),
    "per_device_train_batch_size": ("per_device_batch_size",), "micro_batch_size": ("per_device_batch_size",),
    "gradient_accumulation_steps": ("global_batch_size",), "epochs": ("epochs", "max_steps"),
    "num_train_epochs": ("epochs", "max_steps"), "num_epochs": ("epochs", "max_steps"), "steps": ("max_steps",),
    "num_steps": ("max_steps",), "iterations": ("max_steps",), "warmup": ("warmup_steps", "warmup_ratio"),
    "lr_scheduler_type": ("lr_scheduler",), "scheduler": ("lr_scheduler",), "wd": ("weight_decay",),
    "grad_clip": ("max_grad_norm",), "clip_grad_norm": ("max_grad_norm",), "workers": ("num_workers",),
    "dataloader_num_workers": ("num_workers",), "mixed_precision": ("precision",), "bf16": ("precision",),
    "output": ("output_dir",), "out": ("output_dir",), "out_dir": ("output_dir",), "save_dir": ("output_dir",),
    "data_path": ("data",), "data_dir": ("data",), "dataset": ("data",), "train_data": ("data",),
    "model": ("backbone", "llm"),
    "model_name_or_path": ("backbone", "llm"), "vision_tower": ("tower", "backbone"), "clip": ("backbone",),
    "lora_r": ("lora_rank",), "rank": ("lora_rank",), "logging_steps": ("log_steps",), "random_seed": ("seed",),
    "resolution": ("image_size",), "optim": ("optimizer",), "version": ("conversation",),
}  # fmt: skip


def suggest_field(name: str, known: typing.Iterable[str]) -> str:
    """Like :func:`suggest` for dotted names; also finds what other trainers call them, in every stage."""
    names = list(known)
    name = name.lower().replace("-", "_") if name not in names else name
    stage, _, last = name.rpartition(".")
    for word in ALIASES.get(last, (last,)):
        found = [n for n in names if n.rpartition(".")[2].removeprefix("--") == word]
        within = [n for n in found if stage and n.startswith(f"{stage}.")]
        if near := within or found:
            return f", did you mean {' or '.join(repr(n) for n in near[:4])}?"
    return suggest(name, names)


def _parse(name: str, value: Any, kind: Any) -> Any:
    """``value`` (a string from the command line, or a JSON value) as the field's type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if origin in (types.UnionType, typing.Union):  # only `X | None` occurs
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _parse(name, value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        if value not in args:
            raise InputError(f"{name}={value}: choose one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [v for v in value.strip("()[]").split(",") if v.strip()]
        if not isinstance(value, list | tuple):
            raise InputError(f"{name}={value}: needs comma-separated values (in JSON, a list)")
        items = list(value)
        inner = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
        if len(items) != len(inner):
            raise InputError(f"{name}={','.join(map(str, items))}: needs {len(inner)} comma-separated values")
        return tuple(_parse(name, v.strip() if isinstance(v, str) else v, k) for v, k in zip(items, inner, strict=True))
    if kind is bool:
        words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if isinstance(value, bool) or str(value).lower() in words:
            return value if isinstance(value, bool) else words[str(value).lower()]
        raise InputError(f"{name}={value}: say true or false")
    try:
        if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
            raise ValueError
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        parsed = kind(value)
        if not (math.isfinite(parsed) if kind is float else kind is str or abs(parsed) < 2**63):
            raise ValueError
        return parsed
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name}={value}: needs a value of type {kind.__name__}") from None
