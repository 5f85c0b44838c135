"""Bytes to an RGB image, or the reason why not. Nothing a file holds may end a run."""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MAX_PIXELS = 64_000_000
MIN_SIDE = 8


class BadImage(Exception):
    """The reason why an image is skipped, in a word or two (reports count by it)."""


def decode(data: bytes | str | os.PathLike) -> Image.Image:
    """An RGB image from a file's bytes or path.

    Size is checked before pixels are read. EXIF rotation is applied, an animation gives its first frame, transparency
    goes onto white, 16-bit grey is scaled to 8 bits (PIL alone would clip it to white), CMYK is converted.

    Raises:
        BadImage: not an image, damaged, smaller than 8 pixels or larger than 64 megapixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of sizes that are checked here, and of odd EXIF
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadImage("larger than 64 megapixels")
                if min(width, height) < MIN_SIDE:
                    raise BadImage("smaller than 8 pixels")
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage("larger than 64 megapixels") from None
    except Image.UnidentifiedImageError:
        raise BadImage("not an image") from None
    except FileNotFoundError:
        raise BadImage("file not found") from None
    except PermissionError:
        raise BadImage("file not readable") from None
    except Exception as error:  # decoders raise anything: struct.error, SyntaxError, KeyError, OSError, ...
        raise BadImage("truncated" if "truncated" in str(error).lower() else "damaged") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        top = values.max(initial=0.0)
        full = 1.0 if top <= 1 and image.mode == "F" else 255.0 if top <= 255 else 65535.0
        if image.mode.startswith("I;16"):
            full = 65535.0
        grey = np.clip(values / full * 255, 0, 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
