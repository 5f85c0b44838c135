"""Discrete targets: token ids of a frozen VQ-GAN (paper section 3.2; Esser et al., arXiv 2012.09841).

Legend: B batch, H = W image side, f downscale factor, N = (H/f)^2 tokens, V codes, E width of a code.

Three layouts are read: diffusers' ``VQModel`` folder, the checkpoints of taming-transformers (and latent diffusion),
and LlamaGen's, whose lookup compares directions: codes and encodings have length one.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from llava_genhancer.convert.hf import check_finite
from llava_genhancer.enhance.pretrained import load_whole
from llava_genhancer.enhance.tokenizer import Target
from llava_genhancer.errors import InputError, reason
from llava_genhancer.toyworld.paths import resolve

CHECKPOINTS = (".ckpt", ".pt", ".pth", ".safetensors")
CODEBOOK = "quantize.embedding.weight"
# Training's leftovers beside the model: discriminator and perceptual loss, averaged copies, LlamaGen's usage counts.
LEFTOVERS = re.compile(r"loss\.|model_ema\.|quantize\.codebook_used$")


class VqTarget(Target):
    """A frozen VQ-GAN as target tokenizer.

    Args:
        vq: diffusers' ``VQModel`` in fp32.
        unit_codes: scale encodings and codes to length one before they are compared.
        dtype: arithmetic of encoder and decoder; the lookup itself stays in fp32.
    """

    def __init__(self, vq: Any, *, unit_codes: bool = False, dtype: torch.dtype = torch.float32):
        codebook = vq.quantize.embedding.weight.detach().float().clone()  # (V, E)
        # Not its own ``to``, which warns of modules to be kept in fp32 though there are none.
        super().__init__(nn.Module.to(vq, dtype))
        self.codebook = normalize(codebook, dim=-1) if unit_codes else codebook
        self.unit_codes = unit_codes
        self.codes = len(codebook)

    def to(self, device: torch.device) -> Self:
        """Move the frozen weights and the codebook."""
        self.codebook = self.codebook.to(device)
        return super().to(device)

    def token_side(self, image_size: int) -> int:
        """Tokens along a side of an image."""
        if image_size % self.downscale:
            raise InputError(f"image_size={image_size} is not a multiple of {self.downscale}, which this VQ-GAN needs")
        return image_size // self.downscale

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) to token ids (B, N), long, in [0, V), row by row."""
        pixels = images.float().div_(127.5).sub_(1).to(self.module.dtype)
        encoded = self.module.encode(pixels).latents.float().flatten(2).mT  # (B, N, E)
        if self.unit_codes:
            encoded = normalize(encoded, dim=-1)
        return torch.cdist(encoded.flatten(0, 1), self.codebook).argmin(-1).view(len(images), -1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Token ids (B, N) of a square image to uint8 images (B, 3, H, W)."""
        side = round(ids.shape[1] ** 0.5)
        codes = self.codebook[ids].mT.unflatten(2, (side, side)).to(self.module.dtype)  # (B, E, side, side)
        # A decoder with spatial norm looks at the codes too.
        spatial = codes if self.module.config.norm_type == "spatial" else None
        pixels = self.module.decoder(self.module.post_quant_conv(codes), spatial).float()
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_vq(name: str) -> None:
    """Refuse a path that cannot be a VQ-GAN before anything is loaded.

    Raises:
        InputError: a local path that is neither a diffusers folder nor a checkpoint file.
    """
    path = Path(resolve(name)).expanduser()
    if path.is_dir() and not any((path / sub / "config.json").is_file() for sub in ("", "vqvae")):
        raise InputError(f"vq {name}: no config.json there; give a diffusers VQModel folder or a checkpoint file")
    if not path.exists() and (name.startswith((".", "/", "~")) or path.suffix in CHECKPOINTS):
        raise InputError(
            f"vq {name} does not exist; give a diffusers VQModel folder, a hub id, or a downloaded checkpoint of "
            "taming-transformers (f16, 1024 or 16384 codes) or LlamaGen"
        )
    if path.is_file() and path.suffix not in CHECKPOINTS:
        raise InputError(f"vq {name}: a checkpoint file ends in {', '.join(CHECKPOINTS)}")


def load_vq_target(name: str, *, dtype: torch.dtype = torch.float32) -> VqTarget:
    """Load a VQ-GAN from a diffusers folder (or its ``vqvae/`` subfolder), a hub id, or a checkpoint file.

    Raises:
        InputError: nothing loadable there.
    """
    from diffusers import VQModel

    check_vq(name)
    path = Path(resolve(name)).expanduser()
    try:
        if path.is_file():
            vq, unit_codes = vq_from_state(_model_state(_read(path)))
        else:
            vq, unit_codes = load_whole(VQModel, name, "vqvae", torch_dtype=torch.float32), False
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, EOFError, SafetensorError) as error:
        raise InputError(
            f"vq {name} cannot be loaded ({reason(error)}): give a diffusers VQModel folder, a hub id this machine "
            "can reach, or a checkpoint of taming-transformers or LlamaGen"
        ) from None
    check_finite(vq, f"vq {name}")
    return VqTarget(vq, unit_codes=unit_codes, dtype=dtype)


# --- checkpoints of taming-transformers and LlamaGen -----------------------------------------------------------------


class _Absent:
    """Stands for whatever else a checkpoint holds: its trainer's callbacks, its configuration."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass


def _read(path: Path) -> Any:
    """What a checkpoint file holds. Nothing of a pickle is run: names unknown to torch become :class:`_Absent`."""
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        # taming's checkpoints name Lightning's callbacks, which torch alone would refuse with all the rest.
        whole = zipfile.is_zipfile(path)  # older files, written before torch 1.6, get no stand-ins
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if whole else []
        stand_ins: list[Any] = [(_Absent, name) for name in unknown]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, AttributeError, TypeError, AssertionError, LookupError) as error:
        raise ValueError(
            f"not a pickle of tensors: {reason(error)}; if you trust it, save its state_dict as .safetensors"
        ) from None


