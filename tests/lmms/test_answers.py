"""What replies in free words are read as."""

import pytest

from llava_genhancer.evaluate.mllm.answers import choice, yes_or_no

ONE_TWO = ("one", "two")
SAY_B = (
    "B", "b", "B.", "(B)", "(b)", "<B>", "**B**", '"B"', "B)", "B:", "B. two", "B) two", "b) two", "(b) two", "b two",
    "B two", "B: two", "B, because it is", "The answer is (B).", "The answer is B.", "the answer is b.", "Answer: B",
    "ANSWER: B", "Final answer: **B**", "The answer is:\n\nB", "The correct answer is B", "The correct option is: B.",
    "Option B", "I choose B.", "so B", "So, the answer is B.", "Therefore, it is B", "Camera is B",
    "I think B is right", "It is (b)", "A is wrong, so B.", "Option A is wrong; the answer is B", "not A but B",
    "two", "Two.", "It is two", "It's not one, it's two",
)  # fmt: skip
SAY_A = ("A", "a", "A.", "(a) one", "a) one", "a. one", "Camera is A", "A is right", "A because", "The answer is A")
SAY_NOTHING = (
    "", "   ", "I cannot tell.", "Sorry, I can't see two", "I'm not sure whether it is one or two",
    "As an AI, I cannot", "A dog stands there", "Based on a picture", "the answer is a dog", "This is a bat.", "C",
    "A or B", "Both A and B", "Neither A nor B", "A. one B. two", "The answer is A or B", "It could be one or two",
    "Not B", "The answer is not B",
)  # fmt: skip


@pytest.mark.parametrize("reply", SAY_B)
def test_second_option(reply: str) -> None:
    assert choice(reply, ONE_TWO) == "B"


@pytest.mark.parametrize("reply", SAY_A)
def test_first_option(reply: str) -> None:
    assert choice(reply, ONE_TWO) == "A"


@pytest.mark.parametrize("reply", SAY_NOTHING)
def test_no_option(reply: str) -> None:
    assert choice(reply, ONE_TWO) is None


@pytest.mark.parametrize(
    ("reply", "options", "letter"),
    [
        ("It is vitamin C.", ("Vitamin A", "Vitamin C"), "B"),
        ("Vitamin C", ("Vitamin A", "Vitamin C"), "B"),
        ("not open", ("open", "not open"), "B"),
        ("It's not open", ("open", "closed"), None),
        ("Yes.", ("Yes", "No"), "A"),
        ("No, it isn't", ("Yes", "No"), "B"),
        ("There are 3 of them", ("2", "3", "13"), "B"),
        ("(E)", ("1", "2", "3", "4", "5"), "E"),
        ("E", ("1", "2"), None),
        ("blue", ("red", "green", "blue"), "C"),
    ],
)
def test_options_of_every_kind(reply: str, options: tuple[str, ...], letter: str | None) -> None:
    assert choice(reply, options) == letter


@pytest.mark.parametrize("reply", ["Yes", "yes.", "YES", "**Yes**", "(Yes)", "Yes, there is.", "The answer is yes."])
def test_yes(reply: str) -> None:
    assert yes_or_no(reply) == "yes"


@pytest.mark.parametrize(
    "reply", ["No", "no.", "No, I cannot see one", "Answer: No", "There is no dog", "There isn't a dog", "It is not"]
)
def test_no(reply: str) -> None:
    assert yes_or_no(reply) == "no"


@pytest.mark.parametrize(
    "reply",
    ["", "There is a dog", "I don't know", "Not sure", "I cannot tell", "No way to tell",
     "Sorry, I cannot say yes or no", "Yes and no", "noted", "eyes"],
)  # fmt: skip
def test_neither(reply: str) -> None:
    assert yes_or_no(reply) is None
