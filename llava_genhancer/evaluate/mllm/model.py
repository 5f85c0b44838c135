"""Our model for lmms-eval: ``--model llava_genhancer --model_args pretrained=RUN/llava-finetune``.

Where a task's options are known (:mod:`llava_genhancer.evaluate.mllm.options`) the answer is the likeliest option, as
in the paper; any other task is answered in the model's own words.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image

from llava_genhancer.data.decode import BadImage, decode
from llava_genhancer.errors import InputError, reason
from llava_genhancer.evaluate.mllm.benchmarks.items import UNANSWERED
from llava_genhancer.evaluate.mllm.options import has_options, options_of
from llava_genhancer.evaluate.mllm.respondent import Ask, Respondent, Score, Unanswerable, one_by_one
from llava_genhancer.evaluate.mllm.start import checkpoint_folder, refusing
from llava_genhancer.llava.chat import load_llava
from llava_genhancer.llava.conversation import TEMPLATES, chat_template, check_template
from llava_genhancer.llava.tokenizer import load_tokenizer

ANSWERS = ("likelihood", "generate")
DTYPES = ("auto", "float32", "bfloat16", "float16")
NAMED = 10  # unanswered documents of a task that are named on stderr; the samples have all of them
MAX_NEW_TOKENS = 256  # for a task that does not say
# What of a task's settings concerns `generate`; sampling's only where it samples.
DECODING = ("max_new_tokens", "num_beams", "repetition_penalty", "do_sample")
SAMPLING = ("temperature", "top_p", "top_k")


class LlavaGenhancer(lmms):
    """A LLaVA of either form, asked as it was trained.

    Args:
        pretrained: a finetuning's folder, a checkpoint in it, or a run; without it ``$LLAVA_GENHANCER_RUN``.
        answer: ``likelihood`` chooses among a task's options where they are known; ``generate`` always writes.
        normalise: divide an option's log-probability by its number of tokens.
        tower: a vision tower to put in the place of the checkpoint's.
        dtype: of the weights; ``auto``: as stored.
        conversation: the prompts' template, for a checkpoint that does not say.
        batch_size: questions at a time.
        device: default: this process's GPU if there is one.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        answer: str = "likelihood",
        normalise: bool = False,
        tower: str | None = None,
        dtype: str = "auto",
        conversation: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        with refusing():
            _check("answer", answer, ANSWERS)
            _check("dtype", dtype, DTYPES)
            _check("normalise", normalise, (True, False))
            if unknown:
                raise InputError(f"--model_args: {', '.join(unknown)}: no such argument of llava_genhancer")
            if not str(batch_size).isdecimal() or int(batch_size) < 1:
                raise InputError(f"--batch_size {batch_size}: give a number of questions")
            self.batch_size = int(batch_size)
            self.by_likelihood, self.normalise = answer == "likelihood", normalise
            self.device = _own_device(device)
            folder = checkpoint_folder(str(pretrained))
            model, processor = load_llava(
                folder,
                device=str(self.device),
                tower=tower,
                dtype=None if dtype == "auto" else getattr(torch, dtype),
            )
            tokenizer = load_tokenizer(str(folder))
            template = conversation or trained_with(processor.chat_template, folder)
            check_template(template, tokenizer)
            self.respondent = Respondent(model, processor.image_processor, tokenizer, template)

    def clean(self) -> None:
        """Free the device for a judge."""
        del self.respondent
        super().clean()

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Returns an answer to each document.

        A document that cannot be answered (too long, no options to choose among, an unreadable image, no memory for
        the document alone) ends nothing: it is named on stderr, and its reply is the reason, behind ``UNANSWERED``, in
        our tasks and nothing in others'.
        """
        with refusing():
            asked = [r.args for r in requests]
            answers: dict[int, str] = {}
            failed: dict[int, Unanswerable] = {}
            for chosen, numbers in self._batches(asked):
                before = self.respondent.at_once

                def answer(part: Sequence[int], chosen: bool = chosen) -> list[str]:
                    return self._answered([asked[n] for n in part], chosen)

                for number, said in zip(numbers, one_by_one(answer, numbers), strict=True):
                    if not isinstance(said, Unanswerable):
                        answers[number] = said
                        continue
                    self.respondent.at_once = before  # one document's size does not slow down all others
                    failed[number] = said
                    answers[number] = f"{UNANSWERED}{said}" if _is_ours(asked[number][2]) else ""
                # Where memory holds nothing at all, each of some thousand documents would be tried in vain.
                if len(failed) == len(answers) >= NAMED and "out of memory" in str(failed[numbers[-1]]):
                    raise InputError(f"none of the first {len(failed)} documents: {failed[numbers[-1]]}")
            self._report(asked, failed)
            return [answers[n] for n in range(len(asked))]

    def _answered(self, batch: Sequence[tuple[Any, ...]], chosen: bool) -> list[str]:
        """The answers to a batch of requests that are answered alike.

        Raises:
            Unanswerable: a document of the batch is too long or has no options, or memory or decoder refuse its images.
        """
        docs, asks = [], []
        for args in batch:
            try:
                docs.append(self._doc(*args[3:]))
                asks.append(ask(args[0], args[2](docs[-1])))
            except InputError:
                raise
            except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
                raise Unanswerable(f"its image cannot be read ({reason(error)})") from None
        if not chosen:
            return self._say(asks, batch[0][1])
        options = [options_of(args[4], doc) or [] for args, doc in zip(batch, docs, strict=True)]
        if not all(options):
            raise Unanswerable("it has no options to choose among")
        return [own[i] for own, i in zip(options, self._best(asks, options), strict=True)]

    def _report(self, asked: Sequence[tuple[Any, ...]], failed: Mapping[int, Unanswerable]) -> None:
        """Names the documents without an answer on stderr.

        Raises:
            InputError: no document was answered, in the only process.
        """
        counts = Counter(asked[number][4] for number in failed)
        shown: Counter[str] = Counter()
        for number, error in failed.items():
            place, task = asked[number][3:5]
            shown[task] += 1
            if shown[task] <= NAMED:
                _say(f"task {task}, document {place} has no answer: {error}")
        for task, many in counts.items():
            total = sum(args[4] == task for args in asked)
            _say(f"task {task}: {many} of {total} documents have no answer and count as wrong")
        if failed and len(failed) == len(asked) and self.world_size == 1:
            raise InputError(f"none of the {len(asked)} documents was answered: {next(iter(failed.values()))}")

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """Each document's answers round by round; what is asked next, the task makes of the answers so far."""
        with refusing():
            said = []
            for r in self._progress(requests):
                try:
                    said.append(self._rounds(*r.args))
                except Unanswerable as error:
                    raise InputError(f"task {r.args[5]}, document {r.args[4]}: {error}") from None
            return said

    def _rounds(
        self, text: str, settings: Mapping[str, Any], images: Callable, next_round: Callable, *place: Any
    ) -> list[str]:
        doc = self._doc(*place)
        shown, said, facts = images(doc), [], None  # type: Any, list[str], Any
        while True:
            said += self._say([ask(text, shown)], settings)
            shown, text, ends, said, facts = next_round(
                doc, previous_output=list(said), round_idx=len(said), previous_round_info=facts
            )
            said = list(said)
            if ends:
                return said

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The loss of each continuation, as lmms-eval's ``multiple_choice`` takes it: the smallest is the answer.

        It is the negative log-probability of the continuation as a whole reply, divided by its tokens with
        ``normalise``; beside it, whether greedy decoding would give that reply.
        """
        with refusing():
            questions: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
            asked = [r.args for r in requests]
            for number, (text, _, _, *place) in enumerate(asked):
                questions[(text, *place)].append(number)
            losses: dict[int, tuple[float, bool]] = {}
            for batch in _parts(self._progress(list(questions.values())), self.batch_size):
                docs = [self._doc(*asked[own[0]][3:]) for own in batch]
                asks = [ask(asked[own[0]][0], asked[own[0]][2](doc)) for own, doc in zip(batch, docs, strict=True)]
                replies = [[_text(asked[n][1], doc) for n in own] for own, doc in zip(batch, docs, strict=True)]
                for own, scores in zip(batch, self._scored(asks, replies, [asked[n[0]] for n in batch]), strict=True):
                    losses |= {n: (-self._value(s), s.greedy) for n, s in zip(own, scores, strict=True)}
            return [losses[n] for n in range(len(asked))]

    def _scored(
        self, asks: Sequence[Ask], replies: Sequence[Sequence[str]], asked: Sequence[tuple[Any, ...]]
    ) -> list[list[Score]]:
        """Scores of each question's replies; no loss stands for "not answered", so that an error names its document."""
        found: list[list[Score]] = []
        pairs = list(zip(asks, replies, strict=True))
        scored = one_by_one(lambda part: self.respondent.score(*zip(*part, strict=True)), pairs)
        for scores, args in zip(scored, asked, strict=True):
            if isinstance(scores, Unanswerable):
                raise InputError(f"task {args[4]}, document {args[3]}: {scores}") from None
            found.append(scores)
        return found

    def _batches(self, asked: Sequence[tuple[Any, ...]]) -> Iterator[tuple[bool, list[int]]]:
        """Numbers of requests that can be answered together, and whether by choosing; the longest come first."""
        groups: defaultdict[tuple[bool, str], list[int]] = defaultdict(list)
        for number, (_, settings, _, _, task, _) in enumerate(asked):
            chosen = self.by_likelihood and has_options(task)
            groups[chosen, "" if chosen else repr(sorted(settings.items()))].append(number)
        for (chosen, _), numbers in groups.items():
            numbers.sort(key=lambda n: -len(asked[n][0]))
            for part in _parts(self._progress(numbers), self.batch_size):
                yield chosen, part

    def _best(self, asks: Sequence[Ask], options: Sequence[Sequence[str]]) -> list[int]:
        """Which option of each question is the likeliest."""
        scores = self.respondent.score(asks, options)
        return [max(range(len(own)), key=lambda i: self._value(own[i])) for own in scores]

    def _value(self, score: Score) -> float:
        return score.mean if self.normalise else score.total

    def _say(self, asks: Sequence[Ask], settings: Mapping[str, Any]) -> list[str]:
        """Answers in words, cut where the task says so."""
        ends = settings.get("until") or []
        said = self.respondent.say(asks, **decoding(settings))
        for end in [ends] if isinstance(ends, str) else ends:
            said = [text.split(end)[0] for text in said] if end else said
        return said

    def _doc(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _progress(self, work: Sequence[Any]) -> Iterator[Any]:
        from tqdm import tqdm

        return iter(tqdm(work, desc="answers", disable=self.rank != 0 or None))


def ask(text: str, visuals: Sequence[Any] | None) -> Ask:
    """A task's prompt and what it shows.

    Raises:
        Unanswerable: an image cannot be read.
        InputError: it is no image.
    """
    return Ask.about(text, [_picture(visual) for visual in visuals or () if visual is not None])


def _picture(visual: Any) -> Image.Image:
    if isinstance(visual, Image.Image):
        return visual.convert("RGB")
    if not isinstance(visual, (str, os.PathLike)):
        raise InputError(f"a task shows a {type(visual).__name__}: this model takes images only")
    try:
        return decode(visual)
    except BadImage as error:
        raise Unanswerable(f"{visual} cannot be used: {error}") from None


def _is_ours(doc_to_visual: Any) -> bool:
    """Returns whether a request's task is ours, whose parser never reads a reason; by the task's version."""
    return str(getattr(getattr(doc_to_visual, "__self__", None), "VERSION", "")).startswith("genhancer")


def _say(text: str) -> None:
    print(f"llava_genhancer: {text}", file=sys.stderr, flush=True)


def decoding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A task's ``generation_kwargs`` as transformers' own; without a temperature above 0 nothing is sampled."""
    samples = settings.get("do_sample", settings.get("temperature") or 0) and settings.get("temperature", 1)
    known = (*DECODING, *SAMPLING) if samples else DECODING
    chosen = {name: settings[name] for name in known if settings.get(name) is not None}
    return {"max_new_tokens": MAX_NEW_TOKENS, **chosen, "do_sample": bool(samples)}


def trained_with(jinja: str | None, folder: Path) -> str:
    """The name of the conversation template that a processor's chat template is.

    Raises:
        InputError: it is none of ours.
    """
    for name in TEMPLATES:
        if jinja == chat_template(name):
            return name
    raise InputError(
        f"{folder} does not say which conversation template it was trained with: "
        f"add conversation=NAME to --model_args, v1 for LLaVA-1.5 (known: {', '.join(TEMPLATES)})"
    )


def _check(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise InputError(f"--model_args {name}={value}: choose one of {', '.join(map(str, choices))}")


def _own_device(asked: str | None) -> torch.device:
    """What was asked for; "cuda", or nothing where there is a GPU, means this process's own."""
    if asked not in (None, "cuda") or not (asked or torch.cuda.is_available()):
        return torch.device(asked or "cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _text(target: Any, doc: Any) -> str:
    """A continuation without the space that sets it off; the template has its own."""
    return str(target(doc) if callable(target) else target).strip()


def _parts(values: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while part := list(islice(values, size)):
        yield part
