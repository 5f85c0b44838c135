"""Samples to tensors: images as the tower's processor wants them, conversations cut to length, padded or packed.

Legend: L tokens of a sample, T tokens of an image, n images of a sample, N images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava_genhancer.data.decode import BadImage, bounded, decode
from llava_genhancer.errors import InputError, out_of_memory
from llava_genhancer.llava.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Encoded, encode
from llava_genhancer.llava.samples import BadSample, Sample, Samples

MAX_IN_A_ROW = 50  # unusable samples after each other before a reader gives up


def load_image_processor(tower: str) -> Any:
    """A tower's own image processor, in its PIL form: what LLaVA trains with.

    Raises:
        InputError: the folder or hub id has none.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(tower, backend="pil")
    except (OSError, ValueError) as error:
        raise InputError(f"tower {tower} has no image processor: {str(error).splitlines()[0]}") from None


class ImageView:
    """What the tower sees of an image.

    Args:
        mode: "square" leaves resizing and centre crop to the processor; "pad" makes the image square beforehand, with
            the processor's mean colour around it.
    """

    def __init__(self, processor: Any, mode: Literal["square", "pad"]):
        self.processor, self.mode = processor, mode
        self.background = tuple(int(value * 255) for value in processor.image_mean)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return an RGB image as normalised float32 (3, H, W).

        Raises:
            BadImage: there is not enough memory for it.
        """
        try:
            image = bounded(image, pad=self.mode == "pad", crop=bool(getattr(self.processor, "do_center_crop", False)))
            if self.mode == "pad":
                image = pad_to_square(image, self.background)
            return torch.from_numpy(np.asarray(self.processor(image, return_tensors="np")["pixel_values"][0]))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise BadImage("not enough memory for it") from None


def pad_to_square(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """The image in the middle of the smallest square that holds it."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def cut(encoded: Encoded, tokens_per_image: int, max_length: int) -> Encoded:
    """The longest beginning that fits into ``max_length`` tokens, images whole.

    Raises:
        BadSample: nothing that is learned fits.
    """
    ids, labels = encoded
    if len(ids) + ids.count(IMAGE_TOKEN_INDEX) * (tokens_per_image - 1) > max_length:
        room = max_length
        for position, token in enumerate(ids):
            room -= tokens_per_image if token == IMAGE_TOKEN_INDEX else 1
            if room < 0:
                ids, labels = ids[:position], labels[:position]
                break
    if all(label == IGNORE_INDEX for label in labels):
        raise BadSample("no room for an answer")
    return Encoded(ids, labels)


class LlavaDataset(Dataset):
    """``{"input_ids", "labels": int64 (L,), "images": float32 (n, 3, H, W) or None, "key"}`` and what was skipped.

    With ``features`` set, images are what that says of them: (n, T, C).

    A sample that cannot be used gives way to the next one of its kind (with or without images), so that batches keep
    their modality; ``skipped`` lists (key, reason) of what gave way, ``truncated`` says whether the end is missing.

    Args:
        template: a conversation template's name.
        tokens_per_image: places that an image takes in the language model's input.
        max_length: longest sample in tokens, images included.
        rows: of the language model's embeddings, if known; a tokenizer may have more tokens.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        template: str,
        tokenizer: Any,
        view: ImageView,
        tokens_per_image: int,
        max_length: int,
        rows: int | None = None,
    ):
        self.samples, self.template, self.tokenizer, self.view = samples, template, tokenizer, view
        self.features: Callable[[str], Tensor] | None = None  # an image's name to what the tower says of it
        self.tokens_per_image, self.max_length, self.rows = tokens_per_image, max_length, rows

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """A usable sample, or ``{"problem"}``: an exception in a worker would arrive as a page of traceback."""
        skipped: list[tuple[str, str]] = []
        for candidate in self._candidates(position):
            key = f"#{int(self.samples.index[candidate, 2])}"
            try:
                sample = self.samples[candidate]
                key = sample.key
                return {**self._item(sample), "key": key, "skipped": skipped}
            except (BadSample, BadImage) as error:
                skipped.append((key, str(error)))
            except InputError as error:
                return {"problem": str(error)}
        last = "; ".join(f"{key}: {reason}" for key, reason in skipped[-3:])
        return {"problem": f"{len(skipped)} samples in a row cannot be used ({last}): fix the data"}

    def _candidates(self, position: int) -> Iterator[int]:
        """The sample, then those of its kind after it, from the first one on after the last."""
        yield position
        of_kind = np.flatnonzero((self.samples.lengths > 0) == (self.samples.lengths[position] > 0))
        at = int(np.searchsorted(of_kind, position))
        yield from np.take(of_kind, range(at + 1, at + min(MAX_IN_A_ROW, len(of_kind))), mode="wrap").tolist()

    def _item(self, sample: Sample) -> dict[str, Any]:
        whole = encode(sample.turns, self.template, self.tokenizer, images=bool(sample.images))
        ids, labels = cut(whole, self.tokens_per_image, self.max_length)
        if self.rows is not None and max(ids) >= self.rows:
            raise BadSample("a token that the language model has no embedding for")
        names = sample.images[: ids.count(IMAGE_TOKEN_INDEX)]
        see = self.features or (lambda name: self.view(decode(self.samples.image_path(name))))
        views = [see(name) for name in names]
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "images": torch.stack(views) if views else None,
            "truncated": len(ids) < len(whole.input_ids),
        }


class Collator:
    """Items to a batch with every image's place as long as the image: a row each, padded on the right, or one row.

    Args:
        pad_token_id: fills ``input_ids``; ``attention_mask`` tells, not the id.
        packing: all samples behind each other in one row, nothing padded.
    """

    def __init__(self, pad_token_id: int, tokens_per_image: int, *, packing: bool = False):
        self.pad_token_id, self.tokens_per_image, self.packing = pad_token_id, tokens_per_image, packing

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """``input_ids, labels, attention_mask`` (B, L), ``pixel_values`` (N, 3, H, W) or None, ``keys``, counts.

        ``input_ids`` hold IMAGE_TOKEN_INDEX at each of an image's T places; images come in the order of their places.
        Packed, B is 1 and ``lengths`` lists the samples' tokens; otherwise it is None.
        """
        for item in items:
            if "problem" in item:
                return {"problem": item["problem"]}
        widths = [1 + (item["input_ids"] == IMAGE_TOKEN_INDEX) * (self.tokens_per_image - 1) for item in items]
        ids = [item["input_ids"].repeat_interleave(width) for item, width in zip(items, widths, strict=True)]
        labels = [item["labels"].repeat_interleave(width) for item, width in zip(items, widths, strict=True)]
        images = [item["images"] for item in items if item["images"] is not None]
        lengths = [len(row) for row in ids]
        if self.packing:  # the end of a sample must not be asked for the beginning of the next
            labels = [torch.cat([row.new_full((1,), IGNORE_INDEX), row[1:]]) for row in labels]
            ids, labels = [torch.cat(ids)], [torch.cat(labels)]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "lengths": lengths if self.packing else None,
            "pixel_values": torch.cat(images) if images else None,
            "keys": [item["key"] for item in items],
            "skipped": [pair for item in items for pair in item["skipped"]],
            "truncated": sum(item["truncated"] for item in items),
            "tokens": sum(lengths),
        }
