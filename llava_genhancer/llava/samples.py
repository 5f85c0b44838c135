"""LLaVA's JSON: scanned once, checked entry by entry, and read sample by sample from the file itself afterwards.

Only places and lengths stay in memory: a file of a gigabyte is not to be held once per rank, nor copied by workers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from llava_genhancer.data.entries import image_names, read_entries
from llava_genhancer.data.loader import SkipReport
from llava_genhancer.errors import InputError, plain
from llava_genhancer.files import expand
from llava_genhancer.llava.conversation import IMAGE, Turn

log = logging.getLogger(__name__)
ROLES = ("human", "gpt")
# A path of another system that is absolute or leaves its folder, and what no path can be.
_FOREIGN = re.compile(r"^\\|^[A-Za-z]:|\\\.\.(\\|$)|\0")
# A path that may leave the folder. Any other stays below it: links inside the folder are the user's own affair.
_MAY_LEAVE = re.compile(r"^/|(^|/)\.\.(/|$)")
NO_IMAGE = "text has <image> but the sample has no image"
NO_TOKEN = "sample has an image but no text has <image>"
MAX_REASONS = 12  # in a message; roles have any name, so there may be any number


class BadSample(Exception):
    """The reason why a sample is left out, in a few words (reports count by it), and what was found."""

    def __init__(self, reason: str, found: str = ""):
        super().__init__(reason)
        self.found = found


class Sample(NamedTuple):
    """A conversation about images (paths below the image folder, or absolute), or about none.

    ``words`` counts the whole conversation as LLaVA's sampler does. ``note`` is NO_IMAGE or NO_TOKEN where a sample
    without images is likely a mistake, else "".
    """

    key: str
    turns: list[Turn]
    images: list[str]
    words: int
    note: str = ""


@dataclass(frozen=True)
class Samples:
    """The usable samples of a JSON, read from the file when asked for.

    Attributes:
        index: int64 (N, 3): first byte, bytes, number of the entry.
        lengths: int64 (N,): words, negative where there is no image.
        fingerprint: hash of the file.
        report: what was left out, and why.
        first: of each reason in ``report``, the first sample and what was found there.
        as_text: samples that are read as text though they seem to be about an image: NO_IMAGE, NO_TOKEN.
    """

    path: str
    image_folder: str
    index: np.ndarray
    lengths: np.ndarray
    fingerprint: str
    report: SkipReport
    first: Mapping[str, str] = field(default_factory=dict)
    as_text: SkipReport = field(default_factory=SkipReport)

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
        return read_sample(entry, number, self.image_folder)

    @property
    def with_image(self) -> int:
        """Number of usable samples with an image."""
        return int((self.lengths > 0).sum())

    def facts(self) -> dict[str, Any]:
        """Counts and examples for a training's result, as plain JSON types."""
        return {
            "samples": len(self),
            "with_image": self.with_image,
            **{
                name: {"by_reason": dict(part.by_reason), "keys": [list(pair) for pair in part.keys]}
                for name, part in (("left_out", self.report), ("read_as_text", self.as_text))
            },
        }

    def image_path(self, name: str) -> str:
        """Where a sample's image lies."""
        return os.path.join(self.image_folder, name)


def summary(report: SkipReport, first: Mapping[str, str] | None = None) -> str:
    """Return how many were skipped, and why, with the first of each reason in ``first``; "" if none."""
    first = first or {}
    by_count = sorted(report.by_reason.items(), key=lambda item: -item[1])
    reasons = ", ".join(
        f"{count} {reason}{f' (first {first[reason]})' if reason in first else ''}"
        for reason, count in by_count[:MAX_REASONS]
    )
    if more := sum(count for _, count in by_count[MAX_REASONS:]):
        reasons += f", {more} for other reasons"
    return f"{report.skipped} of {report.read} cannot be used: {reasons}" if reasons else ""


def text_summary(report: SkipReport) -> str:
    """Return how many samples are read as text, and why, with the first of each reason; "" if none."""
    first = {reason: key for key, reason in reversed(report.keys)}
    return ", ".join(
        f"{count} of {report.read}: {why} (first {first.get(why, '?')})" for why, count in report.by_reason.items()
    )


def read_samples(path: str | os.PathLike, image_folder: str | os.PathLike | None = None) -> Samples:
    """Scan LLaVA's JSON: ``[{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}, ...]}, ...]``.

    ``image`` is a path or a list of paths; ``images`` is read like ``image``. Entries that cannot be trained on are
    left out, counted and logged. Samples that are read as text though they seem to be about an image are counted and
    logged too. Whether images exist shows when they are read.

    Raises:
        InputError: no such file or folder, not JSON, nothing usable in it, or images but no folder for them.
    """
    path = os.path.abspath(expand(path))
    folder = "" if image_folder is None else os.path.abspath(expand(image_folder))
    if folder and not os.path.isdir(folder):
        raise InputError(f"image_folder {image_folder} does not exist")
    report, as_text, digest = SkipReport(), SkipReport(), hashlib.blake2b(digest_size=16)
    first: dict[str, str] = {}
    index, lengths = array("q"), array("q")
    greeted = 0
    for number, (entry, start, size) in enumerate(read_entries(path, digest)):
        report.read += 1
        try:
            sample = read_sample(entry, number, folder)
        except BadSample as error:
            key = _key(entry, number)
            report.add(key, str(error))
            first.setdefault(str(error), f"{key}: {error.found}" if error.found else key)
            continue
        if sample.note:
            as_text.add(sample.key, sample.note)
        greeted += entry["conversations"][0]["from"] == ROLES[1]
        index.extend((start, size, number))
        lengths.append(sample.words if sample.images else -sample.words)
    as_text.read = len(lengths)
    if not index:
        raise InputError(f"data {path} has no usable sample: {summary(report, first) or 'it is empty'}")
    if max(lengths) > 0 and not folder:
        raise InputError(f"data {path} names images: give image_folder, the root of their paths")
    if report.skipped:
        log.warning("data %s: %s", path, plain(summary(report, first)))
    if as_text.skipped:
        log.warning("data %s: samples are read as text: %s", path, plain(text_summary(as_text)))
    if greeted:
        log.warning('data %s: %d begin with an answer ("gpt"), which is dropped, as LLaVA does', path, greeted)
    columns = np.frombuffer(index, dtype=np.int64).reshape(-1, 3)
    words = np.frombuffer(lengths, dtype=np.int64)
    return Samples(path, folder, columns, words, digest.hexdigest(), report, first, as_text)


