"""What a finished training is good for elsewhere: the HF form and the original LLaVA's, the same weights in both."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_genhancer import run
from llava_genhancer.engine import read_trained, stage_result
from llava_genhancer.errors import InputError
from llava_genhancer.files import expand, staged_folder
from llava_genhancer.llava.checkpoint import Checkpoint, check_weights, raw_config
from llava_genhancer.llava.hf import write_hf
from llava_genhancer.llava.model import load_llm, read_config
from llava_genhancer.llava.original import ORIGINAL, read_llava, write_llava, write_llava_projector
from llava_genhancer.llava.recipes import LlavaRecipe
from llava_genhancer.trainer import FINAL_FILE

log = logging.getLogger(__name__)


def export_step(recipe: LlavaRecipe, step: str, folder: Path, output_dir: Path | None = None) -> list[Path]:
    """Write what a finished step is good for elsewhere; what is there already for the same weights is left alone.

    Args:
        folder: the step's folder.
        output_dir: where to; the step's folder if absent.

    Returns:
        ``llava/`` with ``mm_projector.bin`` after pretraining; ``hf/`` and ``llava/`` after finetuning (``llava/`` only
        for language models that the original code knows).
    """
    folder = Path(expand(folder))
    output_dir = Path(expand(output_dir or folder))
    result = stage_result(folder)
    if result is None:
        raise InputError(f"{folder} is not finished: run `llava-genhancer llava {step}` again")
    facts = {"step": step, "weights_sha256": result["weights_sha256"]}
    writers: dict[str, Callable[[Checkpoint, Path], None]] = {"llava": write_llava_projector}
    if step == "finetune":
        writers = {"hf": write_hf, "llava": write_llava}
    if read_config(recipe.llm, "llm").model_type not in ORIGINAL:
        log.warning("%s: the original LLaVA has no class for this language model, so no llava/ is written", recipe.llm)
        del writers["llava"]
    stale = [n for n in writers if run.complete_facts(output_dir / n, verify=False) != facts]
    if stale:
        checkpoint = collect(recipe, step, folder / FINAL_FILE)
        for name in stale:
            with _written(output_dir / name, facts) as staging:
                writers[name](checkpoint, staging)
    return [output_dir / name for name in writers]


def collect(recipe: LlavaRecipe, step: str, weights: Path) -> Checkpoint:
    """The checkpoint that ``weights``, a step's result, make of the recipe's language model; LoRA is merged in fp32."""
    trained = read_trained(weights)
    part = {
        prefix: {n.removeprefix(prefix): v for n, v in trained.items() if n.startswith(prefix)}
        for prefix in ("language_model.", "multi_modal_projector.")
    }
    language = part["language_model."]
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    if step == "finetune" and recipe.lora_rank:
        base = dict(
            load_llm(recipe.llm, dtype).named_parameters()
        )  # tied weights once, as a full finetuning names them
        language = merge_lora(base, language, recipe.lora_alpha / recipe.lora_rank)
    checkpoint = Checkpoint(
        llm_config=raw_config(recipe.llm),
        companions=recipe.llm,
        tower=recipe.tower,
        language=language,
        projector=part["multi_modal_projector."],
        conversation=recipe.step(step).conversation,
        image_mode=recipe.step(step).image_mode,
        vision_feature_layer=recipe.vision_feature_layer,
        dtype=dtype,
    )
    if step == "finetune":
        check_weights(checkpoint, weights)
    return checkpoint


def merge_lora(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """``W + scale * B A`` in fp32, rounded once to the base's dtype; all other weights as they are."""
    merged = dict(base)
    for name, a in adapters.items():
        layer, is_a, _ = name.partition(".lora_A.")
        if is_a:
            b = adapters[name.replace(".lora_A.", ".lora_B.")]
            weight = base[f"{layer}.weight"]
            merged[f"{layer}.weight"] = (weight.float() + scale * (b @ a)).to(weight.dtype)
    return merged


def import_llava(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    tower: str | None = None,
    conversation: str | None = None,
) -> Path:
    """A checkpoint of the original form (a released LLaVA-1.5, or one trained with its code) in the HF form.

    Args:
        tower: replaces the vision tower that the checkpoint names.
        conversation: the template its prompts had, see :func:`read_llava`.

    Raises:
        InputError: not such a checkpoint, or something else is in the way.
    """
    folder = Path(expand(output_dir))
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: choose another --output_dir")
    source = read_llava(checkpoint, tower=tower, conversation=conversation)
    with _written(folder, {"source": str(Path(expand(checkpoint)).resolve())}) as staging:
        write_hf(source, staging)
    return folder


@contextmanager
def _written(folder: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """A folder beside ``folder`` to write into; marked complete and moved there at the end."""
    with staged_folder(folder) as staging:
        yield staging
        run.mark_complete(staging, **facts)
