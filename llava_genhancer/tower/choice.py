"""Advise how a tower folder gets into a LLaVA fork: which class the fork picks, and what to do where that class fails.

The answer comes from the fork's source as text (:mod:`llava_genhancer.tower.rules`); nothing of the fork is run.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_genhancer.files import expand
from llava_genhancer.tower.export import FIRST_TRANSFORMERS, VISION_MODELS, verify_tower
from llava_genhancer.tower.rules import (
    DROPS_A_PATCH,
    FACTORY,
    Rule,
    Unpredictable,
    find_expectation,
    find_problem,
    find_rule,
    predict,
    tested_words,
)

# The fork loads the folder; another path or option is enough; register() is needed; it cannot be predicted; no way.
WORKS, RENAME, REGISTER, UNKNOWN, IMPOSSIBLE = "works", "rename", "register", "unknown", "impossible"
CLS_PATCH = "--mm_vision_select_feature cls_patch"
_BOUND = r"""(?:===?|[<>~!]=?|@)\s*[^"'\s;#,]+"""
_PACKAGE = Path(__file__).parents[2]
_TRAINERS = ("train_fsdp", "train_mem", "train", "train_xformers")
_EVALUATIONS = ("model_vqa_loader", "model_vqa", "run_llava")


@dataclass(frozen=True)
class Choice:
    """What a fork does with a tower folder.

    Args:
        rule: where the fork picks the class.
        chosen: the picked class's name; None if the fork refuses the path, or if it cannot be predicted.
        verdict: WORKS, RENAME, REGISTER, UNKNOWN or IMPOSSIBLE.
        reason: why, in one line.
        todo: what to do, in one line; empty for WORKS.
        commands: pairs of a title and a shell command, from installing to evaluating.
    """

    rule: Rule
    model_type: str
    chosen: str | None
    verdict: str
    reason: str
    todo: str
    commands: tuple[tuple[str, str], ...]


def fork_choice(fork: str, tower: str) -> Choice:
    """Predict which class a fork builds for a tower folder, and advise what to do about it.

    Args:
        fork: the fork's checkout, or its package's folder.
        tower: a tower folder, written as it would be given to ``--vision_tower``.

    Raises:
        InputError: no builder found in the fork; or the tower's folder is not whole: a file is missing, differs from
            the marker's hash, or lacks weights that config.json asks for.
    """
    from llava_genhancer.tower.tower import check_names

    fork, tower = expand(fork), expand(tower)
    model_type = str(verify_tower(tower)["model_type"])
    check_names(tower)
    rule = find_rule(Path(fork))
    advice = _Advice(rule, Path(fork), tower, model_type)
    try:
        chosen, unset = predict(rule, tower)
        problem = find_problem(rule, model_type, chosen, tower)
    except Unpredictable as error:
        return advice.unknown(str(error))
    condition = f" (as long as {', '.join(unset)} are not set)" if unset else ""
    if problem is None:
        return advice.choice(chosen, WORKS, f"loads {model_type} folders{condition}", "", advice.by_path(tower))
    return advice.mend(chosen, problem + condition, problem)


@dataclass(frozen=True)
class _Advice:
    """The remedies for one fork and one tower."""

    rule: Rule
    fork: Path
    tower: str
    model_type: str

    def choice(
        self, chosen: str | None, verdict: str, reason: str, todo: str, commands: list[tuple[str, str]]
    ) -> Choice:
        return Choice(self.rule, self.model_type, chosen, verdict, reason, todo, tuple(commands))

    def mend(self, chosen: str | None, reason: str, problem: str) -> Choice:
        """The remedies where the fork's class does not load the folder by its path: another path first."""
        blocked, launch = self.launcher()
        other = f"; or {launch}" if blocked is None else ""
        if problem == DROPS_A_PATCH:
            other = "" if self.rule.builder.saves_tower else other  # VILA needs the option with the launcher too
            return self.choice(chosen, RENAME, reason, f"give {CLS_PATCH}{other}", self.by_path(self.tower, CLS_PATCH))
        name, option = next(self.names(), ("", ""))
        if name:
            todo = f"move or link the folder to {name}, below the folder you train in, and give that path"
            link = f"{self.at_root}mkdir -p {os.path.dirname(name)} && ln -s {shlex.quote(self.absolute)} {name}"
            commands = [("link", link)]
            if self.rule.builder is FACTORY:
                todo, commands = f"give --vision_tower {name}", []
            todo += f", and {option}" if option else ""
            return self.choice(chosen, RENAME, reason, todo + other, commands + self.by_path(name, option))
        if blocked is not None:
            newer = self.registered() if blocked == self.too_old() else []
            return self.choice(chosen, IMPOSSIBLE, reason, blocked, newer)
        return self.choice(chosen, REGISTER, reason, launch, self.registered())

    def unknown(self, reason: str) -> Choice:
        """What is left where the source does not decide: the words the builder looks for, and what works anyway."""
        words = ", ".join(f"'{word}'" for word in tested_words(self.rule))
        reason = f"cannot be predicted without running the fork ({reason})"
        reason += f"; it looks for {words} in the path" if words else ""
        blocked, launch = self.launcher()
        if blocked is not None:
            clip = "a CLIP tower is an ordinary CLIP folder: give the path and check that training names no missing key"
            return self.choice(None, UNKNOWN, reason, clip if self.model_type == "clip" else blocked, [])
        builds = "llava_genhancer's class is built whatever the builder picks"
        if self.model_type == "clip":
            builds = "the fork's own class is kept if it takes the folder, and llava_genhancer's class is built if not"
        return self.choice(None, UNKNOWN, reason, f"{launch}: {builds}", self.registered())

    def launcher(self) -> tuple[str | None, str]:
        """Why starting by the launcher does not help, or None; and the advice to do so."""
        launch = f"start training as `python -m llava_genhancer.launch {self.trainer} ...`"
        launch += f" with {CLS_PATCH}" if self.launch_option else ""
        launch += ", or call llava_genhancer.tower.register() first"
        if not self.rule.registers:
            reason = f"register() does not reach {self.rule.path.name}: use a CLIP tower, or return "
            return f"{reason}llava_genhancer.tower.tower.VisionTower(path, config) in {self.rule.function}", launch
        expected = find_expectation(self.rule)
        if expected is not None:
            clip = self.model_type != "clip" and "returns" in expected
            other = "a CLIP tower that the fork loads itself" if clip else "another fork"
            return f"llava_genhancer's class cannot replace the fork's own: {expected}; use {other}", launch
        if self.rule.builder.saves_tower and self.model_type == "siglip2":
            return "the fork reads the tower it saved with a class of its own: use a CLIP or SigLIP tower", launch
        return self.too_old(), launch

    @property
    def launch_option(self) -> str:
        """VILA reads the tower back with its own class, which drops a patch of SigLIP without this option."""
        return f" {CLS_PATCH}" if self.rule.builder.saves_tower and self.model_type != "clip" else ""

    def names(self) -> Iterator[tuple[str, str]]:
        """Paths with which the fork's own class loads the folder, each with the option it needs."""
        words = [w.strip("/") for w in tested_words(self.rule) if re.fullmatch(r"[\w./-]+", w) and ".." not in w]
        made = [f"{word}-{end}" for word in words for end in ("{name}", "enhanced")]
        for pattern in (*self.rule.builder.new_names, *made, *(f"towers/{pattern}" for pattern in made)):
            name = pattern.format(name=Path(self.tower).absolute().name, path=self.absolute)
            try:
                chosen, _ = predict(self.rule, name, exists=lambda path: True)
                left = find_problem(self.rule, self.model_type, chosen, name)
            except Unpredictable:
                continue
            if left is None or left == DROPS_A_PATCH:
                yield name, CLS_PATCH if left else ""

    # --- the fork's transformers

    def too_old(self) -> str | None:
        """What to do if the transformers that the fork pins lacks the model's vision class, or None."""
        pin, first = pin_of(self.rule.path, self.fork), FIRST_TRANSFORMERS[self.model_type]
        if not pin or not excludes(pin, first):
            return None
        return (
            f"the fork pins {pin}, but {VISION_MODELS[self.model_type]} in llava_genhancer's class needs transformers "
            f"{first} or newer, so llava_genhancer.launch fails there: install {first} or newer in the fork's "
            f"environment, check that the fork still trains with it, then start training as `python -m "
            f"llava_genhancer.launch {self.trainer} ...`; or use a CLIP tower"
        )

    # --- command lines

    @property
    def absolute(self) -> str:
        return str(Path(self.tower).absolute())

    @property
    def package(self) -> Path:
        """PACKAGE of PACKAGE/model/multimodal_encoder/builder.py, or of PACKAGE/model/vision_tower/__init__.py."""
        return self.rule.path.parents[2] if self.rule.registers else self.rule.path.parents[1]

    @property
    def root(self) -> Path:
        """The folder the fork's modules are imported from."""
        root = self.package.parent
        while (root / "__init__.py").is_file():
            root = root.parent
        return root

    @property
    def at_root(self) -> str:
        return f"cd {shlex.quote(str(self.root.absolute()))} && "

    def module(self, folder: str, names: tuple[str, ...], fallback: str) -> str:
        found = find_module(self.package, folder, names)
        package = ".".join(self.package.relative_to(self.root).parts)
        return fallback if found is None else f"{package}.{folder}.{found}"

    @property
    def trainer(self) -> str:
        return self.module("train", _TRAINERS, "TRAINER")

    def argument(self, path: str) -> str:
        """The tower's argument on the trainer's command line."""
        template = self.rule.builder.argument
        return template.format(path if "'" in template else shlex.quote(path))

    def by_path(self, path: str, option: str = "") -> list[tuple[str, str]]:
        """Training and evaluating with the fork's own scripts."""
        option = f" {option}" if option else ""
        kept = (
            ""
            if self.rule.builder.saves_tower
            else f"; keep {path}: checkpoints store this path and load the tower from it"
        )
        return [
            ("train", f"the fork's own script, with {self.argument(path)}{option}"),
            ("evaluate", f"the fork's own scripts{kept}"),
        ]

    def registered(self) -> list[tuple[str, str]]:
        """Installing the adapter, training and evaluating with llava_genhancer's class."""
        checkout = str(_PACKAGE) if (_PACKAGE / "pyproject.toml").is_file() else "/path/to/llava_genhancer's checkout"
        launch, given = "-m llava_genhancer.launch", self.argument(self.absolute) + self.launch_option
        install = f"python -m pip install --no-deps {shlex.quote(checkout)}"
        several = f"deepspeed --module llava_genhancer.launch {self.trainer} {given} ..."
        lines = [
            ("install", f"{install}   # in the fork's environment; Python 3.10 or newer"),
            ("check", f"python -c 'from transformers import {VISION_MODELS[self.model_type]}'"),
            ("train", f"{self.at_root}python {launch} {self.trainer} {given} ..."),
            ("several GPUs", f"{self.at_root}{several}"),
        ]
        if self.too_old():
            pair = {"4.37": "transformers==4.37.2 tokenizers==0.15.1", "4.50": '"transformers>=4.50,<5"'}
            newer = pair[FIRST_TRANSFORMERS[self.model_type]]
            lines.insert(0, ("transformers", f"python -m pip install {newer}   # in the fork's environment"))
        if self.rule.builder.saves_tower:
            return [*lines, ("evaluate", "the fork's own scripts: the checkpoint holds the tower")]
        evaluation = self.module("eval", _EVALUATIONS, "EVALUATION_MODULE")
        return [
            *lines,
            ("evaluate", f"{self.at_root}python {launch} {evaluation} --model-path CHECKPOINT ..."),
            ("or in Python", "from llava_genhancer.tower import register; register()   # before the checkpoint loads"),
        ]


def find_module(package: Path, folder: str, names: tuple[str, ...] = _EVALUATIONS) -> str | None:
    """The first of some modules that a fork's package has in a folder: its trainer, its evaluation."""
    return next((name for name in names if (package / folder / f"{name}.py").is_file()), None)


def pin_of(path: Path, fork: Path) -> str:
    """The requirement on transformers in the project files nearest above a file, as written, or ''."""
    for folder in path.parents:
        for name in ("pyproject.toml", "setup.py", "setup.cfg", "requirements.txt"):
            try:
                text = (folder / name).read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            found = re.search(rf"(?<![\w.-])transformers\s*(?:\[[\w,]*\]\s*)?({_BOUND}(?:\s*,\s*{_BOUND})*)", text)
            if found:
                return f"transformers{found[1]}"
        if folder == fork.parent:  # where --fork is the package's folder, its project file lies one above
            break
    return ""


def excludes(pin: str, needed: str) -> bool:
    """Whether a requirement on transformers allows no release from ``needed`` on; False for one of a commit."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import Version

    try:
        allowed = SpecifierSet(pin.removeprefix("transformers"))
    except InvalidSpecifier:
        return False
    releases = [f"{major}.{minor}.{patch}" for major in (4, 5) for minor in range(100) for patch in range(5)]
    return not any(Version(release) >= Version(needed) and allowed.contains(release) for release in releases)