def read_sample(entry: Any, number: int, image_folder: str = "") -> Sample:
    """Return an entry of the JSON as LLaVA reads it; ``number`` names it if it has no id.

    Of one image, the turn that shows it is rewritten to begin with it; several stay where they are. Without an image
    ``<image>`` is a word like any other, and an image that is never shown is ignored; the sample's note says so.

    Args:
        image_folder: absolute path of the folder that images must lie in; "" skips that check.

    Raises:
        BadSample: nothing can be learned from it, or its image's path leaves the image folder.
    """
    if not isinstance(entry, dict):
        raise BadSample("not an object")
    try:
        images = image_names(entry)
    except ValueError as error:
        raise BadSample("image names cannot be read", str(error)) from None
    if "" in images:
        raise BadSample("image names cannot be read", "an empty name in a list")
    for name in images:
        directory = name if name.endswith("..") else os.path.dirname(name)
        if _FOREIGN.search(name) or (_MAY_LEAVE.search(name) and not _inside(directory, image_folder)):
            where = f"{name} is not inside {image_folder}" if image_folder else name
            raise BadSample("image outside the image folder", where)
    if "conversations" not in entry:
        raise BadSample("no conversation", f"it has {', '.join(map(str, entry)) or 'nothing'}"[:100])
    texts, words = _texts(entry["conversations"])
    shown = [text.count(IMAGE) for text in texts]
    note = ""
    if images and any(shown):
        if any(shown[1::2]):
            raise BadSample("image in an answer")
        if len(images) == 1:
            texts = [_image_first(text) if IMAGE in text else text for text in texts]
            shown = [min(count, 1) for count in shown]
        if sum(shown) != len(images):
            raise BadSample("not as many <image> as images", f"{sum(shown)} <image>, {len(images)} images")
    else:
        note = NO_TOKEN if images else NO_IMAGE if any(shown) else ""
        images = []
    turns = [Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    return Sample(_key(entry, number), turns, images, words, note)


@lru_cache(maxsize=4096)
def _inside(directory: str, folder: str) -> bool:
    """Return whether ``directory``, absolute or relative to ``folder``, lies in ``folder``, which may be a link.

    A path that climbs over a link is where the system finds it, not where it reads.
    """
    if not folder:
        return True
    path = os.path.join(folder, directory)
    written = os.path.normpath(path)
    try:
        real, root = os.path.realpath(path), os.path.realpath(folder)
        same = real == os.path.realpath(written)
    except ValueError:  # half a character, which no file name has
        return False
    return _below(real, root) or (same and (_below(written, folder) or _below(written, root)))


def _below(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder


def _texts(conversations: Any) -> tuple[list[str], int]:
    """Questions and answers in turn, and the words of all turns.

    An answer in front of the first question is dropped, but its words count, as LLaVA does it. LLaVA itself ends with
    an exception at other roles than human and gpt, and at two turns in a row from one of them.

    Raises:
        BadSample: no turns, or turns that are not questions and answers in turn.
    """
    if not isinstance(conversations, list) or not conversations:
        raise BadSample("no conversation")
    for turn in conversations:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadSample('a turn has no text as "value"', f"found {turn!r}"[:100])
    for turn in conversations:
        if turn.get("from") not in ROLES:
            found = f'from "{plain(str(turn["from"]))[:20]}"' if "from" in turn else 'without "from"'
            raise BadSample(f'a turn {found} ("human" and "gpt" are read)')
    words = sum(len(turn["value"].split()) for turn in conversations)
    for before, turn in itertools.pairwise(conversations):
        if before["from"] == turn["from"]:
            raise BadSample(f'two turns in a row from "{turn["from"]}"')
    if conversations[0]["from"] == ROLES[1]:
        conversations = conversations[1:]
    if not conversations:
        raise BadSample("an answer without a question")
    texts: list[str] = [turn["value"] for turn in conversations]
    for text, kind in zip(texts, itertools.cycle(("question", "answer"))):
        if not text.strip():
            raise BadSample(f"an empty {kind}")
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can contain and no tokenizer takes
            raise BadSample(f"a character that is not Unicode in the {kind}") from None
    if len(texts) % 2:
        raise BadSample("no answer at the end")
    return texts, words


def _image_first(text: str) -> str:
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


def _key(entry: Any, number: int) -> str:
    name = entry.get("id") if isinstance(entry, dict) else None
    return f"#{number}" if name is None else str(name)
