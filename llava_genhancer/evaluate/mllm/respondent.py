"""A LLaVA that answers: by the likelihood of given options, or in words of its own. Batches change speed only.

So a batch that memory does not hold is answered in halves, and later ones are no larger.

An option is put where the assistant would answer, exactly as in training, and scored by its tokens' log-probabilities,
end token included. The options of a question share everything up to where they part: that is read once, its keys and
values are kept, and the options are then read side by side, each seeing the shared part and itself.

Legend: B questions, P tokens of the longest shared part, S tokens behind it, D model's width, V vocabulary, T scored
tokens of all questions.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from llava_genhancer.data.decode import bounded_for
from llava_genhancer.errors import InputError, out_of_memory
from llava_genhancer.llava.conversation import (
    IGNORE_INDEX,
    IMAGE,
    IMAGE_TOKEN_INDEX,
    Encoded,
    Turn,
    encode,
    encode_prompt,
    stop_token_ids,
)

log = logging.getLogger(__name__)
T = TypeVar("T")
U = TypeVar("U")


class Unanswerable(InputError):
    """One question cannot be answered (too long, an unreadable image, no memory), though others may be."""


def one_by_one(answer: Callable[[Sequence[T]], Sequence[U]], work: Sequence[T]) -> list[U | Unanswerable]:
    """Returns the answers to a batch; where the batch fails, each question's own answer or its error.

    Args:
        answer: answers a batch, or raises Unanswerable because of any question in the batch.
    """
    try:
        return list(answer(work))
    except Unanswerable as error:
        if len(work) == 1:
            return [error]
    return [found for one in work for found in one_by_one(answer, [one])]


class Ask(NamedTuple):
    """A question with ``<image>`` where its images stand, and those images."""

    text: str
    images: Sequence[Image.Image] = ()

    @classmethod
    def about(cls, text: str, images: Sequence[Image.Image]) -> Ask:
        """The images come first, each in a line of its own, unless the text has a place for each."""
        if text.count(IMAGE) != len(images):
            text = f"{IMAGE}\n" * len(images) + text.replace(IMAGE, "")
        return cls(text, images)


class Score(NamedTuple):
    """An option's log-probability, its tokens, and whether each of them is the likeliest in its place."""

    total: float
    tokens: int
    greedy: bool

    @property
    def mean(self) -> float:
        """Normalised by length."""
        return self.total / self.tokens


