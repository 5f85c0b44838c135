"""How others read a reply, for comparison: lmms-eval's own functions, and published rules restated here.

Each reader takes a reply and what was offered (a choice's options; for yes and no, nothing) and returns an answer or
None. A reader that guesses returns None here instead of the guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from unittest import mock

LETTERS = "ABCDEFGH"
Choice = Callable[[str, Sequence[str]], str | None]


def lmms_mmvp(reply: str, options: Sequence[str]) -> str | None:
    from lmms_eval.tasks.mmvp.utils import _extract_answer_letter

    return _extract_answer_letter(reply) or None


def lmms_cv_bench(reply: str, options: Sequence[str]) -> str | None:
    from lmms_eval.tasks.cv_bench.utils import _extract_answer_letter

    return _extract_answer_letter(reply) or None


def lmms_naturalbench(reply: str, options: Sequence[str]) -> str | None:
    from lmms_eval.tasks.naturalbench.utils import extract_answer

    return {1: "A", 0: "B", -1: None}[extract_answer(reply, "multiple_choice")]


def lmms_scienceqa(reply: str, options: Sequence[str]) -> str | None:
    """The letter whose question would be right with this reply."""
    from lmms_eval.tasks.scienceqa.utils import sqa_process_results

    docs = [{"choices": options, "answer": i} for i in range(len(options))]
    return next((LETTERS[d["answer"]] for d in docs if sqa_process_results(d, [reply])["exact_match"]), None)


def lmms_mmmu(reply: str, options: Sequence[str]) -> str | None:
    from lmms_eval.tasks._task_utils.mmmu_mcq_utils import parse_mmmu_multi_choice_response

    letters = list(LETTERS[: len(options)])
    with mock.patch("random.choice", return_value=None):
        return parse_mmmu_multi_choice_response(reply, letters, dict(zip(letters, options, strict=True)))


def lmms_mmbench(reply: str, options: Sequence[str]) -> str | None:
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    evaluator = object.__new__(MMBench_Evaluator)  # its __init__ asks for a key
    return evaluator.can_infer(reply, dict(zip(LETTERS, options, strict=False))) or None


def llava_scienceqa(reply: str, options: Sequence[str]) -> str | None:
    """LLaVA's script: a lone capital, a capital with ". " after it, or exactly one "The answer is X"."""
    letters = LETTERS[: len(options)]
    if len(reply) == 1 and reply in letters:
        return reply
    if reply[1:3] == ". " and reply[0] in letters:
        return reply[0]
    stated = re.findall("The answer is ([A-Z]).", reply)
    return stated[0] if len(stated) == 1 else None


def vlmevalkit(reply: str, options: Sequence[str]) -> str | None:
    """VLMEvalKit before its judge: one capital among the last five words, "answer is X", or one option's text."""
    letters = LETTERS[: len(options)]
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", reply).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if stated := re.search(r"(?i)answer\s+is\s+\**([ABCD])\**", reply):
        return stated[1].upper() if stated[1].upper() in letters else None
    if len(reply) > 2 * sum(map(len, options)):
        return None
    used = [x for x, option in zip(letters, options, strict=True) if option.lower() in reply.lower()]
    return used[0] if len(used) == 1 else None


def lmms_pope(reply: str) -> str | None:
    """The words that lmms-eval's task compares with the truth, letter by letter."""
    from lmms_eval.tasks.pope.utils import pope_process_results

    scores = {t: pope_process_results({"answer": t, "question_id": 0}, [reply]) for t in ("yes", "no")}
    return next((truth for truth, score in scores.items() if score["pope_accuracy"]["score"]), None)


def pope_script(reply: str) -> str | None:
    """POPE's own script: of the first sentence, "no" where it has the word No, no or not; "yes" otherwise."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def lmms_naturalbench_yes_no(reply: str) -> str | None:
    from lmms_eval.tasks.naturalbench.utils import extract_answer

    return {1: "yes", 0: "no", -1: None}[extract_answer(reply, "yes_no")]


def lmms_mme(reply: str) -> str | None:
    from lmms_eval.tasks.mme.utils import parse_pred_ans

    found = parse_pred_ans(reply.lower().strip())
    return found if found in ("yes", "no") else None


def vlmevalkit_yes_no(reply: str) -> str | None:
    """VLMEvalKit before its judge: one of the two words and not the other, signs (but no asterisks) aside."""
    words = low = reply.lower()
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        words = words.replace(sign, "" if sign + " " in low or " " + sign in low else " ")
    words = re.sub(r"(?<!\d)\.(?!\d)", "", words)
    found = {"yes", "no"} & set(words.split())
    return found.pop() if len(found) == 1 else None


CHOICE: dict[str, Choice] = {
    "lmms_mmvp": lmms_mmvp,
    "lmms_cv_bench": lmms_cv_bench,
    "lmms_naturalbench": lmms_naturalbench,
    "lmms_scienceqa": lmms_scienceqa,
    "lmms_mmmu": lmms_mmmu,
    "lmms_mmbench": lmms_mmbench,
    "llava_scienceqa": llava_scienceqa,
    "vlmevalkit": vlmevalkit,
}
YES_NO: dict[str, Callable[[str], str | None]] = {
    "lmms_pope": lmms_pope,
    "lmms_naturalbench": lmms_naturalbench_yes_no,
    "lmms_mme": lmms_mme,
    "pope_script": pope_script,
    "vlmevalkit": vlmevalkit_yes_no,
}
