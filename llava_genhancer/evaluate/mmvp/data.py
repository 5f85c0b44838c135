"""MMVP-VLM's files (arXiv 2401.06209): 135 pairs of images that CLIP finds alike and a person does not.

The official layout, which is what :func:`load_benchmark` accepts and nothing else::

    DIR/Questions.csv                       Question ID,Type,Statement: rows 2k and 2k+1 are a pair
    DIR/MLLM_VLM Images/<Type>/<ID>.jpg     both images of a pair lie under the first row's Type

Pairs 15 i ... 15 i + 14 belong to pattern i, by position alone.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_genhancer.data.decode import FORMATS, MAX_PIXELS
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.paper import PATTERNS
from llava_genhancer.files import expand
from llava_genhancer.run import sha256

logger = logging.getLogger(__name__)

PAIRS_PER_PATTERN = 15
PAIRS = PAIRS_PER_PATTERN * len(PATTERNS)
MAX_CSV_BYTES = 10_000_000
CSV_NAME = "Questions.csv"
IMAGES_NAME = "MLLM_VLM Images"
END = "\x1f"  # stands in no text
COLUMNS = ("questionid", "type", "statement")
SUFFIXES = (".jpg", ".png", ".jpeg")  # the official set has .jpg


@dataclass(frozen=True)
class Pair:
    """Two images and the two statements about them.

    ``truth[j]`` is the image (0 or 1) that statement j is true of: image 0 for an odd id, as in the official script.
    """

    index: int
    type: str
    ids: tuple[int, int]
    statements: tuple[str, str]
    images: tuple[Path, Path]

    @property
    def pattern(self) -> str:
        return PATTERNS[self.index // PAIRS_PER_PATTERN]

    @property
    def truth(self) -> tuple[int, int]:
        return (0 if self.ids[0] % 2 == 1 else 1, 0 if self.ids[1] % 2 == 1 else 1)


@dataclass(frozen=True)
class Benchmark:
    """A verified set: every row parsed, every image decoded once. ``sha256`` covers the questions and all images."""

    path: Path
    pairs: tuple[Pair, ...]
    sha256: str


def load_benchmark(path: str | Path) -> Benchmark:
    """Read and verify a set in MMVP-VLM's layout.

    Args:
        path: the folder that holds ``Questions.csv``, or one whose only child to hold it does, or the CSV itself.

    Raises:
        InputError: unknown layout, a malformed CSV, not 135 pairs, a missing or undecodable image; names row or file.
    """
    folder = _locate(Path(expand(path)))
    pairs = _pairs(folder, _rows(folder / CSV_NAME))
    digest = hashlib.sha256(sha256(folder / CSV_NAME).encode())
    for pair in pairs:
        for image in pair.images:
            open_image(image)
            digest.update(sha256(image).encode())
    odd_ones = [p for p in pairs if p.truth != (0, 1)]
    if odd_ones:
        # The official script scores by the parity of the id alone, so we do too; but it is rarely what was meant.
        logger.warning(
            "%s: %d of %d pairs are not an odd id followed by an even one (first: %d, %d); an odd id means the "
            "pair's first image, as in the official protocol",
            folder / CSV_NAME, len(odd_ones), len(pairs), *odd_ones[0].ids,
        )  # fmt: skip
    return Benchmark(folder, tuple(pairs), digest.hexdigest())


def open_image(path: Path) -> Image.Image:
    """The decoded image in RGB.

    Raises:
        InputError: not an image, truncated, or absurdly large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # palette transparency and size warnings: the pixels decide
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError("larger than 64 megapixels")
                return image.convert("RGB")
    except Exception as error:  # decoders raise anything
        raise InputError(f"{path} cannot be decoded ({error}): replace it by the official file") from None


def _locate(path: Path) -> Path:
    if path.name == CSV_NAME and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give the one that holds {CSV_NAME} and '{IMAGES_NAME}'")
    try:
        children = [path] if (path / CSV_NAME).is_file() else [p for p in sorted(path.iterdir()) if p.is_dir()]
        holding = [p for p in children if (p / CSV_NAME).is_file()]
    except OSError as error:
        raise InputError(f"{path} cannot be listed: {error.strerror}") from None
    if len(holding) > 1:
        raise InputError(
            f"{path} has {len(holding)} folders with a {CSV_NAME} ({holding[0].name}, ...): give one of them"
        )
    if not holding:
        raise InputError(
            f"{path} has no {CSV_NAME}: MMVP-VLM's folder holds {CSV_NAME} and '{IMAGES_NAME}/<Type>/<ID>.jpg' "
            "(hub data set MMVP/MMVP_VLM)"
        )
    if not (holding[0] / IMAGES_NAME).is_dir():
        raise InputError(f"{holding[0]} has {CSV_NAME} but no folder '{IMAGES_NAME}' beside it")
    return holding[0]


