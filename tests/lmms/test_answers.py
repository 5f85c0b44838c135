"""What generated replies are read as: a table of replies, other readers beside ours, real questions, and properties."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import other_readers
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from llava_genhancer.evaluate.mllm.answers import (
    CHOICE_RULES,
    LETTERS,
    YES_NO_RULES,
    Reading,
    choice,
    read_choice,
    read_yes_or_no,
    yes_or_no,
)

QUESTIONS: dict[str, tuple[str, ...] | str] = {
    "door": ("Open", "Closed"),
    "notopen": ("open", "not open"),
    "side": ("left", "right"),
    "count": ("2", "3", "13"),
    "cars": ("a red car", "a blue car", "a bicycle", "a bus"),
    "vitamin": ("Vitamin A", "Vitamin C"),
    "samples": ("sample A", "sample B", "neither; the samples have the same temperature"),
    "colour": ("Red", "Blue", "Not specified"),
    "visible": ("It is visible", "It is not visible"),
    "undecided": ("Yes", "No", "Cannot be determined"),
    "above": ("cat", "dog", "None of the above"),
    "yesno": ("Yes, it is", "No, it is not"),
    "easter": ("Happy Easter", "Happy Easter!"),
    "dog": "Is there a dog in the image?",
    "longer": "Is the left line longer than the right line?",
    "land": "Is China the third largest country by land area in the world?",
}
# Why another reader's answer differs. "form": it finds no answer in this wording, or guesses one at random.
REASONS = {
    "lmms_mmvp": {
        "form": "its five patterns know letters only, with few signs around them",
        "any": "takes an A or B wherever one stands, an article and a rejected letter too, A before B",
    },
    "lmms_cv_bench": {
        "form": "reads nothing unless the reply begins with a letter of the alphabet",
        "first": "takes the first letter of any word, offered or not, and nothing after it",
    },
    "lmms_naturalbench": {
        "form": "knows letters and the words yes and no only",
        "first": "takes the first of the two that it finds, an article, a rejected letter and 'no image' too",
    },
    "lmms_scienceqa": {
        "form": "reads a lone letter and 'B. ...' only",
        "first": "takes the first letter before a full stop, corrected or one of a list too",
    },
    "lmms_mmmu": {
        "form": "knows capitals with a space, a bracket or a full stop; otherwise it guesses",
        "last": "takes the last letter or text that it finds, a rejected one too",
    },
    "lmms_mmbench": {
        "form": "knows capitals with few signs around them, or one option's exact text",
        "one": "takes the one letter or text that it finds, also where it is denied, rejected or not offered",
    },
    "llava_scienceqa": {
        "form": "reads a lone capital, 'B. ...' and 'The answer is B.' only",
        "first": "keeps what it finds in those forms: corrected answers, two of them, the first letter of a word",
    },
    "vlmevalkit": {
        "form": "leaves these to its judge",
        "one": "takes the one letter, word or text that it finds, also where it is denied or corrected",
    },
    "lmms_pope": {"form": "compares the whole reply with the truth: a full stop is wrong"},
    "lmms_mme": {
        "form": "looks at the first four characters only",
        "start": "finds 'yes' or 'no' among the first four characters of anything",
    },
    "pope_script": {
        "words": "says no for the words 'No', 'no' and 'not' in the first sentence, and yes to anything else"
    },
}


class Row(NamedTuple):
    question: str
    reply: str
    answer: str | None
    read: str | None  # differs from the right answer in the few rows that are known to be read wrongly
    rule: str
    why: str
    differs: dict[str, str]


def table() -> list[Row]:
    lines = (Path(__file__).parent / "replies.tsv").read_text(encoding="utf-8").splitlines()
    rows = []
    for line in lines[3:]:
        question, reply, answer, rule, why, differs = line.split("\t")
        right, _, wrong = answer.partition("~")
        answers = [None if given == "-" else given for given in (right, wrong or right)]
        reasons = dict(entry.split(":") for entry in differs.split() if entry != "-")
        rows.append(Row(question, json.loads(reply), *answers, rule, why, reasons))
    return rows


def read(question: tuple[str, ...] | str, reply: str) -> Reading:
    return read_yes_or_no(reply, question) if isinstance(question, str) else read_choice(reply, question)


@pytest.mark.parametrize("row", table(), ids=lambda row: f"{row.question}-{row.reply[:40]!r}")
def test_reply(row: Row) -> None:
    assert read(QUESTIONS[row.question], row.reply) == (row.read, row.rule), row.why


def test_the_table_is_whole() -> None:
    rows = table()
    assert len({(row.question, row.reply) for row in rows}) == len(rows) >= 150
    assert {row.question for row in rows} == set(QUESTIONS)
    named = {name for name, _ in (*CHOICE_RULES, *YES_NO_RULES)} | {"empty", "nothing found"}
    assert {row.rule for row in rows} == named
    assert sum(row.read != row.answer for row in rows) <= 5


def test_other_readers_differ_where_the_table_says_so() -> None:
    """A disagreement without its reason, or a reason without its disagreement, fails."""
    for row in table():
        offered = QUESTIONS[row.question]
        found: dict[str, str | None] = {}
        if isinstance(offered, str):
            found = {name: reader(row.reply) for name, reader in other_readers.YES_NO.items()}
        else:
            found = {name: reader(row.reply, offered) for name, reader in other_readers.CHOICE.items()}
            if len(offered) != 2:
                del found["lmms_naturalbench"]  # its letters are A and B
        for name, answer in found.items():
            reason = row.differs.get(name)
            assert (answer != row.answer) == (reason is not None), (row, name, answer)
            assert reason is None or (reason in REASONS[name] and (reason == "form") == (answer is None)), (row, name)
        assert set(row.differs) <= set(found)


# --- real questions --------------------------------------------------------------------------------------------------
DATA = Path(os.environ.get("LLAVA_GENHANCER_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs = pytest.mark.skipif(not (DATA / "HallusionBench.json").exists(), reason="no LLAVA_GENHANCER_TEST_DATA")
# {X}: the right letter, {x}: in lower case, {T}: its text, {Y} and {U}: another option's letter and text.
FORMS = (
    "{X}", "{x}", "({x})", "{X}.", "**{X}**", "{X}. {T}", "({X}) {T}", "{T}", "{T}.", "Answer: {X}", 
    "The answer is {X}.", "The answer is ({x}) {T}.", "The correct answer is {X}. Option {Y} is incorrect.",
    "{X}\n\nOption {Y} is wrong.",
    "{X}. {T}. Option {Y} does not match.", "{X}. {T}\n\n{Y}. {U} does not match the image.",
    "The correct answer is {T}. {U} is incorrect.", "Option {X} is correct, option {Y} is not.",
    "Not {Y} but {X}", "{Y}... wait, {X}", "I can't be sure, but the answer is {X}.", "\\boxed{{{X}}}",
    '{{"answer": "{X}"}}', "<think>{Y}? The answer is {Y}.</think>{X}", "<answer>{X}</answer>",
    "Let me look at the image.\nThe answer is {X}.\nOption {Y} would need more.",
)  # fmt: skip


COMMITMENTS = (
    "{X}", "{X}.", "({X})", "({x}) {T}", "{X}. {T}.", "{X}) {T}", "The answer is {X}.", "The correct answer is {X}.",
    "The correct answer is ({x}) {T}.", "Answer: {X}", "**{X}**", "**{X}. {T}**", "Option {X}",
    "Option {X} is correct.",
    "{T}", "{T}.", "The answer is {T}.", "I would choose {X}.", "It is {X}.", "So {X}.", "So the answer is ({X}).",
    "Based on the image, the answer is {X}.", "Based on the image, the correct answer is:\n\n**{X}. {T}**",
)  # fmt: skip
EXPLANATIONS = (
    "Option {Y} is incorrect.", "Option {Y} does not match.", "{Y} is wrong.", "({Y}) is wrong.", "Not {Y}.",
    "The other option, {Y}, is wrong.", "Option {Y} ({U}) is not correct.", "{U} is incorrect.", "It is not {U}.",
    "Explanation: {Y} is false.", "The reason is that {Y} does not match.", "I cannot see anything for {Y}.",
    "Unlike {Y}, this matches.", "{Y}. {U} is incorrect.", "({y}) {U} is incorrect.", "{Y} would be wrong.",
    "If it were {Y}, the image would differ.", "Therefore, {Y} is not the answer.", "The answer is not {Y}.",
    "So the answer cannot be {Y}.", "Note that {Y} is a distractor.", "Option {Y} shows {U}.", "I cannot see {U} here.",
)  # fmt: skip


def fill(form: str, options: Sequence[str], right: int, other: int) -> str:
    x, y = LETTERS[right], LETTERS[other]
    return form.format(X=x, x=x.lower(), T=options[right], Y=y, y=y.lower(), U=options[other])


def real_options() -> list[tuple[str, ...]]:
    """MMVP-like pairs of two real answers, and all objects of POPE in fours."""
    hallusion = json.loads((DATA / "HallusionBench.json").read_text())
    texts = sorted({row["gt_answer_details"].strip(" .?") for row in hallusion if row["gt_answer_details"]})
    objects = sorted({re.split(r"(?:Is there an? | in the im)", row["text"])[1] for row in pope()})
    halves = zip(texts[::2], texts[1::2], strict=False)
    pairs = [pair for pair in halves if len({text.strip(" .?!").lower() for text in pair}) == 2]
    return pairs + [tuple(objects[i : i + 4]) for i in range(0, len(objects) - 3, 2)]


def pope() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / "coco_pope_adversarial.json").read_text().splitlines()]


@needs
def test_forms_on_real_options() -> None:
    wrong = []
    for options in real_options():
        for i in range(len(options)):
            other = (i + 1) % len(options)
            for form in FORMS:
                reply = fill(form, options, i, other)
                if choice(reply, options) != LETTERS[i]:
                    wrong.append((options, reply, LETTERS[i], read_choice(reply, options)))
    assert not wrong, (len(wrong), wrong[:5])


@needs
def test_explained_answers_on_real_options() -> None:
    """Every commitment before every explanation, in one line and in two."""
    wrong = []
    for options in real_options()[::40]:
        for i in range(len(options)):
            for commitment, explanation, between in itertools.product(COMMITMENTS, EXPLANATIONS, (" ", "\n\n")):
                stop = "." if between == " " and commitment[-1] not in ".*" else ""
                reply = fill(commitment + stop + between + explanation, options, i, (i + 1) % len(options))
                if choice(reply, options) != LETTERS[i]:
                    wrong.append((options, reply, LETTERS[i], read_choice(reply, options)))
    assert not wrong, (len(wrong), wrong[:5])


@needs
def test_sentences_on_real_objects() -> None:
    """POPE's questions answered in sentences; its own script reads those without a contraction alike."""
    for row in pope():
        thing = re.split(r"(?:Is there | in the im)", row["text"])[1]
        yes = (
            f"There is {thing} in the image.",
            f"Yes, there is {thing}.",
            f"The image shows {thing}.",
            f"I can see {thing}.",
        )
        no = (
            f"There is no {thing.split(' ', 1)[1]} in the image.",
            f"No, there is not {thing}.",
            f"There is not {thing}.",
        )
        for answer, replies in (
            ("yes", yes),
            ("no", (*no, f"There isn't {thing} in the image.", f"I don't see {thing}.")),
        ):
            for reply in replies:
                assert yes_or_no(reply, row["text"]) == answer, (row, reply)
                assert yes_or_no(reply) == answer, reply
        assert all(other_readers.pope_script(reply) == "yes" for reply in yes)
        assert all(other_readers.pope_script(reply) == "no" for reply in no)


