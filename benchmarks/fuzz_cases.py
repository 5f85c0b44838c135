"""What `fuzz.py` tries: for each sort of file valid examples, ways to break them that know its structure, its readers.

Hypothesis draws the cases, so that a failing one is made small before it is shown.
"""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch import nn

from llava_genhancer import run
from llava_genhancer.data.decode import BadImage, decode
from llava_genhancer.data.images import open_source
from llava_genhancer.data.loader import build_loader
from llava_genhancer.data.views import TrainView
from llava_genhancer.engine import load_trained, stage_result
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mmvp.data import CSV_NAME, IMAGES_NAME, PAIRS, load_benchmark
from llava_genhancer.llava.checkpoint import read_shards
from llava_genhancer.llava.samples import read_samples
from llava_genhancer.recipes import Recipe, from_dict, get_recipe, to_dict
from llava_genhancer.tower.export import MARKER, verify_tower

Bytes = st.SearchStrategy[bytes]
DEEP, DIGITS = "@deep@", "@digits@"  # JSON that `json.dumps` would not write
NAMES = (
    "", ".", "..", "../../x.png", "/tmp/x.png", "C:\\x.png", "a\0b.png", "\ud800.png", "\udc80.jpg", "a\nb.png",
    "\x1b[2J.png", "$(touch x).png", "`id`.jpg", "-rf.png", "<script>alert(1)</script>.png", "a" * 300 + ".png",
    "fine.png",
)  # fmt: skip
UTF8_NAMES = tuple(name for name in NAMES if not any("\ud800" <= c <= "\udfff" for c in name))
ODD = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -(10**400), 0.5, 1e308, float("nan"), float("inf"), "none",
    "nan", "1e400", "9" * 5000, "x" * 100_000, [], {}, [[]], [None], {"": {}}, [1, "a"], DEEP, DIGITS, *NAMES,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A sort of file.

    Attributes:
        file: where a case is written, below the folder that everything happens in.
        cases: contents of that file.
        read: the readers; they return or raise InputError.
        examples: valid contents, which must be read without complaint.
    """

    name: str
    file: str
    cases: Bytes
    read: Callable[[Path], object]
    examples: Sequence[bytes]


def kinds(folder: Path) -> list[Kind]:
    """All of them; what their readers need beside the case is written into ``folder``."""
    return [_images(), _tars(), _llava(folder), _recipes(), _mmvp(folder), _safetensors(), _markers(folder)]


# --- breaking things ----------------------------------------------------------------------------------------------


@st.composite
def mutated(draw: st.DrawFn, whole: Bytes, words: Sequence[bytes] = ()) -> bytes:
    """Bytes cut, doubled, overwritten and spliced in up to five places."""
    data = draw(whole)
    pieces = [b"", b"\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80", b"\0" * 600, *words]
    for _ in range(draw(st.integers(0, 5))):
        at, length = draw(st.integers(0, len(data))), draw(st.sampled_from((0, 1, 2, 4, 8, 64, 4096)))
        piece = draw(st.one_of(st.sampled_from(pieces), st.binary(min_size=1, max_size=8)))
        end = min(at + length, len(data))
        match draw(st.sampled_from(("put", "insert", "drop", "double", "cut"))):
            case "put":
                data = data[:at] + piece + data[at + len(piece) :]
            case "insert":
                data = data[:at] + piece + data[at:]
            case "drop":
                data = data[:at] + data[end:]
            case "double":
                data = data[:end] + data[at:end] * 3 + data[end:]
            case "cut":
                data = data[:at]
    return data


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value of which up to three parts are something else, renamed or missing."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            break
        container, key = places[draw(st.integers(0, len(places) - 1))]
        how = draw(st.sampled_from(("odd", "odd", "odd", "drop", "rename", "wrap")))
        if how == "drop":
            del container[key]
        elif how == "rename" and isinstance(container, dict):
            container[draw(st.sampled_from(NAMES))] = container.pop(key)
        elif how == "wrap":
            container[key] = [container[key]]
        else:
            container[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def as_json(value: Any) -> bytes:
    """JSON, NaN and lone surrogates included, with the parts that only text can hold."""
    text = json.dumps(value)
    return text.replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000).replace(f'"{DIGITS}"', "9" * 5000).encode()


def json_cases(*values: Any) -> Bytes:
    """Edited values, half of them with broken bytes."""
    valid = st.one_of(*(edited(value) for value in values)).map(as_json)
    return st.one_of(valid, mutated(valid, (b'"', b"{", b"[", b"\\ud800", b"1e999", b",,", b"\xef\xbb\xbf")))


# --- sorts of files -----------------------------------------------------------------------------------------------


def picture(format: str, mode: str = "RGB", size: tuple[int, int] = (16, 12), **options: Any) -> bytes:
    """A small image file."""
    buffer = io.BytesIO()
    gradient = Image.linear_gradient("L").resize(size)
    image = gradient.convert(mode) if mode != "I;16" else Image.new(mode, size, 777)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _images() -> Kind:
    exif = Image.Exif()
    exif[0x0112] = 6
    formats = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
    examples = [picture(format) for format in formats]
    examples += [picture("JPEG", progressive=True, exif=exif), picture("JPEG", "CMYK"), picture("PNG", "RGBA")]
    examples += [picture("PNG", "P"), picture("PNG", "I;16"), picture("TIFF", "F", compression="tiff_lzw")]
    words = [
        b"\xff\xda",
        b"\xff\xd9",
        b"IDAT",
        b"IHDR",
        b"acTL",
        b"Exif\0\0MM",
        b"\0\0\xff\xff",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
    ]

    def read(path: Path) -> None:
        with suppress(BadImage):
            decode(path)
        decode(path.read_bytes())

    return Kind("images", "case.jpg", mutated(st.sampled_from(examples), words), read, examples)


def tar_header(name: bytes, size: int | bytes, type: bytes = b"0") -> bytes:
    """One block with a right checksum, whatever it says."""
    name, digits = (
        name[:100].ljust(100, b"\0"),
        b"%011o\0" % size if isinstance(size, int) else size[:12].ljust(12, b"\0"),
    )
    block = bytearray(name + b"0000644\0" + b"0000000\0" * 2 + digits + b"0" * 11 + b"\0" + b" " * 8)
    block += type + bytes(100) + b"ustar\x0000" + bytes(247)
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def tar_member(name: str, content: bytes, size: int | bytes | None = None, type: bytes = b"0") -> bytes:
    """A header and its padded content; ``size`` is what the header says of it, if not the truth."""
    header = tar_header(name.encode(errors="surrogatepass"), len(content) if size is None else size, type)
    return header + content + bytes(-len(content) % tarfile.BLOCKSIZE)


SIZES = (None, None, None, 0, 1, 2**33 - 1, b"\xff" * 12, b"-0001000\0", b"\x80" + b"\xff" * 11)  # None: the true one
TYPES = (b"0", b"0", b"0", b"1", b"2", b"3", b"5", b"6", b"S", b"x", b"\0", b"Z")
PAX_KEYS = (
    b"path",
    b"size",
    b"linkpath",
    b"hdrcharset",
    b"GNU.sparse.realsize",
    b"GNU.sparse.major",
    b"GNU.sparse.minor",
)
PAX_VALUES = (b"../../x.png", b"-2048", b"99999999999", b"1", b"0", b"BINARY", b"1" * 4000, b"\xff")
CONTENTS = (picture("PNG"), picture("JPEG"), b"", b"x" * 700, b"1\n0\n5\n")


@st.composite
def _archives(draw: st.DrawFn) -> bytes:
    """Up to four members, half of the time behind a good one; some with an extended header that is nearly right."""
    blocks = [tar_member("fine.png", picture("PNG"))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            record = b" %s=%s\n" % (draw(st.sampled_from(PAX_KEYS)), draw(st.sampled_from(PAX_VALUES)))
            record = b"%d%s" % (len(record) + draw(st.sampled_from((1, 2, 2, 9))), record)
            blocks.append(tar_member("pax", record, type=draw(st.sampled_from((b"x", b"g", b"L", b"K", b"X")))))
        name, content = draw(st.sampled_from(NAMES)), draw(st.sampled_from(CONTENTS))
        blocks.append(tar_member(name, content, draw(st.sampled_from(SIZES)), draw(st.sampled_from(TYPES))))
    return b"".join(blocks) + bytes(draw(st.sampled_from((1024, 1024, 512, 0))))


def _tars() -> Kind:
    whole = tar_member("a.png", picture("PNG")) + bytes(1024)
    cases = st.one_of(_archives(), mutated(_archives()), mutated(st.just(whole)))

    def read(path: Path) -> None:
        loader = build_loader(open_source(str(path)), TrainView(8), batch_size=3, max_bad_fraction=0.9)
        for _, batch in zip(range(2), loader, strict=False):
            batch["keys"]
        run.write_json(path.with_suffix(".report"), loader.report().to_dict())

    return Kind("tar shards", "case.tar", cases, read, [whole])


def _llava(folder: Path) -> Kind:
    (folder / "images").mkdir()
    (folder / "images" / "fine.png").write_bytes(picture("PNG"))
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A gradient."}]
    entries = [
        {"id": "1", "image": "fine.png", "conversations": turns},
        {"id": 2, "image": ["fine.png"] * 2, "conversations": [{**turns[0], "value": "<image> <image>?"}, turns[1]]},
        {"id": "3", "conversations": [{"from": "human", "value": "Hello"}, turns[1]]},
    ]  # fmt: skip

    def read(path: Path) -> None:
        refusals = []
        try:
            source = open_source(str(path), str(folder / "images"))
            for number in range(len(source)):
                source.get(number)  # type: ignore[union-attr]
        except InputError as error:
            refusals.append(error)
        samples = read_samples(path, folder / "images")
        run.write_json(path.with_suffix(".report"), samples.report.to_dict())
        for number in range(len(samples)):
            for name in samples[number].images:
                with suppress(BadImage):
                    decode(samples.image_path(name))
        if refusals:
            raise refusals[0]

    return Kind("LLaVA JSON", "case.json", json_cases(entries), read, [as_json(entries)])


def _recipes() -> Kind:
    values = [to_dict(get_recipe(name)) for name in ("tiny", "openai-l14-224", "tiny-masked")]
    manifest = {"format": 1, "recipe": values[0], "seed": 0}

    def read(path: Path) -> None:
        recipe = run.recipe_of(path)
        if from_dict(to_dict(recipe), Recipe) != recipe:
            raise AssertionError("a recipe that was accepted does not come back from its own dict")

    cases, examples = json_cases(*values, manifest), [as_json(value) for value in (*values, manifest)]
    return Kind("recipe files", "manifest.json", cases, read, examples)


def _mmvp(folder: Path) -> Kind:
    kind = "Colour, and $(touch x)"
    (folder / IMAGES_NAME / kind).mkdir(parents=True)
    for number in range(1, 2 * PAIRS + 1):
        (folder / IMAGES_NAME / kind / f"{number}.png").write_bytes(picture("PNG", size=(8, 8)))
    rows = [["Question ID", "Type", "Statement"], *([str(n), kind, f"It is {n}."] for n in range(1, 2 * PAIRS + 1))]

    def text(table: list[list[Any]]) -> bytes:
        buffer = io.StringIO()
        csv.writer(buffer).writerows([*map(str, row)] for row in table if isinstance(row, list))
        return buffer.getvalue().encode(errors="surrogatepass")

    valid = edited(rows).filter(lambda table: isinstance(table, list)).map(text)
    words = (b'"', b",", b"\n", b"\r", b'""', b"\xff", b"99999999999999999999", b"../..", b"a" * 300)
    said = st.lists(st.text("abé猫 ,;\"'\n", min_size=1), min_size=1, max_size=5).map(itertools.cycle)
    other = said.map(lambda texts: text([rows[0], *([*row[:2], f"It {next(texts)}"] for row in rows[1:])]))
    cases = st.one_of(valid, mutated(valid, words), other)  # any statement that is not blank must be taken
    return Kind("MMVP CSVs", CSV_NAME, cases, lambda path: load_benchmark(path.parent), [text(rows)])


def _safetensors() -> Kind:
    model = nn.ModuleDict({"vision_model": nn.Linear(3, 2), "text_model": nn.Linear(2, 2)})
    for number, parameter in enumerate(model.parameters()):
        nn.init.constant_(parameter, number)  # a seed repeats its cases
    whole = save(model.state_dict())
    length = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def packed(value: Any, length: int | None = None) -> bytes:
        text = as_json(value)
        return struct.pack("<Q", len(text) if length is None else length) + text + body

    @st.composite
    def usable(draw: st.DrawFn) -> bytes:
        """Other numbers, another order, other words beside them: what every reader must take, and take rightly."""
        entries: dict[str, Any] = {"__metadata__": draw(st.dictionaries(st.sampled_from(UTF8_NAMES), st.text()))}
        content = b""
        for name in draw(st.permutations(sorted(header))):
            size = len(content) + header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
            entries[name] = {**header[name], "data_offsets": [len(content), size]}
            content += draw(st.binary(min_size=size - len(content), max_size=size - len(content)))
        text = json.dumps(entries).encode() + b" " * draw(st.integers(0, 8))
        return struct.pack("<Q", len(text)) + text + content

    lengths = st.sampled_from((None, None, None, 0, 1, 2**31, 2**63, 2**64 - 1))
    broken = st.builds(packed, edited({**header, "__metadata__": {"format": "pt"}}), lengths)
    words = (b"F64", b"BF16", b"F4", b"18446744073709551615", b'"shape":[0]', b'"__metadata__"')

    def check_numbers(data: bytes) -> None:
        """By a second reader: the file's own header, and its bytes where that says."""
        length = struct.unpack("<Q", data[:8])[0]
        entries, content = json.loads(data[8 : 8 + length]), data[8 + length :]
        for name, parameter in model.named_parameters():
            start, end = entries[name]["data_offsets"]
            if parameter.detach().numpy().tobytes() != content[start:end]:
                raise AssertionError(f"{name} was loaded with other numbers than the file's")

    def read(path: Path) -> None:
        refusals = []
        weights = {path.name: run.sha256(path)}
        (path.parent / MARKER).write_text(json.dumps({"model_type": "clip", "weights": weights}))
        (path.parent / "config.json").write_text('{"model_type": "clip"}')
        (path.parent / "preprocessor_config.json").write_text("{}")
        readers = (
            lambda: load_trained(model, path),
            lambda: verify_tower(path.parent),
            lambda: read_shards(path.parent),
        )
        for reader in readers:
            try:
                reader()
            except InputError as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]
        check_numbers(path.read_bytes())

    cases = st.one_of(usable(), mutated(usable(), words), broken, mutated(broken, words))
    return Kind("safetensors", "weights/model.safetensors", cases, read, [whole])


def _markers(folder: Path) -> Kind:
    (folder / "weights.safetensors").write_bytes(b"x")
    files = {"weights.safetensors": {"bytes": 1, "sha256": run.sha256(folder / "weights.safetensors")}}
    marker = {"steps": 1, "weights_bytes": 1, "files": files, "facts": {}, "model_type": "clip", "weights": {}}

    def read(path: Path) -> None:
        for name in (run.MARKER, MARKER):
            (path.parent / name).write_bytes(path.read_bytes())
        run.complete_facts(path.parent, verify=True)
        with suppress(InputError):
            stage_result(path.parent)
        with suppress(InputError):
            verify_tower(path.parent)

    return Kind("markers", "result.json", json_cases(marker), read, [as_json(marker)])
