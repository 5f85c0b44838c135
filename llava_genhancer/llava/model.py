"""LLaVA: a frozen vision tower, a two-layer projector, a causal language model; what learns in which step.

Legend: B batch, L tokens with images expanded, V vocabulary, N images, P patches of an image, T tokens of the
tower, C its width, D the language model's.

The three parts are transformers' own classes, held side by side: the vocabulary is not widened in training, and their
names are those of ``LlavaForConditionalGeneration``'s checkpoints. Image positions carry ``IMAGE_TOKEN_INDEX`` in
``input_ids``; their embeddings are the projected patches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaConfig

from llava_genhancer.convert.hf import load_whole
from llava_genhancer.convert.open_clip import is_open_clip
from llava_genhancer.convert.released import tower_folder
from llava_genhancer.errors import InputError
from llava_genhancer.files import expand
from llava_genhancer.llava.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_genhancer.llava.packing import packed, packed_attention
from llava_genhancer.llava.recipes import LlavaRecipe
from llava_genhancer.tower.export import is_tower, verify_tower
from llava_genhancer.toyworld.paths import resolve

LLM_FAMILY = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# Of a tower's tokens the language model sees the patches: CLIP puts a CLS in front of them, SigLIP has none.
SELECT_STRATEGY = {"clip": "default", "siglip": "full"}

# What a whole CLIP or SigLIP has beside its vision half.
NOT_VISION = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


class Llava(nn.Module):
    """``forward`` returns the loss; ``generate`` answers."""

    def __init__(self, config: LlavaConfig, vision_tower: nn.Module, projector: nn.Module, language_model: nn.Module):
        super().__init__()
        self.config = config
        self.vision_tower: Any = vision_tower
        self.multi_modal_projector: Any = projector
        self.language_model: Any = language_model

    def train(self, mode: bool = True) -> Llava:
        """Training mode; the frozen tower stays in evaluation mode."""
        super().train(mode)
        if self.vision_tower is not None:
            self.vision_tower.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Llava:
        """Move and cast weights, but never round a buffer.

        DeepSpeed casts the whole module to bf16, and RoPE's frequencies in bf16 are radians off at position 2048.
        """
        exact = [(m, n, b) for m in self.modules() for n, b in m._buffers.items() if b is not None]
        super()._apply(fn, recurse)
        for module, name, before in exact:
            after = module._buffers[name]
            if after is not None and after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        return self

    @torch.no_grad()
    def tower_features(self, pixel_values: Tensor) -> Tensor:
        """What the frozen tower says of images (N, 3, H, W): the selected hidden state (N, T, C), CLS and all."""
        seen = self.vision_tower(pixel_values.to(self.vision_tower.dtype), output_hidden_states=True)
        return seen.hidden_states[self.config.vision_feature_layer]

    @property
    def features_shape(self) -> tuple[int, int]:
        """T and C of :meth:`tower_features`."""
        skipped = self.config.vision_feature_select_strategy == "default"
        return self.config.image_seq_length + skipped, self.config.vision_config.hidden_size

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Images (N, 3, H, W), or where ``vision_tower`` is None what it said of them (N, T, C), as (N, P, D)."""
        patches = pixel_values if self.vision_tower is None else self.tower_features(pixel_values)
        if self.config.vision_feature_select_strategy == "default":
            patches = patches[:, 1:]
        return self.multi_modal_projector(patches.to(self.multi_modal_projector.linear_1.weight.dtype))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Token embeddings (B, L, D) with the images' features in their places.

        A batch without images runs an empty image and adds nothing of it: ranks must do the same work, or DDP and
        ZeRO-3 wait for each other for ever.
        """
        is_image = input_ids == IMAGE_TOKEN_INDEX
        embeddings = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if pixel_values is None:
            side = self.config.vision_config.image_size
            shape = (3, side, side) if self.vision_tower is not None else self.features_shape
            empty = torch.zeros(1, *shape, device=input_ids.device)
            return embeddings + 0 * self.image_features(empty).sum().to(embeddings.dtype)
        features = self.image_features(pixel_values).to(embeddings.dtype)
        return embeddings.masked_scatter(is_image[..., None], features)

    def logits(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Next-token logits (B, L, V) of right-padded samples; causal attention never looks at what pads them."""
        return self.language_model(inputs_embeds=self.embed(input_ids, pixel_values), use_cache=False).logits

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None,
        items: Tensor | None = None,
        lengths: list[int] | None = None,
    ) -> Tensor:
        """The loss of next-token prediction where ``labels`` (B, L) are not ``IGNORE_INDEX``, a scalar.

        Args:
            items: what the summed loss is divided by; the number of labels if absent.
            lengths: tokens of the samples that are packed into the one row; None if each has a row of its own.
        """
        embeddings = self.embed(input_ids, pixel_values)
        apart = {} if lengths is None else packed(lengths, input_ids.device)
        decoder = self.language_model.get_decoder()
        hidden = decoder(inputs_embeds=embeddings, use_cache=False, **apart).last_hidden_state
        targets = labels[:, 1:]
        learned = targets != IGNORE_INDEX
        # The head is the widest layer and most positions teach nothing.
        logits = self.language_model.get_output_embeddings()(hidden[:, :-1][learned])
        total = F.cross_entropy(logits.float(), targets[learned], reduction="sum")
        return total / (learned.sum().clamp(min=1) if items is None else items)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, pixel_values: Tensor | None, **kwargs: Any) -> Tensor:
        """New tokens (B, ...) after the prompt ``input_ids``; ``kwargs`` are transformers' own."""
        embeddings = self.embed(input_ids, pixel_values)
        mask = torch.ones_like(input_ids)
        return self.language_model.generate(inputs_embeds=embeddings, attention_mask=mask, **kwargs)


