"""The method's half of a recipe: from what a denoiser rebuilds what, and what of that cannot go together.

Nothing in this file imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llava_genhancer.errors import InputError
from llava_genhancer.fields import option

# Fields that only some denoisers read; under another one they must keep their default.
READ_BY = {
    "vae": ("flow", "unet"),
    "vae_posterior": ("flow", "unet"),
    "vq": ("masked",),
    "mask_ratio": ("masked",),
    "masked_readout": ("masked",),
    "masked_positions": ("masked",),
    "unmask_temperature": ("masked",),
    "denoiser_weights": ("flow", "unet"),
    "denoiser_dtype": ("flow", "unet"),
    "denoiser_single_layers": ("flow",),
    "denoiser_rope_axes": ("flow",),
    "vec_dim": ("flow",),
    "guidance": ("flow",),
    "t_sampling": ("flow",),
    "t_scale": ("flow",),
    "t_shift": ("flow",),
    "t_dtype": ("flow",),
    "objective": ("flow", "unet"),
    "contrast_temperature": ("flow", "unet"),
    "draws_per_image": ("flow", "unet"),
}


@dataclass(frozen=True)
class MethodName:
    """How reports, figures and model cards name what a recipe does.

    Attributes:
        key: the published method, for the paper's rows and the card's tags; None for a combination nobody published.
        title: the method's name with its source.
        loss: what the training loss measures.
        sampler: how pictures are made from the condition.
    """

    key: str | None
    title: str
    loss: str
    sampler: str


_FLOW, _UNMASKING, _DDIM = "the rectified-flow ODE", "iterative unmasking of VQ tokens", "DDIM sampling"
_VELOCITY = "velocity MSE"
GENHANCER = "arXiv 2503.19480"
METHOD_NAMES = {
    "genhancer": MethodName("genhancer", f"GenHancer, continuous denoiser ({GENHANCER})", _VELOCITY, _FLOW),
    "genhancer-discrete": MethodName(
        "genhancer-discrete",
        f"GenHancer, discrete denoiser ({GENHANCER})",
        "cross-entropy of masked tokens",
        _UNMASKING,
    ),
    "genhancer-flux": MethodName(
        "genhancer-flux", f"GenHancer with a pretrained FLUX denoiser ({GENHANCER}, Table 7)", _VELOCITY, _FLOW
    ),
    "diva": MethodName("diva", "DIVA (arXiv 2407.20171)", "MSE of the predicted noise or velocity", _DDIM),
    "dcr": MethodName("dcr", "DCR (arXiv 2603.04803)", "contrast between predictions, InfoNCE", _DDIM),
}
_MIXED = MethodName(
    None, "DCR's contrast (arXiv 2603.04803) with a FLUX-like denoiser, a combination of ours",
    METHOD_NAMES["dcr"].loss, _FLOW,
)  # fmt: skip
UNKNOWN = MethodName(None, "an unknown method", "as the run's recipe defines it", "the run's denoiser")


def method_name(values: Mapping[str, Any]) -> MethodName:
    """Returns the method of a recipe by its denoiser and objective; the recipe's name does not count.

    Args:
        values: a recipe's fields as :func:`~llava_genhancer.fields.to_dict` gives them; without a denoiser the method
            is ``UNKNOWN``.
    """
    denoiser, contrast = values.get("denoiser"), values.get("objective", "rebuild") == "contrast"
    if denoiser == "masked":
        return METHOD_NAMES["genhancer-discrete"]
    if denoiser == "unet":
        return METHOD_NAMES["dcr" if contrast else "diva"]
    if denoiser == "flow":
        light = values.get("denoiser_weights") is None
        return _MIXED if contrast else METHOD_NAMES["genhancer" if light else "genhancer-flux"]
    return UNKNOWN


def read_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that the recipe's denoiser reads, in order."""
    denoiser = values.get("denoiser")
    return {k: v for k, v in values.items() if denoiser is None or denoiser in READ_BY.get(k, (denoiser,))}