@needs
def test_real_reference_answers() -> None:
    """HallusionBench's own answers in words: a first yes or no counts, and few sentences are read as the opposite.

    Some of these answers contradict the published yes or no, and some name another year in the question's own words.
    """
    rows = [row for row in json.loads((DATA / "HallusionBench.json").read_text()) if row["gt_answer_details"]]
    rows = [row for row in rows if row["gt_answer_details"] != "No answer"]
    read = wrong = 0
    for row in rows:
        words, truth = row["gt_answer_details"], "yes" if row["gt_answer"] == "1" else "no"
        answer = yes_or_no(words, row["question"])
        read += answer is not None
        wrong += answer not in (None, truth)
        if first := re.match(r"(?i)(yes|no)\b", words):
            assert answer == first[1].lower(), words
        else:
            assert yes_or_no(f"{truth}, {words}", row["question"]) == truth
    assert read > 750
    assert wrong < 0.05 * read


# --- properties ------------------------------------------------------------------------------------------------------
words = st.from_regex(r"[A-Za-z][a-z]{2,9}( [a-z]{3,9}){0,3}", fullmatch=True)
option_lists = st.lists(words, min_size=2, max_size=5, unique_by=str.lower)


def apart(options: Sequence[str]) -> bool:
    """No option's words inside another's, none that the sentences around them use."""
    used = set(
        re.findall(
            r"[a-z']+",
            " ".join((*map(str.lower, FORMS + COMMITMENTS + EXPLANATIONS), "not cannot see here but no so is it wait")),
        )
    )
    lists = [set(option.lower().split()) for option in options]
    return not any(a & b for i, a in enumerate(lists) for b in lists[:i]) and not any(x & used for x in lists)