# --- building -----------------------------------------------------------------------------------------------------


def build_llava(recipe: LlavaRecipe, step: str, *, bf16_everywhere: bool = False) -> Llava:
    """The model ready to train ``step``, on the CPU: what learns has ``requires_grad`` and, alone, fp32 masters.

    Args:
        bf16_everywhere: the training engine keeps the masters itself (DeepSpeed): everything is bf16.

    Raises:
        InputError: a part cannot be found, is of the wrong kind, or lacks weights.
    """
    frozen = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    trained = torch.bfloat16 if bf16_everywhere else torch.float32
    llm_learns = step == "finetune" and recipe.lora_rank == 0
    config = llava_config(recipe)
    tower = load_tower(recipe.tower, frozen)
    attention = choose_attention(recipe)
    if recipe.step(step).packing:
        attention = packed_attention(attention, config.text_config, recipe.max_length)
    llm = load_llm(recipe.llm, trained if llm_learns else frozen, attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        projector = build_projector(config).to(trained)
        if step == "finetune" and recipe.lora_rank:
            add_lora(llm, recipe)
    model = Llava(config, tower, projector, llm).requires_grad_(False)
    learns = trainable_names(model, recipe, step)
    for name, parameter in model.named_parameters():
        # OpenAI's 336 px checkpoint holds transposed, non-contiguous projections, which DeepSpeed refuses.
        parameter.data = parameter.data.contiguous()
        if name in learns:
            parameter.data = parameter.data.to(trained)
            parameter.requires_grad_(True)
    return model


def trainable_names(model: Llava, recipe: LlavaRecipe, step: str) -> set[str]:
    """Exactly the parameters that learn in a step: the projector, and in finetuning the language model or its LoRA."""
    names = {f"multi_modal_projector.{n}" for n, _ in model.multi_modal_projector.named_parameters()}
    if step == "finetune":
        llm = {f"language_model.{n}" for n, _ in model.language_model.named_parameters()}
        names |= {n for n in llm if ".lora_" in n} if recipe.lora_rank else llm
    return names


def build_projector(config: LlavaConfig) -> nn.Module:
    """LLaVA's mlp2x_gelu with PyTorch's own random initialisation."""
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    return LlavaMultiModalProjector(config)


def add_lora(llm: nn.Module, recipe: LlavaRecipe) -> None:
    """Adapters on every linear layer of the language model but its head, LLaVA's rule."""
    from peft import LoraConfig, inject_adapter_in_model

    head = llm.get_output_embeddings()  # type: ignore[operator]
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.lora_dropout,
        bias="none",
        target_modules=[n for n, m in llm.named_modules() if isinstance(m, nn.Linear) and m is not head],
    )
    inject_adapter_in_model(config, llm)


