"""Everything that can be wrong with a set or a tower: one clear line that names it."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mmvp.data import load_benchmark
from llava_genhancer.evaluate.mmvp.measure import run
from llava_genhancer.evaluate.towers import load_tower


@pytest.fixture
def broken(benchmark_dir, with_own_questions, tmp_path) -> Path:
    """A set whose questions may be broken."""
    return with_own_questions(benchmark_dir, tmp_path / "set")


@pytest.fixture
def broken_images(benchmark_dir, tmp_path) -> Path:
    """A set whose images may be broken."""
    return Path(shutil.copytree(benchmark_dir, tmp_path / "set"))


def lines(folder: Path) -> list[str]:
    return (folder / "Questions.csv").read_text(encoding="utf-8").splitlines()


def rewrite(folder: Path, rows: list[str]) -> None:
    (folder / "Questions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def fails(path, match: str) -> str:
    with pytest.raises(InputError, match=match) as caught:
        load_benchmark(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_folder_its_parent_and_the_csv_are_all_accepted(benchmark_dir):
    first = load_benchmark(benchmark_dir)
    assert len(first.pairs) == 135
    assert first.pairs[3].ids == (7, 8)
    assert first.pairs[3].truth == (0, 1)
    assert first.pairs[3].images[1].name == "8.jpg"
    assert first.pairs[0].statements[0] == 'the blue, "blue" blue 1'
    assert load_benchmark(benchmark_dir.parent) == first
    assert load_benchmark(benchmark_dir / "Questions.csv") == first


def test_a_bom_blank_lines_and_windows_line_ends_are_harmless(broken):
    rows = lines(broken)
    (broken / "Questions.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*rows[:5], "", *rows[5:], "", ""]).encode())
    assert [p.ids for p in load_benchmark(broken).pairs] == [(i, i + 1) for i in range(1, 270, 2)]


def test_png_where_there_is_no_jpg(broken_images):
    path = broken_images / "MLLM_VLM Images" / "Orientation" / "4.jpg"
    Image.open(path).save(path.with_suffix(".png"))
    path.unlink()
    assert load_benchmark(broken_images).pairs[1].images[1].name == "4.png"


def test_other_pixels_make_another_set(benchmark_dir, broken_images):
    before = load_benchmark(broken_images).sha256
    assert before == load_benchmark(benchmark_dir).sha256
    Image.new("RGB", (9, 9)).save(broken_images / "MLLM_VLM Images" / "Text" / "230.jpg")
    assert load_benchmark(broken_images).sha256 != before


def test_both_images_lie_under_the_first_rows_type(broken):
    rows = lines(broken)
    rows[2] = rows[2].replace("Orientation", "Elsewhere")
    rewrite(broken, rows)
    assert load_benchmark(broken).pairs[0].images[1].parent.name == "Orientation"


def test_truth_goes_by_the_parity_of_the_id(broken, caplog):
    rows = lines(broken)
    rows[1], rows[2] = rows[2], rows[1]
    rewrite(broken, rows)
    pair = load_benchmark(broken).pairs[0]
    assert pair.ids == (2, 1)
    assert pair.truth == (1, 0)
    assert "1 of 135 pairs" in caplog.text


def test_no_folder_no_csv_no_images(tmp_path, broken, with_own_questions):
    fails(tmp_path / "nowhere", "nowhere is not a folder")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", r"no Questions.csv.*MLLM_VLM Images")
    with_own_questions(broken, tmp_path / "two" / "a")
    with_own_questions(broken, tmp_path / "two" / "b")
    fails(tmp_path / "two", "2 folders with a Questions.csv")
    (broken / "MLLM_VLM Images").rename(broken / "images")
    fails(broken, "no folder 'MLLM_VLM Images'")


@pytest.mark.parametrize(
    ("row", "text", "match"),
    [
        (0, "1,Orientation,no header at all", "line 1: the header is '1,Orientation"),
        (0, "Question ID,Statement", "line 1: the header"),
        (0, "", "line 1: the header is ''"),
        (4, "4,Orientation,with, a comma", "line 5: 4 columns instead of 3"),
        (4, "4,Orientation", "line 5: 2 columns instead of 3"),
        (4, "four,Orientation,text", "line 5: the id 'four' is not an integer"),
        (4, "4.0,Orientation,text", "line 5: the id '4.0' is not an integer"),
        (3, "3,../secrets,text", "line 4: the type '../secrets'"),
        (3, "3,,text", "line 4: the type ''"),
        (4, "4,Orientation,", "line 5: the statement is empty"),
        (4, '4,Orientation,"never closed', r"not CSV"),
        (4, "3,Orientation,text", "lines 4 and 5: both rows of a pair have id 3"),
        (3, "3,Orientations,text", "line 4: type 'Orientations' has no folder"),
        (4, "999,Orientation,text", r"line 5: image .*999\.jpg is missing"),
    ],
)
def test_a_malformed_row_is_named(broken, row, text, match):
    rows = lines(broken)
    rows[row] = text
    rewrite(broken, rows)
    fails(broken, match)


STATEMENTS = [
    '"GO" sign on the wall',
    '"quoted" and "again"',
    '"two ""doubled"" quotes"',
    'a ""doubled"" pair outside of quotes',
    'ends with a "word"',
    '"commas, inside, of quotes"',
    '"a comma, then" words behind',
    '"two\nlines"',
    '"two\r\nlines and a ""quote"""',
    "  blanks around  ",
    "a\ttab and 'single' quotes",
    "“typographic” quotes",
    '""',
    '""""',
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_hostile_statements_are_read_as_the_csv_module_reads_them(broken, end, mark):
    rows = lines(broken)
    for number, statement in enumerate(STATEMENTS, 1):
        rows[number] = f"{number},Orientation,{statement}" if statement != '""' else rows[number]
    path = broken / "Questions.csv"
    path.write_bytes((mark + end.join(rows) + end).encode())
    with open(path, encoding="utf-8-sig", newline="") as file:
        expected = [row[2] for row in csv.reader(file)][1:]
    assert expected[0] == "GO sign on the wall"
    pairs = load_benchmark(broken).pairs
    assert [statement for pair in pairs for statement in pair.statements] == expected
    path.write_bytes((mark + end.join(rows)).encode())  # without an end of line at the end
    assert [statement for pair in load_benchmark(broken).pairs for statement in pair.statements] == expected


