"""Files made to hurt: images, tar shards, JSON and CSV that would hang, fill the memory, or end in a traceback."""

import io
import json
import os
import struct
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from fuzz_cases import picture, tar_header, tar_member
from PIL import Image

from llava_genhancer import run
from llava_genhancer.data.decode import MAX_PASSES, MAX_PIXELS, BadImage, decode
from llava_genhancer.data.images import ShardSource, fingerprint, open_source
from llava_genhancer.data.loader import build_loader
from llava_genhancer.data.views import TrainView
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mmvp.data import CSV_NAME, IMAGES_NAME, load_benchmark
from llava_genhancer.llava.samples import read_samples

END = bytes(1024)


@contextmanager
def within(seconds: float):
    """Processor time: other work on the machine does not count."""
    started = time.process_time()
    yield
    assert time.process_time() - started < seconds


# --- images -------------------------------------------------------------------------------------------------------


def test_a_jpeg_of_a_thousand_scans_is_not_decoded() -> None:
    data = picture("JPEG", "L", (64, 64), progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    assert decode(data).size == (64, 64)
    assert decode(data[:-2] + 10 * last + data[-2:]).size == (64, 64)
    with pytest.raises(BadImage, match="too many scans"):
        decode(data[:-2] + 1000 * last + data[-2:])


def test_a_large_jpeg_may_have_fewer_scans_than_a_small_one() -> None:
    """Each passes over all pixels: 46 of them over 64 megapixels are a second and more."""
    data = picture("JPEG", "L", (64, 64), progressive=True)
    size = data.index(b"\xff\xc2") + 5  # of the frame header, whose height comes first
    last = data[data.rfind(b"\xff\xda") : -2]
    crowded = data[:-2] + 40 * last + data[-2:]
    assert decode(crowded).size == (64, 64)
    started = time.process_time()
    with pytest.raises(BadImage, match="too many scans"):
        decode(crowded[:size] + struct.pack(">HH", 8000, 8000) + crowded[size + 4 :])
    assert time.process_time() - started < 0.1, "it was decoded first"
    assert MAX_PASSES >= 12 * MAX_PIXELS, "what an ordinary progressive JPEG needs"


def test_scans_are_counted_in_the_picture_alone() -> None:
    """Not in what a camera puts into segments, nor in the film that it appends."""
    data = picture("JPEG")
    noise = b"\xff\xda" * 500
    segment = b"\xff\xe5" + struct.pack(">H", len(noise) + 2) + noise
    assert decode(data[:2] + segment + data[2:] + noise).size == (16, 12)


def test_a_pair_of_pictures_in_one_jpeg_gives_the_first() -> None:
    buffer = io.BytesIO()
    colours = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    colours[0].save(buffer, "MPO", save_all=True, append_images=colours[1:])
    assert decode(buffer.getvalue()).getpixel((0, 0))[0] > 200


def test_postscript_is_no_image_and_no_interpreter_is_started(tmp_path: Path, monkeypatch) -> None:
    from PIL import EpsImagePlugin

    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\n/usr/bin/touch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:/usr/bin:/bin")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"
    (tmp_path / "a.jpg").write_bytes(script)
    with pytest.raises(BadImage, match="not an image"):
        decode(tmp_path / "a.jpg")
    assert not (tmp_path / "started").exists()


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "fine.png").write_bytes(picture("PNG"))
    for name in ("pipe.jpg", "zero.jpg"):
        with pytest.raises(BadImage, match="not a file"):
            decode(tmp_path / name)
    assert [key for key, _ in open_source(str(tmp_path)).first(3)] == ["fine.png"]


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(3 << 30)
    with within(0.5), pytest.raises(BadImage, match="larger than 256 MB"):
        decode(tmp_path / "a.jpg")


def test_a_bomb_inside_of_the_limits_costs_what_its_pixels_do() -> None:
    """A megapixel of each kind that needs several copies on its way; the limit has 64 of them."""
    for data in (
        picture("PNG", "I;16", (1000, 1000)),
        picture("TIFF", "F", (1000, 1000)),
        picture("PNG", "RGBA", (1000, 1000)),
    ):
        assert len(data) < 5_000_000
        with within(0.5):
            assert decode(data).size == (1000, 1000)


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    """Latin-1 names in a folder or a shard: seeds, fingerprints and reports take them as they are."""
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "images").mkdir()
    for file in (name, "b.png"):
        (tmp_path / "images" / file).write_bytes(picture("PNG"))
    (tmp_path / "a.tar").write_bytes(
        tar_header(b"caf\xe9.png", 3) + b"no!".ljust(512, b"\0") + tar_member("b.png", picture("PNG")) + END
    )
    for path in (tmp_path / "images", tmp_path / "a.tar"):
        source = open_source(str(path))
        assert len(fingerprint(source)) == 16
        loader = build_loader(source, TrainView(8), batch_size=2, max_bad_fraction=1.0)
        keys = [key for _, batch in zip(range(2), loader, strict=False) for key in batch["keys"]]
        report = {"given": sorted(keys), **loader.report().to_dict()}
        run.write_json(tmp_path / "report.json", report)
        written = run.read_json(tmp_path / "report.json")
        assert "caf\udce9" in "".join([*written["given"], *(key for key, _ in written["keys"])])


# --- tar shards ---------------------------------------------------------------------------------------------------


def pax(*records: bytes) -> bytes:
    data = b"".join(b"%d %s" % (len(record) + len(str(len(record) + 3)) + 1, record) for record in records)
    return tar_member("pax", data, type=b"x")


