"""Bytes to an RGB image, or the reason why not. Nothing a file holds may end a run."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from llava_genhancer.errors import InputError

try:
    from PIL.AvifImagePlugin import SUPPORTED as _AVIF
except ImportError:  # Pillow before 11.3
    _AVIF = False

# Names that are taken for images; whether one can be read shows in its content, and HEIC or JPEG XL cannot.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".img",
)  # fmt: skip
# The formats that are decoded; PIL reads many more, and has Ghostscript run for one of them.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(("AVIF",) if _AVIF else ()))
# Errors that concern one name or file. Any other (EIO, EMFILE, ESTALE, EACCES, ...) is a fault of the disk, the network
# or this process: images that it hides are not damaged, and training without them would be another training.
ITEM_ERRORS = frozenset(
    (
        errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EOVERFLOW,
        errno.ENXIO,
    )
)  # fmt: skip
MAX_PIXELS = 64_000_000
MAX_BYTES = 256_000_000
MAX_SCANS = 50  # of a progressive JPEG, which has about ten; each costs a pass over all pixels, even an empty one
MAX_PASSES = 1_000_000_000  # scans times pixels: fifteen scans of the largest picture, fifty of twenty megapixels
MIN_SIDE = 8
MAX_PADDED_SIDE = 8000  # of an image that is padded to a square: the square then has MAX_PIXELS at most
MAX_ASPECT = 32  # of an image whose short edge is resized to the view before the centre is cropped
_GREY = (np.arange(1 << 16) / 257).round().astype(np.uint8)  # of 16 bits, in 8
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")


class BadImage(Exception):
    """The reason why an image is skipped, in a word or two (reports count by it)."""


def decode(data: bytes | str | os.PathLike) -> Image.Image:
    """An RGB image from a file's bytes or path.

    The format is found in the content, whatever the name says, and the size is checked before pixels are read. EXIF
    rotation is applied, an animation gives its first frame, transparency goes onto white, 16-bit grey is scaled to 8
    bits (PIL alone would clip it to white), CMYK is converted.

    Raises:
        BadImage: not an image, damaged, smaller than 8 pixels, larger than 64 megapixels or 256 MB, or a JPEG of more
            scans than a picture of its size has.
        InputError: the disk, the network or this process cannot read the file, whatever is in it.
    """
    content = data if isinstance(data, bytes) else _read(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of sizes that are checked here, and of odd EXIF
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadImage("larger than 64 megapixels")
                if min(width, height) < MIN_SIDE:
                    raise BadImage("smaller than 8 pixels")
                if image.format in ("JPEG", "MPO") and _scans(content) > min(MAX_SCANS, MAX_PASSES / (width * height)):
                    raise BadImage("too many scans")
                image.load()
                ImageOps.exif_transpose(image, in_place=True)  # else it copies whatever needs no turning
                return _to_rgb(image)
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("not enough memory for it") from None
    except Image.DecompressionBombError:
        raise BadImage("larger than 64 megapixels") from None
    except Image.UnidentifiedImageError:
        raise BadImage(_unreadable(content)) from None
    except Exception as error:  # decoders raise anything: struct.error, SyntaxError, KeyError, OSError, ...
        raise BadImage("truncated" if "truncated" in str(error).lower() else "damaged") from None


def bounded(image: Image.Image, *, pad: bool, crop: bool) -> Image.Image:
    """Return ``image`` in a form whose processing takes a bounded amount of memory; ordinary images unchanged.

    An image of 8 x 1 000 000 pixels is small, but the square around it has 10^12 pixels, and with its short edge at 336
    it has 10^10.

    Args:
        pad: the image is padded to a square next: one longer than 8 000 pixels is shrunk to half of that.
        crop: its short edge is resized and its centre cropped next: of one more than 32 times as long as wide, the
            middle is returned.
    """
    width, height = image.size
    long, short = max(width, height), min(width, height)
    if pad:
        if long <= MAX_PADDED_SIDE:
            return image
        scale = MAX_PADDED_SIDE / 2 / long
        return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    if crop and long > MAX_ASPECT * short:
        start = (long - MAX_ASPECT * short) // 2
        end = start + MAX_ASPECT * short
        return image.crop((start, 0, end, height) if width > height else (0, start, width, end))
    return image


def bounded_for(image: Image.Image, processor: Any) -> Image.Image:
    """:func:`bounded` for what an image processor of transformers does with ``image``."""
    pad, crop = (bool(getattr(processor, name, False)) for name in ("do_pad", "do_center_crop"))
    return bounded(image, pad=pad, crop=crop)


def _read(path: str | os.PathLike) -> bytes:
    """A file's content; a pipe or a device of that name would be waited for, or be read for ever."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a file")
        if status.st_size > MAX_BYTES:
            raise BadImage("larger than 256 MB")
        with open(path, "rb") as file:
            return file.read(MAX_BYTES)
    except FileNotFoundError:
        raise BadImage("file not found") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        refuse_fault(error, path)
        raise BadImage("damaged") from None


def refuse_fault(error: BaseException, path: object) -> None:
    """Raise InputError if ``error`` is a fault of the disk, the network or this process; return if the data is bad.

    Args:
        path: the file that was being read.
    """
    if not isinstance(error, OSError) or error.errno is None or error.errno in ITEM_ERRORS:
        return
    advice = {
        errno.EMFILE: "raise the limit on open files (ulimit -n) or lower --num_workers",
        errno.ENFILE: "raise the system's limit on open files or lower --num_workers",
        errno.EACCES: "check its permissions",
        errno.EPERM: "check its permissions",
    }.get(error.errno, "check the disk or the network file system")
    name = errno.errorcode.get(error.errno, str(error.errno))
    # Arrow's errors carry a sentence of their own as strerror.
    raise InputError(
        f"data {path} cannot be read: {os.strerror(error.errno)} ({name}); {advice}, then repeat the command"
    ) from None


def _unreadable(content: bytes) -> str:
    """Why PIL finds no image in ``content``."""
    if content.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file"
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIC, which is not read"
    return "not an image"


def _scans(jpeg: bytes) -> int:
    """How many scans a JPEG has up to its end marker."""
    at, scans = 2, 0
    while (found := _MARKER.search(jpeg, at)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        at = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
    return scans


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(_GREY[np.asarray(image)]).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.array(image, dtype=np.float32)
        top = values.max(initial=0.0)
        values *= 255 / (1.0 if top <= 1 and image.mode == "F" else 255.0 if top <= 255 else 65535.0)
        grey = values.clip(0, 255, out=values).round(out=values).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies too
