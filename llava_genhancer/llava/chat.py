"""Questions to a LLaVA about one image, answered in the terminal."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from llava_genhancer import run
from llava_genhancer.convert.hf import load_whole
from llava_genhancer.data.decode import BadImage, bounded_for, decode
from llava_genhancer.errors import InputError
from llava_genhancer.files import expand
from llava_genhancer.llava.dataset import load_image_processor
from llava_genhancer.llava.hf import hf_state, write_hf_companions
from llava_genhancer.llava.model import load_tower, local
from llava_genhancer.llava.original import read_llava, refuse_lora


def chat(
    checkpoint: str | os.PathLike,
    image: str | os.PathLike,
    *,
    questions: Sequence[str] = (),
    max_new_tokens: int = 256,
    device: str | None = None,
    tower: str | None = None,
) -> list[str]:
    """Print the answers to ``questions``, or to what is typed until an empty line.

    Args:
        checkpoint: a folder of either form, HF or original.
        image: a picture's path; the conversation is about it from the first question on.
        tower: replaces the vision tower that an original checkpoint names.

    Returns:
        The answers.

    Raises:
        InputError: the checkpoint or the image cannot be used.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: one at least")
    try:
        picture = decode(expand(image))
    except BadImage as error:
        raise InputError(f"{image} cannot be used: {error}") from None
    model, processor = load_llava(checkpoint, device=device, tower=tower)
    messages: list[dict[str, Any]] = []
    answers = []
    for asked in questions or iter(_ask, ""):
        question = asked.encode(errors="surrogateescape").decode(errors="replace")  # bytes that are no UTF-8
        content: list[dict[str, str]] = [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": [{"type": "image"}, *content] if not messages else content})
        answers.append(answer(model, processor, picture, messages, max_new_tokens))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
        print(answers[-1], flush=True)
    return answers


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, OSError, RuntimeError):  # RuntimeError: stdin is closed
        return ""


@torch.inference_mode()
def answer(
    model: Any, processor: Any, image: Image.Image, messages: list[dict[str, Any]], max_new_tokens: int = 256
) -> str:
    """What the model says next in a conversation about ``image``, greedily."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=bounded_for(image, processor.image_processor), text=text, return_tensors="pt")
    inputs = inputs.to(model.device, dtype=model.dtype)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return str(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def load_llava(
    checkpoint: str | os.PathLike,
    *,
    device: str | None = None,
    tower: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """A checkpoint of either form as transformers' model and processor.

    Args:
        tower: a vision tower to see with instead of the checkpoint's own.
        dtype: of the weights; as they are stored if absent.

    Raises:
        InputError: not a LLaVA, weights missing, or a tower of another shape.
    """
    from transformers import AutoProcessor, GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

    folder = Path(expand(checkpoint))
    refuse_lora(folder)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{checkpoint} is not a checkpoint: no config.json there; give a local folder, for instance "
            "RUN/llava-finetune/hf"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = run.read_json(folder / "config.json")
        if isinstance(config, dict) and config.get("model_type") == "llava" and any(folder.glob("processor*.json")):
            model = load_whole(
                LlavaForConditionalGeneration, folder, str(checkpoint), dtype=dtype or "auto", use_safetensors=True
            )
            processor = AutoProcessor.from_pretrained(folder)
            if tower:
                put_tower(model, processor, tower)
        else:
            original = read_llava(folder, tower=tower)
            with tempfile.TemporaryDirectory() as small_files:
                rows = write_hf_companions(original, Path(small_files))
                model = load_whole(
                    LlavaForConditionalGeneration,
                    None,
                    str(checkpoint),
                    config=LlavaConfig.from_pretrained(small_files),
                    state_dict=hf_state(original, rows),
                    dtype=dtype or original.dtype,
                )
                model.generation_config = GenerationConfig.from_pretrained(small_files)
                processor = AutoProcessor.from_pretrained(small_files)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{checkpoint} cannot be loaded: {str(error).splitlines()[0]}") from None
    try:
        return model.to(device).eval(), processor
    except (RuntimeError, AssertionError) as error:  # torch's ways to say that there is no such device
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise InputError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None


def put_tower(model: Any, processor: Any, tower: str) -> None:
    """Let a LLaVA see with another vision tower of the same shape.

    Raises:
        InputError: the tower cannot be loaded, or has another shape.
    """
    other = load_tower(tower, model.dtype)
    try:
        model.model.vision_tower.load_state_dict(other.state_dict())
    except RuntimeError:
        raise InputError(f"tower {tower} has not the shape of the tower that this LLaVA was trained with") from None
    images = load_image_processor(local(tower))
    processor.image_processor.image_mean, processor.image_processor.image_std = images.image_mean, images.image_std
