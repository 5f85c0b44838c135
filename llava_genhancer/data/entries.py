"""The entries of a large JSON list one after the other, each with its place in the file; little of it is in memory."""

from __future__ import annotations

import codecs
import gc
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from llava_genhancer.errors import InputError, reason

BLOCK_BYTES = 1 << 18
MAX_CHARACTERS = 1 << 20  # of one entry, a thousand times the usual; lists of lists take 24 times as much memory
_BETWEEN = re.compile(r"[\s,\ufeff]*")


class Entry(NamedTuple):
    """A parsed entry and the bytes that it takes in the file."""

    value: Any
    start: int
    size: int


def read_entries(path: str, digest: Any = None) -> Iterator[Entry]:
    """The entries of a JSON list, or the lines of a JSON Lines file.

    Args:
        digest: a hashlib object that gets to see the whole file, if wanted.

    Raises:
        InputError: the file cannot be read, is not JSON, or ends before the list does.
    """
    decoder = json.JSONDecoder()
    try:
        with open(path, "rb") as file:
            window = _Window(file, digest)
            listed = window.skip() == "["
            if listed:
                window.advance(window.at + 1)
            number = 0
            while (character := window.skip()) and not (listed and character == "]"):
                value, end = _parse(decoder, window, f"data {path}: entry {number}")
                start = window.byte
                window.advance(end)
                yield Entry(value, start, window.byte - start)
                number += 1
            if listed and not character:
                raise InputError(f"data {path} ends after {number} entries without closing its list: is it whole?")
            if listed:
                window.advance(window.at + 1)
                if character := window.skip():
                    raise InputError(
                        f"data {path}: {character!r} follows the end of its list, after {number} entries: join several "
                        "files into one list"
                    )
            while digest is not None and window.read_more():
                window.advance(len(window.text))
    except UnicodeDecodeError:
        raise InputError(f"data {path} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"data {path} cannot be read: {error.strerror or error}") from None


def image_names(entry: dict[str, Any]) -> list[str]:
    """Return the image paths that an entry of LLaVA's JSON gives as ``image`` or ``images``, a path or a list of paths.

    null, "", [] and NaN (which pandas writes) are no image.

    Raises:
        ValueError: something else than paths, or both keys with different paths; the message says what was found.
    """
    given: list[list[str]] = []
    for key in ("image", "images"):
        value = entry.get(key)
        if not value or value != value:
            continue
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"'{key}' must be a path or a list of paths, not {json.dumps(value)[:80]}")
        given.append(names)
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError(f"'image' and 'images' differ: {given[0]} and {given[1]}"[:160])
    return given[0] if given else []


class _Window:
    """A stretch of the file as text; ``at`` is where reading stands in it, ``byte`` where that is in the file."""

    def __init__(self, file: BinaryIO, digest: Any):
        self.file, self.digest = file, digest
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.byte, self.ended = "", 0, 0, False

    def advance(self, to: int) -> None:
        """Go on to that character of the text."""
        self.byte += len(self.text[self.at : to].encode())
        self.at = to

    def read_more(self) -> bool:
        """Add a block and forget what is behind; False once the file has ended."""
        if self.ended:
            return False
        block = self.file.read(BLOCK_BYTES)
        if self.digest is not None:
            self.digest.update(block)
        self.ended = not block
        self.text, self.at = self.text[self.at :] + self.decoder.decode(block, final=self.ended), 0
        return True

    def skip(self) -> str:
        """The next character that is no space, comma or byte-order mark; "" at the end."""
        while True:
            match = _BETWEEN.match(self.text, self.at)
            assert match is not None
            self.advance(match.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read_more():
                return ""


def _decoded(decoder: json.JSONDecoder, window: _Window) -> tuple[Any, int]:
    """The value at the window's place; a collector that looks through the whole process for every list waits."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return decoder.raw_decode(window.text, window.at)
    finally:
        if collects:
            gc.enable()


def _parse(decoder: json.JSONDecoder, window: _Window, name: str) -> tuple[Any, int]:
    """The entry at the window's place and where it ends; the window grows until it holds all of it."""
    while True:
        problem = "too long"
        try:
            value, end = _decoded(decoder, window)
            if end < len(window.text) or window.ended:  # a number goes on in the next block, maybe
                return value, end
        except json.JSONDecodeError as error:
            problem = error.msg
        except (ValueError, RecursionError) as error:  # a number of a thousand digits, lists within lists
            raise InputError(f"{name} cannot be used ({reason(error)})") from None
        seen = len(window.text) - window.at
        if seen > MAX_CHARACTERS or not window.read_more():
            raise InputError(f"{name} is not valid JSON ({problem})")
        while len(window.text) - window.at < 2 * seen and window.read_more():  # each try parses from the start
            pass
