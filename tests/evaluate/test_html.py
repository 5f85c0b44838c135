"""The report as one HTML file: everything in it, nothing out of it, and no name becomes markup."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from llava_genhancer.evaluate.markdown import block, code, table, text
from llava_genhancer.evaluate.report.html import page

ODD = [
    "<script>alert(1)</script>",
    "a|b",
    "`<b>`",
    "<details><summary>x</summary>",
    "[a](javascript:alert(1))",
    "&lt;i>",
]

PLAIN = {
    "html", "head", "meta", "title", "style", "body", "nav", "h1", "div", "table", "thead", "tbody", "tr", "th", "td",
    "code", "pre", "p",
}  # fmt: skip


class Reader(HTMLParser):
    """Tags with attributes, the text outside of style, and whether each tag is closed in its place."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.open = "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data if "style" not in self.open else ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "figures" / "a.png")
    return tmp_path


@pytest.mark.parametrize("odd", ODD)
def test_names_are_shown_as_they_are_written(odd: str, folder: Path) -> None:
    body = "\n\n".join([f"# {text(odd)}", table(["x"], [[code(odd)], [text(odd)]]), block([odd], "text"), text(odd)])
    read = Reader(page(odd, body, folder))
    assert not read.open
    assert {tag for tag, _ in read.tags} <= PLAIN
    assert read.words.count(odd) == 6, "title, heading, two cells, block, paragraph"


def test_raw_markup_is_not_believed(folder: Path) -> None:
    read = Reader(page("t", '<img src=x onerror=alert(1)>\n\nand <b onclick="x">this</b>', folder))
    assert not {"img", "b"} & {tag for tag, _ in read.tags}
    assert "onerror=alert(1)" in read.words


def test_all_is_inside_one_file(folder: Path) -> None:
    body = "\n\n".join(["## One", "![red](figures/a.png)", "![gone](figures/b.png)", "![out](../secret.txt)", "## Two"])
    (folder.parent / "secret.txt").write_text("x")
    made = page("t", body, folder, gallery="<h2>Wins</h2>")
    read = Reader(made)
    (image,) = [attrs for tag, attrs in read.tags if tag == "img"]
    assert (
        base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        == (folder / "figures" / "a.png").read_bytes()
    )
    assert "gone" in read.words
    assert not re.search(r"(src|href)=\"?(https?:|//)|<script|<link|url\(", made)
    assert made.index("Wins</h2>") < made.index("Two</h2>"), "what repeats the run comes last"
    anchors = [attrs["href"] for tag, attrs in read.tags if tag == "a"]
    assert anchors == [f"#{attrs['id']}" for tag, attrs in read.tags if tag == "h2" and "id" in attrs] + ["#gallery"]


def test_our_own_folding_stays(folder: Path) -> None:
    body = "<details><summary>all other fields (3)</summary>\n\ninside\n\n</details>"
    read = Reader(page("t", body, folder))
    assert [tag for tag, _ in read.tags if tag in ("details", "summary")] == ["details", "summary"]
    assert not read.open


def test_light_and_dark_and_a_phones_width(folder: Path) -> None:
    made = page("t", table(["x"], [["y"]]), folder)
    assert "prefers-color-scheme: dark" in made
    assert 'name="viewport" content="width=device-width' in made
    assert '<div class="scroll"><table>' in made, "a wide table scrolls by itself"