def _rows(path: Path) -> list[tuple[int, int, str, str]]:
    """(line, id, type, statement) per data row, as Python's csv module reads them; blank lines are passed over.

    The official script reads the file with the csv module's default settings, under which a statement may begin with a
    quoted word (``"GO" sign on the wall`` is read as ``GO sign on the wall``).
    """
    rows: list[tuple[int, int, str, str]] = []
    line = 1  # where the row begins that is being read
    longest = (0, 0)  # first and last line of the row over most lines
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise InputError(f"{path} is larger than {MAX_CSV_BYTES // 10**6} MB: the official one has 0.02")
        with open(path, encoding="utf-8-sig", newline="") as f:
            # A quote that is left open takes everything up to the file's end into its field, END too.
            reader = csv.reader(itertools.chain(f, [END]))
            header = next(reader, [])
            if tuple(re.sub(r"[^a-z]", "", cell.lower()) for cell in header) != COLUMNS:
                raise InputError(
                    f"{path}, line 1: the header is '{','.join(header)}' and should be 'Question ID,Type,Statement'"
                )
            last = reader.line_num
            for row in reader:
                line, last = last + 1, reader.line_num
                longest = max(longest, (line, last), key=lambda span: span[1] - span[0])
                if row == [END]:
                    break
                if row and row[-1].endswith(END):
                    raise csv.Error("a double quote in this row is never closed")
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) != len(COLUMNS) and last > line:
                    raise csv.Error(f"{len(row)} columns instead of 3 in a row that goes on to line {last}")
                if len(row) != len(COLUMNS):
                    raise InputError(
                        f"{path}, line {line}: {len(row)} columns instead of 3 (id, type, statement); a statement with "
                        f"a comma needs double quotes"
                    )
                try:
                    number = int(row[0])
                    if abs(number) >= 2**63:
                        raise ValueError
                except ValueError:
                    raise InputError(f"{path}, line {line}: the id '{row[0]}' is not an integer") from None
                # The type names a folder; it must not lead out of the set.
                if not row[1].strip() or row[1] in (".", "..") or "/" in row[1] or "\\" in row[1]:
                    raise InputError(f"{path}, line {line}: the type '{row[1]}' is not the name of a folder")
                if not row[2].strip():
                    raise InputError(f"{path}, line {line}: the statement is empty")
                rows.append((line, number, row[1], row[2]))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8 CSV") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not CSV ({error}); is a double quote left open?") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(rows) != 2 * PAIRS and longest[1] > longest[0]:
        raise InputError(
            f"{path}, line {longest[0]}: the file has {len(rows)} rows instead of {2 * PAIRS}, and this row goes on to "
            f"line {longest[1]}: is a double quote left open?"
        )
    return rows


def _pairs(folder: Path, rows: list[tuple[int, int, str, str]]) -> list[Pair]:
    table = folder / CSV_NAME
    if len(rows) % 2:
        line, number, _, _ = rows[-1]
        raise InputError(f"{table}: {len(rows)} rows, so the last one (line {line}, id {number}) has no partner")
    if len(rows) != 2 * PAIRS:
        last = f"; it ends at line {rows[-1][0]}, id {rows[-1][1]}" if rows else ""
        raise InputError(
            f"{table}: {len(rows) // 2} pairs instead of {PAIRS} ({len(PATTERNS)} patterns x {PAIRS_PER_PATTERN}){last}"
        )
    pairs = []
    for index in range(PAIRS):
        (line1, id1, kind, first), (line2, id2, _, second) = rows[2 * index : 2 * index + 2]
        if id1 == id2:
            raise InputError(f"{table}, lines {line1} and {line2}: both rows of a pair have id {id1}")
        images = (_image(folder, kind, id1, line1), _image(folder, kind, id2, line2))
        pairs.append(Pair(index, kind, (id1, id2), (first, second), images))
    return pairs


def _image(folder: Path, kind: str, number: int, line: int) -> Path:
    stem = folder / IMAGES_NAME / kind / str(number)
    try:
        for suffix in SUFFIXES:
            if (path := stem.with_name(stem.name + suffix)).is_file():
                return path
        found = stem.parent.is_dir()
    except OSError as error:  # not allowed, or a name that no file can have
        raise InputError(
            f"{folder / CSV_NAME}, line {line}: type '{kind}' cannot be looked up: {error.strerror}"
        ) from None
    if not found:
        raise InputError(f"{folder / CSV_NAME}, line {line}: type '{kind}' has no folder {stem.parent}")
    raise InputError(f"{folder / CSV_NAME}, line {line}: image {stem}{SUFFIXES[0]} is missing")
