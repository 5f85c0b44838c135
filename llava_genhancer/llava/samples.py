"""LLaVA's JSON: scanned once, checked entry by entry, and read sample by sample from the file itself afterwards.

Only places and lengths stay in memory: a file of a gigabyte is not to be held once per rank, nor copied by workers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from array import array
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llava_genhancer.data.entries import read_entries
from llava_genhancer.data.loader import SkipReport
from llava_genhancer.errors import InputError, plain
from llava_genhancer.llava.conversation import IMAGE, Turn

log = logging.getLogger(__name__)
ROLES = ("human", "gpt")
# A path that is absolute (on any system), climbs, or is none. Links inside the folder are the user's own affair.
_OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\0")


class BadSample(Exception):
    """The reason why a sample is left out, in a few words (reports count by it)."""


class Sample(NamedTuple):
    """A conversation about images (paths below the image folder), or about none.

    ``words`` counts the whole conversation as LLaVA's sampler does.
    """

    key: str
    turns: list[Turn]
    images: list[str]
    words: int


@dataclass(frozen=True)
class Samples:
    """The usable samples of a JSON, read from the file when asked for.

    Attributes:
        index: int64 (N, 3): first byte, bytes, number of the entry.
        lengths: int64 (N,): words, negative where there is no image.
        fingerprint: hash of the file.
        report: what was left out, and why.
    """

    path: str
    image_folder: str
    index: np.ndarray
    lengths: np.ndarray
    fingerprint: str
    report: SkipReport

    def __len__(self) -> int:
        """Number of usable samples."""
        return len(self.index)

    def __getitem__(self, position: int) -> Sample:
        """One sample.

        Raises:
            BadSample: the file is not the one that was scanned.
        """
        start, size, number = self.index[position].tolist()
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                entry = json.loads(file.read(size))
        except (OSError, ValueError, RecursionError):
            raise BadSample("the JSON changed, or cannot be read") from None
        return read_sample(entry, number)

    def image_path(self, name: str) -> str:
        """Where a sample's image lies."""
        return os.path.join(self.image_folder, name)


def summary(report: SkipReport) -> str:
    """How many were skipped, and why; "" if none."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.by_reason.items())
    return f"{report.skipped} of {report.read} cannot be used: {reasons}" if reasons else ""


def read_samples(path: str | os.PathLike, image_folder: str | os.PathLike | None = None) -> Samples:
    """Scan LLaVA's JSON: ``[{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}, ...]}, ...]``.

    Entries that cannot be trained on are left out, counted and logged. Whether images exist shows when they are read.

    Raises:
        InputError: no such file or folder, not JSON, nothing usable in it, or images but no folder for them.
    """
    path = os.path.abspath(os.path.expanduser(path))
    folder = "" if image_folder is None else os.path.abspath(os.path.expanduser(image_folder))
    if folder and not os.path.isdir(folder):
        raise InputError(f"image_folder {image_folder} does not exist")
    report, digest = SkipReport(), hashlib.blake2b(digest_size=16)
    index, lengths = array("q"), array("q")
    unshown = 0
    for number, (entry, start, size) in enumerate(read_entries(path, digest)):
        report.read += 1
        try:
            sample = read_sample(entry, number)
        except BadSample as error:
            report.add(_key(entry, number), str(error))
            continue
        unshown += not sample.images and bool(entry.get("image"))
        index.extend((start, size, number))
        lengths.append(sample.words if sample.images else -sample.words)
    if not index:
        raise InputError(f"data {path} has no usable sample: {summary(report) or 'it is empty'}")
    if max(lengths) > 0 and not folder:
        raise InputError(f"data {path} names images: give image_folder, the root of their paths")
    if report.skipped:
        keys = plain(", ".join(key for key, _ in report.keys[:3]))
        log.warning("data %s: %s (%s, ...)", path, summary(report), keys)
    if unshown:
        log.warning("data %s: %d with an image that no <image> shows are read as text", path, unshown)
    columns = np.frombuffer(index, dtype=np.int64).reshape(-1, 3)
    return Samples(path, folder, columns, np.frombuffer(lengths, dtype=np.int64), digest.hexdigest(), report)


def read_sample(entry: Any, number: int) -> Sample:
    """An entry of the JSON as LLaVA reads it; ``number`` names it if it has no id.

    Of one image, the turn that shows it is rewritten to begin with it; several stay where they are. Without an image
    ``<image>`` is a word like any other, and an image that is never shown is ignored.

    Raises:
        BadSample: nothing can be learned from it, or its image's path leaves the image folder.
    """
    if not isinstance(entry, dict):
        raise BadSample("not an object")
    images = entry.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise BadSample("odd image name")
    if any(_OUTSIDE.search(name) for name in images):
        raise BadSample("image outside the image folder")
    texts, words = _texts(entry.get("conversations"))
    shown = [text.count(IMAGE) for text in texts] if images else []
    if any(shown):
        if any(shown[1::2]):
            raise BadSample("image in an answer")
        if len(images) == 1:
            texts = [_image_first(text) if IMAGE in text else text for text in texts]
            shown = [min(count, 1) for count in shown]
        if sum(shown) != len(images):
            raise BadSample("not as many <image> as images")
    else:
        images = []
    turns = [Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    return Sample(_key(entry, number), turns, images, words)


def _texts(conversations: Any) -> tuple[list[str], int]:
    """Questions and answers in turn, and the words of all turns.

    An answer in front of the first question is dropped, but its words count, as LLaVA does it.
    """
    if not isinstance(conversations, list) or not conversations:
        raise BadSample("no conversation")
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in conversations):
        raise BadSample("no text in a turn")
    words = sum(len(turn["value"].split()) for turn in conversations)
    if conversations[0].get("from") == ROLES[1]:
        conversations = conversations[1:]
    if not conversations or len(conversations) % 2:
        raise BadSample("no answer at the end")
    if any(turn.get("from") != ROLES[position % 2] for position, turn in enumerate(conversations)):
        raise BadSample("odd roles")
    texts: list[str] = [turn["value"] for turn in conversations]
    if not all(text.strip() for text in texts):
        raise BadSample("empty turn")
    return texts, words


def _image_first(text: str) -> str:
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


def _key(entry: Any, number: int) -> str:
    name = entry.get("id") if isinstance(entry, dict) else None
    return f"#{number}" if name is None else str(name)
