"""The report as one HTML file: pictures inlined, readable on a phone, in light and dark, without scripts."""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --page: #fff; --soft: #f2f3f5; --line: #d9dce1; --link: #0b57d0;
  --yes: #146c2e; --no: #a3261d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --page: #16181c; --soft: #22252b; --line: #3b4048;
  --link: #8ab4f8; --yes: #7fd494; --no: #f2a19a; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
a { color: var(--link) }
h1, h2, h3 { line-height: 1.25 }
h2 { margin-top: 2.5rem; padding-top: .5rem; border-top: 1px solid var(--line) }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { vertical-align: bottom; white-space: normal; min-width: 4.5rem }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); text-align: left; min-width: 8rem;
  max-width: 40vw; white-space: normal; overflow-wrap: anywhere }
tbody tr:hover td { background: var(--soft) }
code, pre { font: .85rem/1.45 ui-monospace, monospace; background: var(--soft); border-radius: 4px }
code { padding: .1em .3em }
pre { padding: .75rem; overflow-x: auto; overflow-wrap: normal }
pre code { padding: 0 }
img { display: block; max-width: 100%; height: auto; border-radius: 6px }
details { margin: 1rem 0 }
summary { cursor: pointer }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: 1rem }
figure { margin: 0; padding: .75rem; background: var(--soft); border-radius: 8px }
figure img { width: 100% }
figure img.small { max-width: 12rem; image-rendering: pixelated }
figcaption p { margin: .4rem 0; font-size: .9rem; line-height: 1.4 }
.yes { color: var(--yes) }
.no { color: var(--no) }
.none { opacity: .7 }
"""
# The only HTML in our Markdown; whatever else looks like it is shown as it is written.
_OURS = re.compile(r"<details><summary>[^<>]*</summary>|</details>")


def page(title: str, markdown: str, folder: Path, gallery: str = "") -> str:
    """A whole document.

    Args:
        markdown: the report; its pictures are read from ``folder``.
        gallery: finished HTML, put before the last section.
    """
    body, headings = _rendered(markdown, folder)
    if gallery:
        headings.append(("gallery", "Wins and losses"))
        at = body.rfind("<h2")
        body = f'{body[:at]}<div id="gallery">{gallery}</div>{body[at:]}'
    links = "".join(f'<a href="#{name}">{html.escape(words)}</a>' for name, words in headings)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><nav>{links}</nav>\n{body}</body></html>\n"
    )


def _rendered(markdown: str, folder: Path) -> tuple[str, list[tuple[str, str]]]:
    """The body, and the second-level headings by their anchors."""
    from markdown_it import MarkdownIt

    def image(self: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        words = html.escape(tokens[index].content)
        path = folder / str(tokens[index].attrs["src"])
        if path.suffix != ".png" or not path.is_file():
            return words
        return f'<img alt="{words}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'

    def raw(self: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        words = str(tokens[index].content)
        return words if _OURS.fullmatch(words.strip()) else html.escape(words)

    md = MarkdownIt("commonmark", {"html": True}).enable("table")
    md.add_render_rule("image", image)
    md.add_render_rule("html_block", raw)
    md.add_render_rule("html_inline", raw)
    md.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>')
    md.add_render_rule("table_close", lambda *_: "</table></div>")
    tokens = md.parse(markdown)
    headings: list[tuple[str, str]] = []
    for opening, inline in itertools.pairwise(tokens):
        if opening.type == "heading_open" and opening.tag == "h2":
            anchor = f"part-{len(headings) + 1}"
            opening.attrSet("id", anchor)
            headings.append((anchor, "".join(c.content for c in inline.children or ())))
    return md.renderer.render(tokens, md.options, {}), headings