@dataclass(frozen=True, kw_only=True)
class Method:
    """Backbone, condition, target, denoiser, objective and LoRA: the first fields of a :class:`Recipe`."""

    name: str = option("custom", "name printed in reports and the model card")

    # The eye.
    backbone: str = option(
        "openai/clip-vit-large-patch14",
        "folder or hub id of a CLIPModel, SiglipModel or Siglip2Model; EVA-CLIP's folder in open_clip's format; a "
        "weight file or released tower that `convert` takes",
        path="name",
    )
    image_size: int | None = option(None, "training resolution in pixels; none = the backbone's own (ours)")
    condition: Literal["cls", "locals", "pooled"] = option(
        "cls",
        "what the denoiser is told: the global token; and local tokens; and the mean of the local tokens (Fig. 5)",
    )
    local_ratio: float = option(1.0, "share of the local tokens beside the global one, 0..1, under condition=locals")
    local_count: int | None = option(None, "number of local tokens instead of a share (DIVA: 76)")
    local_replacement: bool = option(
        False, "draw local tokens with replacement (DIVA) or without (ours; the paper is silent)"
    )
    condition_into: Literal["vec", "txt", "both"] = option(
        "both", "where the condition enters: vec modulates every block (global token), txt joins the attention"
    )
    projector: Literal["mlp", "linear"] = option("mlp", "heads from tokens to the condition; DIVA: linear")

    # What is rebuilt.
    denoiser: Literal["flow", "masked", "unet"] = option(
        "flow", "flow: FLUX-like, velocity of VAE latents; masked: Perceiver, VQ tokens; unet: Stable Diffusion's"
    )
    denoiser_weights: str | None = option(
        None,
        "pretrained denoiser: diffusers folder or hub id; none = random init, as in the paper's light ones",
        path="name",
    )
    denoiser_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "a pretrained denoiser's weights (ours: bfloat16 halves a frozen one's memory)"
    )
    target_size: int | None = option(None, "pixels that the target tokenizer sees; none = image_size")
    vae: str = option(
        "black-forest-labs/FLUX.1-dev",
        "AutoencoderKL: diffusers folder, hub id, or the single file ae.safetensors",
        path="name",
    )
    vq: str = option(
        "vqgan_imagenet_f16_16384.ckpt",
        "VQ-GAN: diffusers VQModel folder, or a checkpoint of taming or LlamaGen",
        path="name",
    )
    vae_posterior: Literal["sample", "mean"] = option("sample", "target latent: a draw from the posterior, or its mean")
    vae_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "arithmetic of the frozen target tokenizer; the reference: float32"
    )

    # The light denoiser's size.
    denoiser_layers: int = option(2, "flow: double-stream blocks (Table 5: 1, 2, 3, 4); masked: layers (2, 4, 6, 8)")
    denoiser_single_layers: int = option(4, "single-stream blocks (Table 5: 2, 4, 6, 8)")
    denoiser_heads: int = option(24, "attention heads")
    denoiser_head_dim: int = option(128, "channels per head; width = heads x head_dim")
    denoiser_rope_axes: tuple[int, int, int] = option((16, 56, 56), "rotary channels per axis, summing to head_dim")
    vec_dim: int = option(768, "width of the condition that modulates every block (AdaLN)")
    txt_dim: int = option(4096, "width of the condition's tokens in attention")
    guidance: float = option(4.0, "constant fed to the guidance embedding")

    # Rectified flow.
    t_sampling: Literal["logit_normal", "uniform"] = option("logit_normal", "density of t in training (Table 4)")
    t_scale: float = option(1.0, "s in t = sigmoid(s * eps) (Table 4: 0.1, 0.5, 1, 5, 10)")
    t_shift: float = option(0.0, "m in t = sigmoid(s * eps + m); 0 is the paper's, positive means noisier (ours)")
    t_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "precision of t before its sinusoid (ours; the reference's bfloat16 keeps about 630 values)"
    )

    # Masked tokens.
    mask_ratio: tuple[float, float] = option(
        (0.5, 0.9), "share of masked tokens, drawn uniformly from this range; equal ends fix it (Table 8)"
    )
    masked_readout: Literal["every", "last"] = option(
        "every",
        "layers in which masked positions look at the known ones (the paper is silent; ours: every, so that the "
        "condition speaks to them at each depth; last: as Perceiver IO reads out)",
    )
    masked_positions: Literal["learned", "sincos"] = option(
        "learned", "position embedding of the tokens (the paper is silent; ours: learned, the grid never changes)"
    )
    unmask_temperature: float = option(
        1.0,
        "randomness of the order in which pictures are unmasked (ours; MaskGIT's 4.5 is after variety, these after the "
        "image); training never reads it",
    )

    # Objective.
    objective: Literal["rebuild", "contrast"] = option(
        "rebuild", "rebuild: predict the target; contrast: DCR's InfoNCE between predictions under different conditions"
    )
    contrast_temperature: float = option(0.1, "temperature of the contrast")
    draws_per_image: int = option(1, "(noise, t) draws per image in one step (DIVA: 2)")

    # LoRA on the backbone.
    lora_rank: int = option(16, "rank; 0 fine-tunes every weight of the vision tower (Fig. 8)")
    lora_alpha: float = option(16.0, "LoRA scale numerator: update = alpha / rank * B A")
    lora_dropout: float = option(0.1, "dropout in front of A")
    lora_bias: Literal["none", "lora_only"] = option("lora_only", "lora_only also trains the adapted layers' biases")
    lora_scope: Literal["vision", "all"] = option(
        "vision", "towers that carry LoRA (ours: vision; the reference: all, though no loss reaches the text tower)"
    )

    def unread(self) -> list[str]:
        """Names of the fields that this denoiser does not read."""
        return [name for name, readers in READ_BY.items() if self.denoiser not in readers]

    def check_method(self) -> None:
        """Refuse what has no meaning together.

        Raises:
            InputError: one line that names the fields.
        """
        axes = self.denoiser_rope_axes
        if self.denoiser == "flow" and (sum(axes) != self.denoiser_head_dim or any(a % 2 for a in axes)):
            raise InputError(
                f"denoiser_rope_axes={axes} must be even and sum to denoiser_head_dim={self.denoiser_head_dim}"
            )
        if self.denoiser_layers + self.denoiser_single_layers < 1:
            raise InputError("denoiser_layers and denoiser_single_layers are both 0: the denoiser needs a block")
        self._check_condition()
        self._check_masked()
        if self.denoiser == "unet" and self.denoiser_weights is None:
            raise InputError("denoiser=unet needs denoiser_weights: a Stable Diffusion folder or hub id")
        if self.denoiser_weights is None and self.denoiser_dtype != "float32":
            raise InputError(f"denoiser_dtype={self.denoiser_dtype} needs denoiser_weights: a new denoiser is float32")
        if self.objective == "contrast" and self.draws_per_image > 1:
            raise InputError("objective=contrast takes one draw per image: draws_per_image=1")
        for name in self.unread():
            if getattr(self, name) != getattr(Method, name):
                readers = READ_BY[name]
                raise InputError(
                    f"{name}={getattr(self, name)} has no meaning with denoiser={self.denoiser}: only "
                    f"{' and '.join(readers)} {'read' if len(readers) > 1 else 'reads'} it"
                )

    def _check_masked(self) -> None:
        if self.denoiser != "masked":
            return
        width = self.denoiser_heads * self.denoiser_head_dim
        if self.denoiser_layers < 1:
            raise InputError("denoiser_layers=0: denoiser=masked needs a layer")
        if self.txt_dim != width:
            raise InputError(
                f"txt_dim={self.txt_dim} must be denoiser_heads x denoiser_head_dim = {width} with denoiser=masked: "
                "condition and tokens are keys of one attention"
            )
        if self.masked_positions == "sincos" and width % 4:
            raise InputError(f"masked_positions=sincos needs a width that 4 divides, not {width}")

    def _check_condition(self) -> None:
        if self.local_count is not None and self.local_ratio != 1.0:
            raise InputError(
                f"local_count={self.local_count} and local_ratio={self.local_ratio} both say how many: set one "
                "(--local_count none frees the share)"
            )
        if not 0 <= self.local_ratio <= 1:
            raise InputError(f"local_ratio={self.local_ratio} must lie between 0 and 1")
        local = (self.local_ratio, self.local_count, self.local_replacement)
        if self.condition != "locals" and local != (1.0, None, False):
            raise InputError(f"local_ratio, local_count, local_replacement need condition=locals, not {self.condition}")
        if self.condition_into == "vec" and self.condition != "cls":
            raise InputError("condition_into=vec carries the global token alone: local tokens need txt or both")
        if self.denoiser != "flow" and self.condition_into != "txt":
            raise InputError(f"denoiser={self.denoiser} takes its condition as tokens: condition_into=txt")