def _model_state(content: Any) -> dict[str, Tensor]:
    """The model's tensors by name, without what training left beside them."""
    for wrapper in ("ema", "model", "state_dict"):  # LlamaGen's two, Lightning's
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, not weights by name")
    return {n: v for n, v in content.items() if isinstance(v, Tensor) and not LEFTOVERS.match(n)}


def vq_from_state(state: dict[str, Tensor]) -> tuple[Any, bool]:
    """A ``VQModel`` with the weights of a taming or LlamaGen checkpoint; its size follows from their shapes.

    Returns:
        The model in fp32, and whether its codes have length one (LlamaGen's).

    Raises:
        ValueError: the names or shapes are not exactly those of such a model.
    """
    from diffusers import VQModel

    if CODEBOOK not in state or "quant_conv.weight" not in state:
        raise ValueError(f"no {CODEBOOK} or quant_conv.weight in it; Gumbel and multi-scale tokenizers are not read")
    levels = len({m[1] for n in state if (m := re.match(r"encoder\.(?:down|conv_blocks)\.(\d+)\.", n))})
    if not levels:
        raise ValueError("no encoder levels in it under the names of taming-transformers or LlamaGen")
    weights = {}
    for name, value in state.items():
        new = _diffusers_name(name, levels)
        if value.ndim == 4 and re.search(r"attentions\.\d+\.to_", new):
            value = value[:, :, 0, 0]  # a 1x1 convolution there, a linear layer here
        weights[new] = value.float()
    attended = [f"encoder.down_blocks.{i}.attentions.0.to_q.weight" in weights for i in range(levels)]
    vq = VQModel(
        block_out_channels=tuple(
            len(weights[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(levels)
        ),
        layers_per_block=sum(
            bool(re.fullmatch(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.bias", n)) for n in weights
        ),
        down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attended),
        up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attended)),
        mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in weights,
        latent_channels=weights["quant_conv.weight"].shape[1],
        vq_embed_dim=weights[CODEBOOK].shape[1],
        num_vq_embeddings=len(weights[CODEBOOK]),
    )
    ours = {n: v.shape for n, v in vq.state_dict().items()}
    wrong = sorted(n for n in ours.keys() | weights.keys() if n not in weights or ours.get(n) != weights[n].shape)
    if wrong:
        raise ValueError(f"{len(wrong)} weights do not fit a VQ-GAN, first: {wrong[0]}")
    vq.load_state_dict(weights)
    return vq, any(n.startswith("encoder.conv_blocks.") for n in state)


def _diffusers_name(name: str, levels: int) -> str:
    """A weight's name in ``VQModel``. taming counts decoder levels from the image up, LlamaGen from the codes down."""
    layer = {"nin_shortcut": "conv_shortcut", "norm_out": "conv_norm_out"}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    half, *path = name.split(".")
    match path:
        case ["down" | "conv_blocks" | "up" as kind, i, "block" | "res", j, module, leaf]:
            place = f"resnets.{j}.{layer.get(module, module)}.{leaf}"
        case ["down" | "conv_blocks" | "up" as kind, i, "attn", j, module, leaf]:
            place = f"attentions.{j}.{attention.get(module, module)}.{leaf}"
        case ["down" | "conv_blocks" | "up" as kind, i, "downsample" | "upsample" as module, "conv", leaf]:
            place = f"{module}rs.0.conv.{leaf}"
        case ["mid", "block_1" | "0" | "block_2" | "2" as which, module, leaf]:
            return f"{half}.mid_block.resnets.{0 if which in ('block_1', '0') else 1}.{module}.{leaf}"
        case ["mid", "attn_1" | "1", module, leaf]:
            return f"{half}.mid_block.attentions.0.{attention.get(module, module)}.{leaf}"
        case _:
            return ".".join([half, *(layer.get(part, part) for part in path)])
    level = levels - 1 - int(i) if kind == "up" else int(i)
    return f"{half}.{'down' if half == 'encoder' else 'up'}_blocks.{level}.{place}"
