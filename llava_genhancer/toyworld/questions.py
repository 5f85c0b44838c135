"""Questions about a scene's details and their answers, as turns of LLaVA's conversations.

A question comes in one of three forms, each with the words that LLaVA-1.5's own data use: "short" (a word), "letter"
(options to choose from) and "sentence". Which scene, detail, form and wording follows from the random generator alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from llava_genhancer.toyworld.scenes import DETAILS, Scene, caption

FORMS = ("short", "letter", "sentence")
SHORT_SUFFIX = "Answer the question using a single word or phrase."
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEF"
CAPTION_PROBABILITY = 0.5  # how often LLaVA's captions name a detail
# How often a conversation has each form, and with how many questions: options and sentences are long.
FORM_SHARES = (0.7, 0.2, 0.1)
TURNS = {"short": 6, "letter": 1, "sentence": 2}
REQUESTS = ("Describe the picture.", "What do you see?", "Give a short caption.")

QUESTIONS: dict[str, tuple[str, ...]] = {
    "facing": ("Which way does the critter face?", "In which direction does the beak point?"),
    "feature": ("Does the critter have horns or feet?", "Which extra feature does the critter have?"),
    "eyes": ("Are the eyes open or closed?", "In which state are the eyes of the critter?"),
    "count": ("How many balls are there?", "What is the number of balls?"),
    "star": ("Where is the star?", "On which side of the critter is the star?"),
    "colour": ("What colour is the critter?", "Which colour does the critter have?"),
    "texture": ("Which pattern does the critter have?", "What does the texture of the critter look like?"),
    "size": ("Is the critter big or small?", "Which size does the critter have?"),
    "letter": ("Which letter is on the sign?", "What letter can be read?"),
    "view": ("From which side is the critter seen?", "From where do we look at the critter?"),
}
SENTENCES: dict[str, str] = {
    "facing": "The critter faces {}.",
    "feature": "It has {}.",
    "eyes": "The eyes are {}.",
    "count": "There are {}.",
    "star": "The star is {}.",
    "colour": "The critter is {}.",
    "texture": "The pattern is {}.",
    "size": "The critter is {}.",
    "letter": "The letter is {}.",
    "view": "The critter is seen from {}.",
}

Turn = tuple[str, str]  # what the user asks, what the assistant answers


@dataclass(frozen=True)
class Question:
    """A question with every answer that could be given, in ``options``; the right one is ``options[truth]``."""

    detail: str
    text: str
    options: tuple[str, ...]
    truth: int


def answer(detail: str, value: str) -> str:
    """The word for a detail's value."""
    return "neither" if (detail, value) == ("feature", "plain") else value


def question(scene: Scene, detail: str, form: str, rng: Random, *, suffix: bool = True) -> Question:
    """One question about ``scene``, as it stands in the files.

    Args:
        form: one of ``FORMS``. With "letter" the options are listed in random order and the answers are their letters.
        suffix: say in which form the answer is wanted ("short" only; LLaVA says it in a conversation's first turn).
    """
    text = rng.choice(QUESTIONS[detail])
    values = DETAILS[detail]
    truth = values.index(getattr(scene, detail))
    words = tuple(answer(detail, value) for value in values)
    if form == "letter":
        order = rng.sample(range(len(words)), len(words))
        listed = [f"{letter}. {words[i]}" for letter, i in zip(LETTERS, order, strict=False)]
        text = "\n".join([text, *listed, LETTER_SUFFIX])
        return Question(detail, text, tuple(LETTERS[: len(words)]), order.index(truth))
    if form == "sentence":
        return Question(detail, text, tuple(SENTENCES[detail].format(word) for word in words), truth)
    return Question(detail, f"{text}\n{SHORT_SUFFIX}" if suffix else text, words, truth)


def turns(scene: Scene, details: Sequence[str], form: str, rng: Random) -> list[Turn]:
    """A conversation about ``details`` of ``scene``, one turn each, all in one form."""
    asked = [question(scene, detail, form, rng, suffix=i == 0) for i, detail in enumerate(details)]
    return [(q.text, q.options[q.truth]) for q in asked]


def conversation(scene: Scene, rng: Random) -> list[Turn]:
    """A conversation for finetuning, in one of the three forms."""
    form = rng.choices(FORMS, FORM_SHARES)[0]
    return turns(scene, rng.sample(list(DETAILS), TURNS[form]), form, rng)


def text_conversation(scene: Scene, rng: Random) -> list[Turn]:
    """The same with a description where LLaVA puts an image."""
    (first, answered), *rest = conversation(scene, rng)
    return [(f"{description(scene, rng)}\n{first}", answered), *rest]


def description(scene: Scene, rng: Random) -> str:
    """A caption that names every detail."""
    return caption(scene, rng, detail_probability=1.0)


def record(identifier: str, conversation: Sequence[Turn], image: str | None = None) -> dict[str, Any]:
    """One sample of LLaVA's JSON; with an image its placeholder opens the first turn."""
    values = [text for turn in conversation for text in turn]
    if image is not None:
        values[0] = f"<image>\n{values[0]}"
    messages = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(values)]
    return {"id": identifier, **({"image": image} if image is not None else {}), "conversations": messages}