@pytest.mark.parametrize(
    ("row", "text", "match"),
    [
        (270, '270,Camera_Perspective,"never closed', "line 271: not CSV .*never closed"),
        (4, '4,Orientation,"closed by row 9', "line 5: the file has 265 rows .* this row goes on to line 10"),
        (4, '4,Orientation,"closed, then" a comma, and more', "line 5: 4 columns instead of 3"),
        (4, '4,Orientation,""', "line 5: the statement is empty"),
    ],
)
def test_a_quote_out_of_place_is_named_by_its_line(broken, row, text, match):
    rows = lines(broken)
    rows[5:9] = [f"{n},Orientation,plain" for n in range(5, 9)]
    rows[9] = '9,Orientation,says "hi'
    rows[row] = text
    rewrite(broken, rows)
    fails(broken, match)


def test_134_pairs_136_pairs_half_a_pair_and_none(broken):
    rows = lines(broken)
    rewrite(broken, rows[:-2])
    fails(broken, "134 pairs instead of 135.*line 269, id 268")
    rewrite(broken, rows[:-1])
    fails(broken, r"269 rows, so the last one \(line 270, id 269\) has no partner")
    rewrite(broken, [*rows, *rows[-2:]])
    fails(broken, "136 pairs instead of 135")
    rewrite(broken, rows[:1])
    fails(broken, "0 pairs instead of 135")


def test_bytes_that_are_no_text(broken):
    (broken / "Questions.csv").write_bytes(b"Question ID,Type,Statement\n1,Orientation,\xff\xfe\n")
    fails(broken, "not UTF-8")


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated"])
def test_a_bad_image_is_named(broken_images, damage):
    path = broken_images / "MLLM_VLM Images" / "Color" / "170.jpg"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-300])
    else:
        path.write_bytes(b"" if damage == "empty" else b"not an image")
    assert "170.jpg" in fails(broken_images, "is missing" if damage == "missing" else "cannot be decoded")


