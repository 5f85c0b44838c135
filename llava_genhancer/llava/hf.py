"""The form of LlavaForConditionalGeneration: weights, tokenizer, processor, chat template.

Weights and tokenizer load in transformers 4.37.2 and later, 5.x included. The processor needs 4.50 or later: only
LlavaImageProcessor, which is not in earlier ones, pads images to a square as LLaVA-1.5's finetuning does. The earlier
ones would have to take CLIPImageProcessor, which would crop or distort them in silence.

The vocabulary gets one row for ``<image>`` and is padded to a multiple of 64; no generation ever emits the new rows.
Keys carry the ``vision_model.`` that transformers 5 would leave out and old readers need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llava_genhancer import run
from llava_genhancer.llava.checkpoint import Checkpoint, generation_config, language_config, vision_config, write_shards
from llava_genhancer.llava.conversation import chat_template
from llava_genhancer.llava.dataset import load_image_processor
from llava_genhancer.llava.model import SELECT_STRATEGY, load_tower, local
from llava_genhancer.llava.tokenizer import save_hf_tokenizer


def write_hf(checkpoint: Checkpoint, folder: Path) -> None:
    """The whole folder."""
    rows = write_hf_companions(checkpoint, folder)
    write_shards(hf_state(checkpoint, rows), folder)


def write_hf_companions(checkpoint: Checkpoint, folder: Path) -> int:
    """Everything but the weights: configuration, tokenizer, processor, chat template, generation config.

    Returns:
        Rows of the widened vocabulary.
    """
    vision = vision_config(checkpoint.tower)
    strategy = SELECT_STRATEGY[vision["model_type"].removesuffix("_vision_model")]
    image_id = save_hf_tokenizer(checkpoint.companions, folder)
    words = checkpoint.llm_config["vocab_size"]
    rows = max(words, -(-(image_id + 1) // 64) * 64)
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    model_type = checkpoint.llm_config["model_type"]
    tied = bool(language_config(checkpoint.llm_config, checkpoint.companions).tie_word_embeddings)
    # vLLM and others choose the language model's class by its architectures.
    text = {**checkpoint.llm_config, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]}
    run.write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": image_id,
            "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": checkpoint.vision_feature_layer,
            "vision_feature_select_strategy": strategy,
            "ignore_index": -100,
            "tie_word_embeddings": tied,
            "torch_dtype": dtype,
            "text_config": {**text, "vocab_size": rows, "tie_word_embeddings": tied, "torch_dtype": dtype},
            "vision_config": vision,
            "vocab_size": rows,
        },
    )
    never = sorted({image_id, *range(words, rows)})
    run.write_json(folder / "generation_config.json", {**generation_config(checkpoint), "suppress_tokens": never})
    write_processor(checkpoint, folder, vision, strategy)
    return rows


def hf_state(checkpoint: Checkpoint, rows: int) -> dict[str, Tensor]:
    """All weights by the names that every transformers with a LLaVA reads; ``rows`` is the widened vocabulary."""
    tower = load_tower(checkpoint.tower, checkpoint.dtype).state_dict()
    state = {f"vision_tower.vision_model.{n.removeprefix('vision_model.')}": v for n, v in tower.items()}
    state |= {f"multi_modal_projector.{n}": v.to(checkpoint.dtype) for n, v in checkpoint.projector.items()}
    for name, value in checkpoint.language.items():
        value = value.to(checkpoint.dtype)
        if name in ("model.embed_tokens.weight", "lm_head.weight") and value.shape[0] < rows:
            value = torch.cat([value, value.new_zeros(rows - value.shape[0], value.shape[1])])
        state[f"language_model.{name}"] = value
    return state


def write_processor(checkpoint: Checkpoint, folder: Path, vision: dict[str, Any], strategy: str) -> None:
    """Image processor (the tower's own, padding to a square if training did), processor and chat template."""
    side = {"height": vision["image_size"], "width": vision["image_size"]}
    run.write_json(
        folder / "preprocessor_config.json",
        {
            # SigLIP's processor has neither; LLaVA's would crop to 224 by itself.
            "do_center_crop": False,
            "crop_size": side,
            **load_image_processor(local(checkpoint.tower)).to_dict(),
            "image_processor_type": "LlavaImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_pad": checkpoint.image_mode == "pad",
        },
    )
    template = chat_template(checkpoint.conversation)
    run.write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": vision["patch_size"],
            "vision_feature_select_strategy": strategy,
            "num_additional_image_tokens": 1 if strategy == "default" else 0,
        },
    )
    run.write_text(folder / "chat_template.jinja", template)
    run.write_json(folder / "chat_template.json", {"chat_template": template})