def llava_config(recipe: LlavaRecipe) -> LlavaConfig:
    """The configuration of tower, projector and language model, no weights read.

    Raises:
        InputError: a part cannot be found or is of the wrong kind.
    """
    llm, tower = read_config(recipe.llm, "llm"), read_config(recipe.tower, "tower")
    if llm.model_type not in LLM_FAMILY:
        raise InputError(f"llm {recipe.llm} is a '{llm.model_type}' model: needed is one of {', '.join(LLM_FAMILY)}")
    kind = tower.model_type.removesuffix("_vision_model")
    if kind not in SELECT_STRATEGY:
        raise InputError(f"tower {recipe.tower} is a '{tower.model_type}' model: needed is a CLIP or SigLIP folder")
    vision = getattr(tower, "vision_config", tower)
    if not -vision.num_hidden_layers - 1 <= recipe.vision_feature_layer <= vision.num_hidden_layers:
        raise InputError(
            f"vision_feature_layer={recipe.vision_feature_layer}: the tower has {vision.num_hidden_layers} layers"
        )
    return LlavaConfig(
        vision_config=vision,
        text_config=llm,
        vision_feature_layer=recipe.vision_feature_layer,
        vision_feature_select_strategy=SELECT_STRATEGY[kind],
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
    )


def read_config(name: str, what: str) -> Any:
    """The configuration of a folder or hub id.

    Raises:
        InputError: nothing there that transformers can read.
    """
    from transformers import AutoConfig

    if is_open_clip(local(name)):
        raise InputError(
            f"{what} {name} is in open_clip's format, which LLaVA cannot use: `llava-genhancer convert` makes "
            "transformers' of it, unless it is EVA-CLIP's kind"
        )
    try:
        return AutoConfig.from_pretrained(local(name))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{what} {name} cannot be loaded ({str(error).splitlines()[0]}): give a local folder, or a hub id this "
            "machine can reach (HF_TOKEN for gated ones)"
        ) from None


def local(name: str) -> str:
    """A folder's path, or a hub id unchanged; others' released towers and weight files as :func:`tower_folder`."""
    name = tower_folder(resolve(name))
    path = Path(expand(name))
    return str(path) if path.exists() or name.startswith(("~", "/", ".")) else name


def choose_attention(recipe: LlavaRecipe) -> str:
    """transformers' name of the attention to use."""
    if recipe.attention != "auto":
        return recipe.attention
    from transformers.utils import is_flash_attn_2_available

    usable = recipe.precision == "bf16" and torch.cuda.is_available() and is_flash_attn_2_available()
    return "flash_attention_2" if usable else "sdpa"


def load_llm(name: str, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """A causal language model, every weight accounted for.

    Raises:
        InputError: it cannot be loaded, or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    return load_whole(AutoModelForCausalLM, local(name), f"llm {name}", dtype=dtype, attn_implementation=attention)


def load_tower(name: str, dtype: torch.dtype) -> nn.Module:
    """The vision half of a CLIP or SigLIP folder, checked against the folder's hashes where it lists them.

    Raises:
        InputError: it cannot be loaded, lacks weights, or was changed since it was exported.
    """
    import transformers

    kind = read_config(name, "tower").model_type.removesuffix("_vision_model")
    if is_tower(local(name)):
        verify_tower(local(name))
    cls = {"clip": transformers.CLIPVisionModel, "siglip": transformers.SiglipVisionModel}[kind]
    return load_whole(cls, local(name), f"tower {name}", aside=NOT_VISION, dtype=dtype).eval()