@settings(max_examples=150, deadline=None)
@given(option_lists, st.data(), st.sampled_from(COMMITMENTS), st.lists(st.sampled_from(EXPLANATIONS), max_size=3))
def test_the_first_committed_answer_counts(
    options: list[str], data: st.DataObject, commitment: str, explained: list[str]
) -> None:
    assume(apart(options))
    right, other = data.draw(st.permutations(range(len(options))))[:2]
    reply = "\n".join(fill(form, options, right, other) for form in (commitment, *explained))
    assert choice(reply, options) == LETTERS[right], (reply, read_choice(reply, options))


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=25).map(str.strip)


@settings(max_examples=150, deadline=None)
@given(st.lists(texts.filter(bool), min_size=2, max_size=5, unique=True))
@example(["Happy Easter", "Happy Easter!"])
@example(["<", ">", "="])
@example(["-3", "3"])
@example(["neither; the samples are alike", "Not specified"])
@example(["US", "us"])
@example([":", "_"])
def test_an_option_s_own_text_is_that_option(options: list[str]) -> None:
    """A single letter is read as the option's letter, since letters are asked for."""
    for letter, option in zip(LETTERS, options, strict=False):
        alone = option.strip(" .,:;!?()[]<>\"'*_`#-").upper()
        assume(not (len(alone) == 1 and alone in LETTERS))
        assert choice(option, options) == letter
        assert choice(f" {option}\n", options) == letter


