"""The tower that LLaVA and its forks see: everything they call on one, for CLIP, SigLIP and SigLIP2 folders of ours.

Legend: B images of 3 x H x W, N patches (N + 1 tokens where a CLS is kept), D features per token.

A tower that silently stayed random trains for days and says nothing, so loading ends with a comparison of every
parameter with the folder's files, whose hashes were checked before. This module needs torch >= 2.0, transformers >=
4.37 and safetensors, and runs on Python 3.10.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_genhancer.errors import InputError
from llava_genhancer.files import expand
from llava_genhancer.tower.export import FIRST_TRANSFORMERS, VISION_MODELS, read_marker, verify_tower
from llava_genhancer.tower.multiscale import multiscale, resize_tokens
from llava_genhancer.tower.processor import build_processor

# Layers whose hidden states LLaVA-NeXT joins for mm_vision_select_feature slice_m25811_f6_*.
_SLICED = (-2, -5, -8, -11, 6)


class VisionTower(nn.Module):
    """A frozen vision tower behind LLaVA's interface.

    Args:
        vision_tower: one of our tower folders.
        args: a fork's config or model arguments. Read are ``mm_vision_select_layer`` (default -2),
            ``mm_vision_select_feature`` ("patch" or "cls_patch", or LLaVA-NeXT's ``slicefour_`` or
            ``slice_m25811_f6_`` before either, which join several layers' features), what asks for a tower that learns
            (``unfreeze_mm_vision_tower``, ``mm_tunable_parts``), and S2's ``s2`` or ``use_s2``, ``dynamic_s2``,
            ``s2_scales``, ``s2_max_split_size``, ``s2_resize_output_to_scale_idx``.
        delay_load: read the config only; :meth:`load_model` loads the weights later.
        num_tokens: resample the patches to this square number (Cambrian's ``-interpN``).
        kwargs: what else a fork's builder passes; ``cache_dir`` and options that are off are ignored.

    Raises:
        InputError: not a folder of ours or not as it was exported, a model this transformers does not know, or
            arguments that do not fit it.
    """

    def __init__(
        self, vision_tower: str, args: Any, delay_load: bool = False, *, num_tokens: int | None = None, **kwargs: Any
    ):
        super().__init__()
        refuse_unknown("builds its tower", {k: v for k, v in kwargs.items() if k != "cache_dir"})
        self.vision_tower_name = expand(vision_tower)
        self.is_loaded = False
        self.model_type, self._config = read_config(self.vision_tower_name)
        self.select_layer: int = _given(args, "mm_vision_select_layer", -2)
        self.select_feature: str = _given(args, "mm_vision_select_feature", "patch")
        self.num_tokens = num_tokens
        self.dynamic_s2 = bool(_given(args, "dynamic_s2", False))
        self.scales: list[int] = []
        if self.dynamic_s2 or _given(args, "s2", False) or _given(args, "use_s2", False):
            default = ",".join(str(n * self.image_size) for n in (1, 2, 3))
            self.scales = sorted(int(side) for side in str(_given(args, "s2_scales", default)).split(","))
            self.max_split_size = int(_given(args, "s2_max_split_size", self.scales[0]))
            self.resize_output_to_scale_idx = int(_given(args, "s2_resize_output_to_scale_idx", 0))
        self._check_selection()

        learns = _given(args, "unfreeze_mm_vision_tower", False)
        if not delay_load or learns or "mm_vision_tower" in _given(args, "mm_tunable_parts", ""):
            self.load_model()

    def load_model(self, device_map: Any = None, **kwargs: Any) -> None:
        """Load and check the weights and the image processor; the second call does nothing.

        Args:
            device_map: as in transformers, except that the tower always goes to one device as a whole.
            kwargs: what else a fork passes; must be off (None, False or empty).

        Raises:
            InputError: the folder is not as it was exported, or an option is on that this class does not have.
        """
        refuse_unknown("loads its tower", kwargs)
        if self.is_loaded:
            return
        verify_tower(self.vision_tower_name)
        self.vision_tower = load_vision_model(self.vision_tower_name, self.model_type).requires_grad_(False)
        if device_map is not None:
            self.vision_tower.to(_whole_device(device_map))
        side = self.image_size
        if self.scales:
            side = self.scales[0] if self.dynamic_s2 else self.scales[-1]
        self.image_processor = build_processor(self.vision_tower_name, self.model_type, side)
        self.vision_tower.config.image_size = self.image_size  # NaFlex configs count patches instead
        self.is_loaded = True

    def forward(
        self, images: Tensor | list[Tensor], *args: Any, return_cls_token: bool = False, **kwargs: Any
    ) -> Tensor | list[Tensor]:
        """Features of normalised images, in the images' dtype.

        Args:
            images: (B, 3, H, W), or a list of (3, H, W).
            args: what else a fork passes by position; must be off (None, False or empty).
            return_cls_token: keep the CLS token whatever ``mm_vision_select_feature`` is (ross).
            kwargs: what else a fork passes by name; must be off.

        Returns:
            (B, N, D), or a list of (1, N, D); N + 1 tokens where the CLS is kept.

        Raises:
            InputError: images of another size, or an argument that this class cannot honour.
        """
        refuse_unknown("calls its tower", {**{f"argument {i}": a for i, a in enumerate(args, 2)}, **kwargs})
        if return_cls_token and (self.model_type != "clip" or self.scales or self.num_tokens):
            where = "on S2's or Cambrian's grid" if self.model_type == "clip" else f"in {self.model_type} models"
            raise InputError(f"the fork calls its tower with return_cls_token=True, but there is no CLS token {where}")
        if isinstance(images, list):
            return [self._encode(image.unsqueeze(0), return_cls_token) for image in images]
        return self._encode(images, return_cls_token)

    def _encode(self, images: Tensor, with_cls: bool = False) -> Tensor:
        if self.scales and not self.dynamic_s2:
            return multiscale(self._features, images, self.scales, self.max_split_size, self.resize_output_to_scale_idx)
        features = self._features(images, with_cls)
        return features if self.num_tokens is None else resize_tokens(features, self.num_tokens)

    def _features(self, images: Tensor, with_cls: bool = False) -> Tensor:
        pixels = images.to(device=self.device, dtype=self.dtype)
        inputs = naflex_inputs(pixels, self.config.patch_size) if self.model_type == "siglip2" else (pixels,)
        if self.model_type != "siglip2" and pixels.shape[-2:] != (self.image_size, self.image_size):
            height, width = pixels.shape[-2:]
            raise InputError(
                f"images of {height} x {width} pixels reached a tower of {self.image_size} x {self.image_size}: "
                "prepare them with the tower's own image_processor"
            )
        hidden = hidden_state(self.vision_tower, inputs, *self.layers)
        if self.model_type == "clip" and self.tokens == "patch" and not with_cls:
            hidden = hidden[:, 1:]  # SigLIP has no CLS to drop
        return hidden.to(images.dtype)

    @property
    def tokens(self) -> str:
        """The tokens that ``mm_vision_select_feature`` asks for: "patch" or "cls_patch"."""
        return self.select_feature.removeprefix("slicefour_").removeprefix("slice_m25811_f6_")

    @property
    def layers(self) -> tuple[int, ...]:
        """The hidden states whose features are joined, as indices into transformers' list."""
        if self.select_feature.startswith("slicefour_"):
            states = int(self._config.num_hidden_layers) + 1
            return tuple(range(states // 4 + self.select_layer, states, states // 4)) if states >= 4 else ()
        return _SLICED if self.select_feature.startswith("slice_m25811_f6_") else (self.select_layer,)

    def _check_selection(self) -> None:
        states = self._config.num_hidden_layers + 1
        if self.tokens not in ("patch", "cls_patch"):
            raise InputError(
                f"mm_vision_select_feature '{self.select_feature}' is unknown to llava_genhancer's class: choose "
                "patch, cls_patch, or LLaVA-NeXT's slicefour_ or slice_m25811_f6_ before either"
            )
        if self.select_feature.startswith("slicefour_") and (len(self.layers) != 4 or self.layers[0] < 0):
            raise InputError(
                f"mm_vision_select_feature {self.select_feature} joins 4 layers, but mm_vision_select_layer "
                f"{self.select_layer} finds {len(self.layers)} of {self.vision_tower_name}'s {states - 1}: choose patch"
            )
        if not all(-states <= layer < states for layer in self.layers):
            raise InputError(
                f"mm_vision_select_layer {', '.join(map(str, self.layers))} does not exist in "
                f"{self.vision_tower_name}: choose {-states} to {states - 1}"
            )
        if self.model_type == "clip" and self.tokens == "cls_patch" and (self.scales or self.num_tokens):
            raise InputError("mm_vision_select_feature cls_patch has no place on S2's or Cambrian's grid: choose patch")

    @property
    def config(self) -> Any:
        """The vision config, with ``image_size`` in pixels."""
        return self.vision_tower.config if self.is_loaded else self._config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vision_tower.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.vision_tower.parameters()).device

    @property
    def dummy_feature(self) -> Tensor:
        """Zeros (1, D) for batches without an image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        """D: the width of one token, times the number of joined layers, times the number of scales under S2."""
        return int(self.config.hidden_size) * len(self.layers) * max(len(self.scales), 1)

    @property
    def image_size(self) -> int:
        return int(self.config.image_size)

    @property
    def num_patches_per_side(self) -> int:
        if self.num_tokens is not None:
            return int(self.num_tokens**0.5)
        return self.image_size // int(self.config.patch_size)

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2


def read_config(folder: str) -> tuple[str, Any]:
    """A tower folder's model type and vision config, ``image_size`` in pixels.

    Raises:
        InputError: no folder of ours, or a model that this transformers does not know.
    """
    from transformers import AutoConfig, __version__

    model_type = str(read_marker(folder).get("model_type"))
    if model_type not in VISION_MODELS:
        raise InputError(f"{folder} holds a '{model_type}' model: known are {', '.join(VISION_MODELS)}")
    try:
        config = AutoConfig.from_pretrained(folder).vision_config
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{folder}: transformers {__version__} cannot read its config ({reason}); {model_type} models need "
            f"transformers {FIRST_TRANSFORMERS[model_type]} or newer"
        ) from None
    if model_type == "siglip2":
        config.image_size = int(config.num_patches**0.5) * config.patch_size
    return model_type, config


def load_vision_model(folder: str, model_type: str) -> Any:
    """The vision half of a tower folder as transformers' own class, every parameter compared with the files.

    Raises:
        InputError: a parameter is not what the files hold.
    """
    import transformers

    with _quietly():  # the text half is left aside on purpose, which transformers reports at length
        model = getattr(transformers, VISION_MODELS[model_type]).from_pretrained(folder, use_safetensors=True)
    check_loaded(model, folder)
    return model


@torch.no_grad()
def check_loaded(model: nn.Module, folder: str) -> None:
    """Every parameter of ``model`` must be what the folder's weight files hold, in the parameter's own dtype.

    Raises:
        InputError: one is missing from the files, or differs.
    """
    from safetensors import safe_open

    # transformers 5 gives the vision model's parameters the same names without the prefix.
    prefix = "vision_model."
    left = {n if n.startswith(prefix) else prefix + n: p for n, p in model.named_parameters()}
    for name in read_marker(folder)["weights"]:
        with safe_open(str(Path(folder) / name), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key in left and not _same(left.pop(key), file.get_tensor(key)):
                    raise InputError(f"{folder}: {key} did not load and stayed random: the tower cannot be used here")
    if left:
        raise InputError(f"{folder}: {min(left)} is not in its weight files and would stay random: export it again")


def _same(parameter: nn.Parameter, expected: Tensor) -> bool:
    if parameter.is_meta:
        return True  # built inside a larger checkpoint's loading, which fills it and reports what is missing
    if hasattr(parameter, "ds_id"):  # ZeRO-3 left a slice here
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return torch.equal(parameter.cpu(), expected.to(parameter.dtype))
    return torch.equal(parameter.cpu(), expected.to(parameter.dtype))


def check_names(folder: str) -> None:
    """Compare the names and shapes in a tower's weight files with what its config.json asks for; reads no weights.

    Raises:
        InputError: a parameter is in no file or has another shape there, so it would stay random in a fork.
    """
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModel

    read_config(folder)
    with _quietly(), torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    left = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in read_marker(folder)["weights"]:
        with safe_open(str(Path(folder) / name), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                shape = tuple(file.get_slice(key).get_shape())
                expected = left.pop(key, shape)
                if shape != expected:
                    raise InputError(
                        f"{Path(folder) / name}: {key} has shape {shape}, but config.json asks for {expected}: export "
                        "the tower again"
                    )
    if left:
        raise InputError(
            f"{folder}: {min(left)} is in none of its weight files and would stay random ({len(left)} missing): export "
            "the tower again"
        )


def refuse_unknown(does: str, given: dict[str, Any]) -> None:
    """Refuse what a fork passes beyond this class's interface, unless it is off: None, False or empty.

    Raises:
        InputError: with the first argument that is on.
    """
    for name, value in given.items():
        if value is None or value is False or (isinstance(value, (str, list, tuple, dict)) and not value):
            continue
        shown = value if isinstance(value, (str, int, float)) else type(value).__name__
        raise InputError(
            f"the fork {does} with {name}={shown}, "
            "which llava_genhancer's class does not have: switch it off, or use a CLIP tower that the fork loads itself"
        )


def hidden_state(model: Any, inputs: tuple[Tensor, ...], *wanted: int) -> Tensor:
    """A vision model's hidden states by their indices in transformers' list, before any final norm, joined in D.

    The last is taken from its layer: transformers 4.57 lists SigLIP's normalised output in its place.
    """
    layers = getattr(model, "vision_model", model).encoder.layers
    last: list[Tensor] = []
    handle = layers[-1].register_forward_hook(
        lambda _module, _args, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        states = model(*inputs, output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    found = [last[0] if layer in (-1, len(layers)) else states[layer] for layer in wanted]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def naflex_inputs(pixels: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Square images (B, 3, H, W) as a NaFlex model takes them: patches (B, N, 3 * patch**2), mask, grid shapes."""
    b, c, h, w = pixels.shape
    patches = pixels.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)
    patches = patches.flatten(3).flatten(1, 2)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
    return patches, mask, torch.tensor([[h // patch, w // patch]] * b, device=pixels.device)


def _whole_device(device_map: Any) -> torch.device:
    """One device for a tower: of a map by module names, the first; "auto" and its kin are the current GPU, if any."""
    if isinstance(device_map, dict):
        device_map = next(iter(device_map.values()))
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(device_map)


def _given(args: Any, name: str, default: Any) -> Any:
    """A fork's argument; most forks lack some, and leave others None."""
    value = getattr(args, name, None)
    return default if value is None else value


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