def damaged(tower: Path, tmp_path: Path, *, without: str = "", **config) -> str:
    copy = Path(shutil.copytree(tower, tmp_path / "tower"))
    for path in copy.glob(without or "nothing"):
        path.unlink()
    if config:
        values = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**values, **config}))
    with pytest.raises(InputError) as caught:
        load_tower(str(copy), "cpu")
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)
    return str(caught.value)


def test_no_tower_there(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        load_tower(str(tmp_path / "nothing"), "cpu")
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_tower(str(tmp_path), "cpu")
    with pytest.raises(InputError, match="nobody/knows-this cannot be loaded"):
        load_tower("nobody/knows-this", "cpu")


def test_a_folder_that_is_no_two_tower_model(clip_dir, tmp_path):
    assert "'clip_vision_model' model" in damaged(clip_dir, tmp_path, model_type="clip_vision_model")


def test_a_tower_without_its_companions(clip_dir, siglip_dir, tmp_path):
    assert "preprocessor_config.json" in damaged(clip_dir, tmp_path / "a", without="preprocessor_config.json")
    assert "no tokenizer" in damaged(clip_dir, tmp_path / "b", without="vocab.json")
    assert "no tokenizer" in damaged(siglip_dir, tmp_path / "c", without="spiece.model")


def test_weights_that_are_missing_broken_or_of_another_shape(clip_dir, tmp_path):
    assert "weights cannot be loaded" in damaged(clip_dir, tmp_path / "a", without="model.safetensors")
    copy = Path(shutil.copytree(clip_dir, tmp_path / "cut"))
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match="weights cannot be loaded"):
        load_tower(str(copy), "cpu")
    from safetensors.torch import load_file, save_file

    state = load_file(clip_dir / "model.safetensors")
    copy = Path(shutil.copytree(clip_dir, tmp_path / "vision"))
    vision = {k: v for k, v in state.items() if k.startswith("vision_model.")}
    save_file(vision, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"weights are not in its files \(first: "):
        load_tower(str(copy), "cpu")


def test_a_tokenizer_of_another_model(clip_dir, tmp_path):
    copy = Path(shutil.copytree(clip_dir, tmp_path / "tower"))
    vocab = json.loads((copy / "vocab.json").read_text())
    (copy / "vocab.json").write_text(json.dumps({k: v + 400 for k, v in vocab.items()}))
    with pytest.raises(InputError, match="wrong tokenizer files"):
        load_tower(str(copy), "cpu")


def test_the_marker_and_the_name_say_what_a_tower_is(clip_dir, tmp_path):
    copy = Path(shutil.copytree(clip_dir, tmp_path / "clip-vit-large-patch14"))
    assert load_tower(str(copy), "cpu").backbone is None  # called so, but 16 px
    marker = {"format": 1, "weights": {}, "recipe": {"name": "tiny"}, "source": "toyworld:clip"}
    (copy / "llava_genhancer.json").write_text(json.dumps(marker))
    assert load_tower(str(copy), "cpu").recipe == "tiny"


def test_run_fails_before_it_works(clip_dir, benchmark_dir, tmp_path):
    with pytest.raises(InputError, match="no tower given"):
        run([], benchmark_dir)
    with pytest.raises(InputError, match="1 labels for 2 towers"):
        run([str(clip_dir), str(clip_dir)], benchmark_dir, labels=["a"])
    with pytest.raises(InputError, match=r"ends in \.json"):
        run([str(clip_dir)], benchmark_dir, tmp_path / "table.csv")
    with pytest.raises(InputError, match="cannot be made"):
        run([str(clip_dir)], benchmark_dir, benchmark_dir / "Questions.csv" / "x.json")
    with pytest.raises(InputError, match="device abacus"):
        run([str(clip_dir)], benchmark_dir, device="abacus")
    with pytest.raises(InputError, match="device meta"):
        run([str(clip_dir)], benchmark_dir, device="meta")
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "none"))):
        run([str(tmp_path / "none")], benchmark_dir, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