IMAGE = picture("PNG")
SPARSE = [
    b"GNU.sparse.major=1\n",
    b"GNU.sparse.minor=0\n",
    b"GNU.sparse.realsize=99999999999\n",
    b"GNU.sparse.name=b.png\n",
]
TARS = {
    "a size below zero": (tar_header(b"b.png", b"\xff" * 4 + (-1024).to_bytes(8, "big", signed=True)), "rest of one"),
    "an extended size below zero": (pax(b"size=-2048\n") + tar_member("b.png", b""), "rest of one"),
    "a size of terabytes": (tar_header(b"b.png", b"\x80" + b"\0" * 4 + b"\xff" * 6), "larger than 256 MB"),
    "a hole of 100 GB": (pax(*SPARSE) + tar_member("b.png", b"1\n0\n5\n".ljust(512, b"\0")), "larger than 256 MB"),
    "an extended header of a megabyte": (tar_member("pax", b"1" * (1 << 20), type=b"x"), "rest of one"),
    "a name of a megabyte": (tar_member("pax", b"n" * (1 << 20), type=b"L") + tar_member("b.png", b""), "rest of one"),
    "headers within headers": (1500 * pax(b"path=b.png\n") + tar_member("b.png", b""), "rest of one"),
}  # fmt: skip


@pytest.mark.parametrize("case", TARS)
def test_a_tar_that_leads_in_circles_or_claims_the_moon(case: str, tmp_path: Path) -> None:
    blocks, problem = TARS[case]
    (tmp_path / "a.tar").write_bytes(tar_member("a.png", IMAGE) + blocks + END)
    with within(1):
        found = [sample for sample, _ in zip(ShardSource([str(tmp_path / "a.tar")]).read(0), range(5), strict=False)]
    assert found[0].data == IMAGE
    assert len(found) in (2, 3), "the image, the odd member, and the rest if it cannot be found"
    assert problem in found[1].problem
    assert all(sample.data is None for sample in found[1:])


# --- JSON ---------------------------------------------------------------------------------------------------------

JSONS = {
    "lists within lists": "[" * 100_000,
    "objects within objects": '[{"id": ' + '{"a":' * 100_000,
    "a number of 5000 digits": '[{"id": ' + "9" * 5000 + "}]",
    "an entry of three megabytes": '[{"id": "' + "x" * 3_000_000 + '"}]',
    "a million lists in an entry": '[{"id": [' + "[]," * 1_000_000 + "[]]}]",
}


@pytest.mark.parametrize("case", JSONS)
def test_a_json_that_no_parser_likes(case: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text(JSONS[case])
    for read in (lambda: read_samples(path, tmp_path), lambda: open_source(str(path), str(tmp_path))):
        with within(1), pytest.raises(InputError, match=r"entry 0") as caught:
            read()
        assert len(str(caught.value)) < 1000
    if "entry" not in case:
        with pytest.raises(InputError, match="cannot be read as JSON"):
            run.read_json(path)
        (tmp_path / run.MARKER).write_text(JSONS[case])
        assert run.complete_facts(tmp_path, verify=True) is None


def test_a_line_of_two_gigabytes_is_refused_at_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    with open(path, "wb") as file:
        file.write(b'[{"id": "')
        file.truncate(2 << 30)
    with within(1), pytest.raises(InputError, match="entry 0"):
        read_samples(path, tmp_path)


def test_text_that_is_half_a_character(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """JSON may escape a lone surrogate, which no file can hold: in a name it is reported, in a text it is refused."""
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    entries = [{"id": "\ud800", "image": "\ud800.png", "conversations": turns}, {"id": "\ud801", "conversations": []}]
    broken = [{"from": "human", "value": "<image>\n\ud800"}, {"from": "gpt", "value": "\udfff"}]
    entries.append({"id": "\ud802", "image": "a.png", "conversations": broken})
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    samples = read_samples(tmp_path / "chat.json", tmp_path)
    assert "\\ud801" in caplog.text
    caplog.text.encode()  # a log that a terminal cannot hold would end the run
    with pytest.raises(BadImage):
        decode(samples.image_path(samples[0].images[0]))
    run.write_json(tmp_path / "report.json", samples.report.to_dict())
    assert run.read_json(tmp_path / "report.json")["keys"] == [
        ["\ud801", "no conversation"],
        ["\ud802", "a character that is not Unicode in the question"],
    ]


# --- MMVP's CSV ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (f"1,{'n' * 300},A statement.", "cannot be looked up: File name too long"),
        (f"{'9' * 4000},Kind,A statement.", "is not an integer"),
        ("1,../..,A statement.", "is not the name of a folder"),
    ],
)
def test_a_row_that_leads_elsewhere(row: str, words: str, tmp_path: Path) -> None:
    (tmp_path / IMAGES_NAME).mkdir()
    others = [f"{n},Kind,It is {n}." for n in range(2, 271)]
    (tmp_path / CSV_NAME).write_text("\n".join(["Question ID,Type,Statement", row, *others]))
    with pytest.raises(InputError, match=words):
        load_benchmark(tmp_path)


def test_a_csv_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / IMAGES_NAME).mkdir()
    with open(tmp_path / CSV_NAME, "wb") as file:
        file.truncate(2 << 30)
    with within(0.5), pytest.raises(InputError, match="larger than 10 MB"):
        load_benchmark(tmp_path)


# --- what errors say ----------------------------------------------------------------------------------------------


def test_an_error_is_one_line_that_a_terminal_only_shows() -> None:
    error = InputError("no image \x1b[2J\x07 in\nthis\r\u2028folder\udce9" + "x" * 5000)
    assert str(error).startswith("no image \\x1b[2J\\x07 in this  folder\\udce9xxx")
    assert len(str(error)) <= 1000
    assert str(error).isprintable()
    assert str(InputError("two  spaces, ümläut, 日本")) == "two  spaces, ümläut, 日本"
