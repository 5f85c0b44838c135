"""What the sections of a report share: the run's folder, and what is gathered on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.markdown import text
from llava_genhancer.evaluate.words import flat
from llava_genhancer.run import MANIFEST, read_json

STAGES = (1, 2)


class Measured(Protocol):
    """A measured tower, of MMVP-VLM or of zero-shot."""

    @property
    def tower(self) -> str: ...
    @property
    def recipe(self) -> str | None: ...
    @property
    def method(self) -> str | None: ...
    @property
    def source(self) -> str | None: ...


def before_and_after(towers: Sequence[Measured]) -> bool:
    """Returns whether these are two towers, an original one and what a recipe made of that one."""
    if len(towers) != 2:
        return False
    first, other = towers
    made = other.recipe is not None and first.recipe is None and first.method is None
    return made and (other.source is None or _same_place(other.source, first.tower))


def _same_place(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


class Report:
    """A run, and its report as far as it is written.

    Attributes:
        others: runs whose rows stand beside this one's.
        values: the recipe's fields by dotted name; empty where there is no manifest.
        facts: for ``report.json``.
        missing: a line for each thing that is not there or cannot be read.
        drawn: file names in ``figures/``.
        headlines: what the summary says.
        gallery: questions won and lost, as HTML for the page alone.
    """

    def __init__(self, run_dir: Path, others: Sequence[Path] = ()):
        self.run_dir, self.others = run_dir, others
        self.facts: dict[str, Any] = {}
        self.missing: list[str] = []
        self.drawn: list[str] = []
        self.headlines: list[str] = []
        self.gallery = ""
        self.manifest = self.read(MANIFEST, dict) or {}
        recipe = self.manifest.get("recipe")
        self.values = flat(recipe) if isinstance(recipe, dict) else {}

    def read(self, name: str, kind: type) -> Any:
        """A JSON file of the run, or None and a line that says why not."""
        path = self.run_dir / name
        if not path.is_file():
            self.missing.append(f"{name}: not there")
            return None
        try:
            value = read_json(path)
            if not isinstance(value, kind):
                raise InputError(f"it holds no JSON {'object' if kind is dict else 'list'}")
        except InputError as error:
            self.missing.append(f"{name}: cannot be read ({str(error).removeprefix(f'{path} ')})")
            return None
        return value

    def section(self, title: str, make: Callable[[Report], str]) -> str:
        """A section, or a line about why it could not be made: one odd file must not cost the whole report."""
        try:
            return make(self)
        except (InputError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            self.missing.append(f"{title}: its data are not as expected ({type(error).__name__}: {error})")
            return ""

    def figure(self, name: str, caption: str) -> str:
        """The Markdown of a picture that has been drawn."""
        self.drawn.append(name)
        return f"![{text(caption)}](figures/{name})"

    def path(self, figure: str) -> Path:
        """Where a picture is drawn."""
        return self.run_dir / "figures" / figure
