"""Every kind of file that a crawl holds: decoded right, or refused with a reason."""

import contextlib
import struct
import zlib

import numpy as np
import pytest
from packing import encoded, picture
from PIL import Image

from llava_genhancer.data.decode import MAX_PIXELS, BadImage, decode


def flat(mode: str, colour, size: tuple[int, int] = (16, 12)) -> Image.Image:
    return Image.new(mode, size, colour)


def colour_of(image: Image.Image) -> tuple[int, ...]:
    pixels = np.asarray(image).reshape(-1, 3)
    assert (pixels == pixels[0]).all(), "not one colour"
    return tuple(pixels[0].tolist())


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_an_ordinary_image_is_itself_from_bytes_and_from_a_path(tmp_path) -> None:
    image = picture(0)
    (tmp_path / "a.png").write_bytes(encoded(image))
    for source in (encoded(image), tmp_path / "a.png", str(tmp_path / "a.png")):
        decoded = decode(source)
        assert decoded.mode == "RGB"
        assert np.array_equal(np.asarray(decoded), np.asarray(image))


def test_cmyk_is_converted() -> None:
    decoded = decode(encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100))
    red, green, blue = np.asarray(decoded).reshape(-1, 3).mean(axis=0)
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("value", [0, 257, 32896, 65535])
def test_16_bit_grey_keeps_its_brightness(value: int) -> None:
    pixels = np.full((12, 16), value, dtype=np.uint16)
    assert colour_of(decode(encoded(Image.fromarray(pixels)))) == (round(value / 257),) * 3


def test_palette_and_grey_and_bilevel() -> None:
    image = picture(1).quantize(256)
    assert np.array_equal(np.asarray(decode(encoded(image))), np.asarray(image.convert("RGB")))
    assert colour_of(decode(encoded(flat("L", 77)))) == (77, 77, 77)
    assert colour_of(decode(encoded(flat("1", 1)))) == (255, 255, 255)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    frames = [flat("RGB", colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    assert colour_of(decode(data)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),  # invisible: the white below
        ("RGBA", (0, 0, 0, 255), (0, 0, 0)),
        ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
        ("LA", (0, 0), (255, 255, 255)),
    ],
)
def test_transparency_goes_onto_white(mode, colour, expected) -> None:
    assert colour_of(decode(encoded(flat(mode, colour)))) == expected


def test_a_transparent_palette_entry_goes_onto_white() -> None:
    image = flat("P", 0)
    image.putpalette([10, 20, 30])
    assert colour_of(decode(encoded(image, transparency=0))) == (255, 255, 255)
    assert colour_of(decode(encoded(image))) == (10, 20, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    """Stored pixels are the picture after the inverse of its orientation; decoding gives the picture back."""
    inverse = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    upright = picture(2, (16, 10))
    stored = upright if inverse is None else upright.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(decode(encoded(stored, exif=exif))), np.asarray(upright))


def test_wrong_exif_does_not_cost_an_image() -> None:
    data = encoded(flat("RGB", (9, 9, 9)), "JPEG", quality=100)
    broken = data[:2] + b"\xff\xe1\x00\x10Exif\x00\x00" + b"\xff" * 8 + data[2:]
    assert decode(broken).size == (16, 12)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"<html>404</html>", "not an image"),
        (encoded(picture(0), "JPEG")[:200], "not an image|truncated|damaged"),
        (encoded(picture(0, (64, 64)), "JPEG", quality=95)[:-1500], "truncated"),
        (encoded(picture(0, (64, 64)))[:-1500], "truncated"),
        (encoded(flat("RGB", 0, (1, 1))), "smaller than 8 pixels"),
        (encoded(flat("RGB", 0, (2000, 7))), "smaller than 8 pixels"),
        (png_header(10_000, 10_000), "larger than 64 megapixels"),
        (png_header(20_000, 20_000), "larger than 64 megapixels"),  # PIL itself refuses this one
        (png_header(2**31 - 1, 2**31 - 1), "larger than 64 megapixels"),
    ],
)
def test_what_cannot_be_used_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=f"^({reason})$"):
        decode(data)


def test_a_path_that_holds_nothing_has_a_reason(tmp_path) -> None:
    for path, reason in ((tmp_path / "none.jpg", "file not found"), (tmp_path, "not a file"), ("a\0.jpg", "damaged")):
        with pytest.raises(BadImage, match=reason):
            decode(path)


def test_sizes_at_the_limits() -> None:
    assert decode(encoded(flat("RGB", 0, (8, 8)))).size == (8, 8)
    side = int(MAX_PIXELS**0.5)
    with pytest.raises(BadImage, match=r"truncated|damaged"):  # allowed by size: only its pixels are missing
        decode(png_header(side, side))


def test_no_damage_escapes_as_another_exception() -> None:
    """Flip and cut bytes of every format: an image or a BadImage, never anything else."""
    generator = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        whole = encoded(picture(3), format)
        for _ in range(60):
            data = bytearray(whole)
            for position in generator.integers(0, len(data), 4):
                data[position] = int(generator.integers(256))
            with contextlib.suppress(BadImage):
                assert decode(bytes(data[: generator.integers(1, len(data) + 1)])).mode == "RGB"


def test_decoding_says_nothing_on_the_way(recwarn) -> None:
    for data in (png_header(10_000, 10_000), encoded(picture(0))[:50], encoded(flat("LA", (0, 0)))):
        with contextlib.suppress(BadImage):
            decode(data)
    assert not recwarn.list