@dataclass
class Packed:
    """A question's options behind what they share.

    Attributes:
        shared: token ids that every option continues.
        ids, positions, options: what follows, option after option: ids, places in the conversation, option's number.
        scored: option's number, place of the token that predicts it (0: the last shared one, then ``ids``), token id.
        lengths: scored tokens of each option.
    """

    shared: list[int]
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    options: list[int] = field(default_factory=list)
    scored: list[tuple[int, int, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def pack(rows: Sequence[Encoded]) -> Packed:
    """``rows`` hold a question with one of its options each; what is scored is the answer at their end."""
    starts = [1 + max(i for i, label in enumerate(row.labels) if label == IGNORE_INDEX) for row in rows]
    same = 0
    while same < min(starts) and len({row.input_ids[same] for row in rows}) == 1:
        same += 1
    packed = Packed(rows[0].input_ids[:same])
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tail = row.input_ids[same:]
        before = len(packed.ids)
        packed.ids += tail[:-1]  # the last token is only predicted
        packed.positions += range(same, same + len(tail) - 1)
        packed.options += [number] * (len(tail) - 1)
        for place in range(start - same, len(tail)):
            packed.scored.append((number, before + place if place else 0, tail[place]))
        packed.lengths.append(len(row.input_ids) - start)
    return packed


class Respondent:
    """A loaded LLaVA with what it takes to ask it.

    Args:
        model: transformers' LlavaForConditionalGeneration.
        image_processor: what makes the tower's input of an image.
        tokenizer: the one that training used; it need not know ``<image>``.
        template: name of the conversation template that the model was trained with.
    """

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any, template: str):
        self.model, self.image_processor, self.tokenizer, self.template = model, image_processor, tokenizer, template
        self.at_once = sys.maxsize
        settings = model.generation_config
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        self.ends = list(dict.fromkeys([*(i for i in ends if i is not None), *stop_token_ids(template, tokenizer)]))
        # Rows that only widen the vocabulary: no word of any answer, so they take no share of the probability.
        self.never = torch.tensor(settings.suppress_tokens or [], dtype=torch.long, device=model.device)

    def score(self, asked: Sequence[Ask], options: Sequence[Sequence[str]]) -> list[list[Score]]:
        """The scores of each question's options, in one batch if memory holds it.

        Raises:
            Unanswerable: memory does not hold a single question, or the language model does not read as much.
        """
        return self._in_parts(
            lambda part: self._score(*zip(*part, strict=True)), list(zip(asked, options, strict=True))
        )

    def say(self, asked: Sequence[Ask], **settings: Any) -> list[str]:
        """What is answered to each question, batched like :meth:`score`.

        ``settings`` are transformers' own of ``generate``.
        """
        return self._in_parts(lambda part: self._say(part, settings), asked)

    def _in_parts(self, answer: Callable[[Sequence[T]], list[U]], work: Sequence[T]) -> list[U]:
        """``answer`` of all the work, at most ``self.at_once`` of it at a time, which shrinks where memory ends."""
        done: list[U] = []
        while len(done) < len(work):
            part = work[len(done) : len(done) + self.at_once]
            try:
                done += answer(part)
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                alone = len(part) == 1
            gc.collect()  # only here is what the attempt held free
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if alone:
                raise Unanswerable(
                    "out of memory with one question at a time: load the weights in half precision "
                    "(--model_args dtype=bfloat16), or use a device with more memory"
                )
            self.at_once = (len(part) + 1) // 2
            log.warning("out of memory with %d questions at a time: going on with %d", len(part), self.at_once)
        return done

    @torch.inference_mode()
    def _score(self, asked: Sequence[Ask], options: Sequence[Sequence[str]]) -> list[list[Score]]:
        packs = [
            pack([self._expanded(encode([Turn(ask.text, o)], self.template, self.tokenizer)) for o in own])
            for ask, own in zip(asked, options, strict=True)
        ]
        hidden = self._read(packs, asked)
        rows = [sum(len(own) for own in options[:b]) for b in range(len(packs))]
        where = [(b, place, rows[b] + number, token) for b, p in enumerate(packs) for number, place, token in p.scored]
        question, place, row, token = torch.tensor(where, device=self.model.device).T  # (T,) each
        logits = self.model.get_output_embeddings()(hidden[question, place]).float()  # (T, V)
        logits = logits.index_fill(1, self.never, -torch.inf)
        chosen = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        if chosen.isnan().any():  # any option would be the likeliest
            raise InputError("the language model's logits are NaN: its weights are broken, or too large for --dtype")
        count = sum(map(len, options))
        totals = torch.zeros(count, device=chosen.device).index_add(0, row, chosen).tolist()
        misses = torch.zeros(count, device=chosen.device).index_add(0, row, (logits.argmax(-1) != token).float())
        lengths = [n for p in packs for n in p.lengths]
        scores = [Score(*s) for s in zip(totals, lengths, (misses == 0).tolist(), strict=True)]
        return [scores[start : start + len(own)] for start, own in zip(rows, options, strict=True)]

    def _read(self, packs: Sequence[Packed], asked: Sequence[Ask]) -> Tensor:
        """Hidden states (B, 1 + S, D): of the last shared token, and of those that follow."""
        from transformers import DynamicCache

        shared, seen = self._padded([p.shared for p in packs])
        cache = DynamicCache()
        # What pads a row on its right is seen by no token of it: no mask is needed here.
        embedded = self._embedded(shared, asked)
        read = self.model.model(inputs_embeds=embedded, past_key_values=cache, use_cache=True).last_hidden_state
        hidden = read[torch.arange(len(packs)), seen.sum(1) - 1][:, None]
        if not any(p.ids for p in packs):
            return hidden
        ids, _ = self._padded([p.ids for p in packs])
        positions, _ = self._padded([p.positions for p in packs])
        own, _ = self._padded([p.options for p in packs], fill=-1)
        width = ids.shape[1]
        same = own[:, :, None] == own[:, None, :]
        sees_own = same & torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()  # (B, S, S)
        sees_shared = seen.bool()[:, None].expand(-1, width, -1)  # (B, S, P)
        sees = torch.cat([sees_shared, sees_own], 2)[:, None]
        mask = torch.zeros(sees.shape, dtype=hidden.dtype, device=ids.device)
        mask = mask.masked_fill(~sees, torch.finfo(hidden.dtype).min)
        followed = self.model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return torch.cat([hidden, followed], 1)

    @torch.inference_mode()
    def _say(self, asked: Sequence[Ask], settings: Mapping[str, Any]) -> list[str]:
        prompts = [self._prompt(ask.text) for ask in asked]
        ids, seen = self._padded(prompts, left=True)
        said = self.model.generate(
            input_ids=ids,
            inputs_embeds=self._embedded(ids, asked),
            attention_mask=seen,
            eos_token_id=self.ends,
            pad_token_id=self.ends[0],
            **settings,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(said[:, ids.shape[1] :], skip_special_tokens=True)]

    def _prompt(self, text: str) -> list[int]:
        ids = encode_prompt([Turn(text, None)], self.template, self.tokenizer)
        return self._expanded(Encoded(ids, ids)).input_ids

    def _expanded(self, encoded: Encoded) -> Encoded:
        """Ids and labels with each image's place as wide as what the tower makes of it.

        Raises:
            Unanswerable: the language model cannot read that much.
        """
        config = self.model.config

        def wide(values: list[int], fill: int) -> list[int]:
            pairs = zip(encoded.input_ids, values, strict=True)
            return [
                x
                for i, value in pairs
                for x in ([fill] * config.image_seq_length if i == IMAGE_TOKEN_INDEX else [value])
            ]

        row = Encoded(wide(encoded.input_ids, config.image_token_id), wide(encoded.labels, IGNORE_INDEX))
        limit = config.text_config.max_position_embeddings
        if len(row.input_ids) > limit:
            raise Unanswerable(
                f"a question with its images is {len(row.input_ids)} tokens long, the model reads {limit}"
            )
        return row

    def _embedded(self, ids: Tensor, asked: Sequence[Ask]) -> Tensor:
        """Ids (B, P) as embeddings (B, P, D), with the images' features in their places.

        Given the pixels, the model would hold the outputs of all the tower's layers while the language model reads.
        """
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        pixels = self._pixels(asked)
        if not pixels:
            return embedded
        features = torch.cat([*self.model.get_image_features(**pixels).pooler_output])
        places = ids == self.model.config.image_token_id
        if int(places.sum()) != len(features):
            raise InputError(
                f"the tower makes {len(features)} features of these images where the checkpoint's config.json "
                f"(image_seq_length={self.model.config.image_seq_length}) has {int(places.sum())} places"
            )
        return embedded.masked_scatter(places[..., None], features)

    def _pixels(self, asked: Sequence[Ask]) -> dict[str, Tensor]:
        """All questions' images in order, (N, 3, H, W); nothing if there are none."""
        images = [bounded_for(image, self.image_processor) for ask in asked for image in ask.images]
        if not images:
            return {}
        pixels = self.image_processor(images, return_tensors="pt").pixel_values
        return {"pixel_values": pixels.to(self.model.device, self.model.dtype)}

    def _padded(self, rows: Sequence[list[int]], *, left: bool = False, fill: int = 0) -> tuple[Tensor, Tensor]:
        """Rows of different lengths as one tensor, and which of it is theirs."""
        width = max(map(len, rows))
        before = [(width - len(row)) * left for row in rows]
        after = [(width - len(row)) * (not left) for row in rows]
        ids = [[fill] * b + row + [fill] * a for b, row, a in zip(before, rows, after, strict=True)]
        own = [[0] * b + [1] * len(row) + [0] * a for b, row, a in zip(before, rows, after, strict=True)]
        return torch.tensor(ids, device=self.model.device), torch.tensor(own, device=self.model.device)