@settings(max_examples=150, deadline=None)
@given(
    option_lists,
    st.data(),
    st.sampled_from(COMMITMENTS),
    st.sampled_from(("{}", "**{}**", "*{}*", "{}  ", " {}\n", "{}.", "`{}`", "__{}__")),
)
def test_case_emphasis_and_full_stops_change_nothing(
    options: list[str], data: st.DataObject, form: str, around: str
) -> None:
    assume(apart(options))
    right, other = data.draw(st.permutations(range(len(options))))[:2]
    reply = around.format(fill(form, options, right, other))
    for variant in (reply, reply.upper(), re.sub(r"[A-Za-z]{2,}", lambda m: m[0].lower(), reply)):
        assert choice(variant, options) == LETTERS[right], (variant, read_choice(variant, options))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([row for row in table() if isinstance(QUESTIONS[row.question], str)]),
    st.sampled_from(("upper", "lower")),
)
def test_case_of_a_yes_or_no(row: Row, case: str) -> None:
    """Tags, LaTeX and JSON keys aside, which have a case of their own."""
    assert read(QUESTIONS[row.question], getattr(row.reply, case)()).answer == row.read


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80), st.lists(st.text(max_size=12), min_size=1, max_size=8))
def test_any_text_is_read(reply: str, options: list[str]) -> None:
    answer = choice(reply, options)
    assert answer is None or answer in LETTERS[: len(options)]
    assert yes_or_no(reply, options[0]) in ("yes", "no", None)


def replies_of_a_benchmark(number: int) -> list[tuple[tuple[str, ...] | str, str]]:
    """Replies in the shares in which models give them: mostly a letter or a word, some sentences, few refusals."""
    draw, mix = random.Random(0), []
    for i in range(number):
        options = (f"{i % 150} red things", f"{i % 150} blue things")
        right = draw.randrange(2)
        forms = draw.choices(
            (("{X}", "{X}", "{x}", "{X}.", "({X})"), ("{X}. {T}", "({x}) {T}", "{X}) {T}"), ("{T}", "{T}."),
             ("The answer is {X}.", "The correct answer is ({x}) {T}.", "Answer: {X}", "Option {X}"),
             ("The answer is {X}. Option {Y} is incorrect.", "{X}. {T}. It is clear.", "I cannot tell.",
              "It looks like {T}"),
             ("Yes", "No", "Yes.", "No."), ("Yes, there is a dog in the image.", "No, there is no dog in the image."),
             ("There is a dog in the image.", "There is no dog.", "I cannot see the image.", "The answer is yes.")),
            weights=(30, 10, 8, 12, 4, 21, 10, 5),
        )[0]  # fmt: skip
        reply = fill(draw.choice(forms), options, right, 1 - right)
        mix.append((QUESTIONS["dog"] if "es" in reply[:3] or "No" in reply or "dog" in reply else options, reply))
    return mix


def test_speed() -> None:
    """CPU time of one core, which reads about 10^5 replies a second."""
    mix, best = replies_of_a_benchmark(4000), float("inf")
    for _ in range(3):
        start = time.process_time()
        for question, reply in mix:
            read(question, reply)
        best = min(best, time.process_time() - start)
    assert len(mix) / best > 20_000
