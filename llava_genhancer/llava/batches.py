"""Which samples make a batch, in which order, on which rank; and the loader that goes on exactly where it stopped.

Order is a pure function of seed and epoch, and a sample's tensors one of its number, so the number of batches given
is the whole state, for any number of workers.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

from llava_genhancer.data.loader import MIN_READ, SkipReport, batches_of, end_workers, start_worker
from llava_genhancer.data.order import sample_seed
from llava_genhancer.errors import InputError
from llava_genhancer.llava.conversation import check_template
from llava_genhancer.llava.dataset import Collator, ImageView, LlavaDataset, load_image_processor
from llava_genhancer.llava.model import llava_config, local
from llava_genhancer.llava.recipes import LlavaRecipe, LlavaStep
from llava_genhancer.llava.samples import NO_IMAGE, Samples, summary, text_summary
from llava_genhancer.llava.tokenizer import load_tokenizer


def global_batches(
    lengths: Sequence[int], batch_size: int, chunks: int, *, seed: int, epoch: int, by_modality: bool
) -> list[list[int]]:
    """All samples of an epoch in batches of ``batch_size * chunks``; the last one is filled from the first ones.

    Args:
        lengths: of each sample, negative where there is no image.
        batch_size: samples per rank and forward.
        chunks: ranks x accumulation; chunk ``k`` of a batch is for rank ``k % ranks``.
        by_modality: group by modality and length as LLaVA does; else shuffle.
    """
    generator = torch.Generator().manual_seed(sample_seed(seed, epoch))
    if by_modality:
        order = group_by_modality(lengths, batch_size, chunks, generator)
    else:
        order = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * chunks
    order = list(itertools.islice(itertools.cycle(order), -(-len(order) // size) * size))
    return [order[start : start + size] for start in range(0, len(order), size)]


def group_by_modality(lengths: Sequence[int], batch_size: int, chunks: int, generator: torch.Generator) -> list[int]:
    """LLaVA's order of samples: batches of one modality in random order, in each the chunks about equally long.

    What is left of both modalities comes last, unsorted.
    """
    with_images = [i for i, length in enumerate(lengths) if length > 0]
    text_only = [i for i, length in enumerate(lengths) if length < 0]
    if not with_images or not text_only:
        return [
            i for batch in group_by_length(range(len(lengths)), lengths, batch_size, chunks, generator) for i in batch
        ]
    shown = group_by_length(with_images, lengths, batch_size, chunks, generator)
    said = group_by_length(text_only, lengths, batch_size, chunks, generator)
    batches = shown[:-1] + said[:-1]
    shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return [i for batch in [*shuffled, sorted(shown[-1] + said[-1])] for i in batch]


def group_by_length(
    samples: Sequence[int], lengths: Sequence[int], batch_size: int, chunks: int, generator: torch.Generator
) -> list[list[int]]:
    """Random batches of ``batch_size * chunks``, each split into chunks of about the same total length."""
    size = batch_size * chunks
    shuffled = [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
    batches = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    return [_even(sorted(batch, key=lambda i: -abs(lengths[i])), lengths, chunks) for batch in batches]


def _even(batch: list[int], lengths: Sequence[int], chunks: int) -> list[int]:
    """A batch, longest sample first, dealt to the chunk that is shortest so far; dealt in turn if they are uneven."""
    if len(batch) % chunks:
        return [i for start in range(chunks) for i in batch[start::chunks]]
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    totals = [0.0] * chunks
    for i in batch:
        shortest = totals.index(min(totals))
        dealt[shortest].append(i)
        full = len(dealt[shortest]) == len(batch) // chunks
        totals[shortest] = float("inf") if full else totals[shortest] + abs(lengths[i])
    return [i for chunk in dealt for i in chunk]


@dataclass
class LlavaReport(SkipReport):
    """What a training read, skipped and cut off; ``left_out`` is what the JSON held that could not be used.

    Attributes:
        tokens: that the language model read, images at full length. places: that it computed, padding included.
    """

    truncated: int = 0
    tokens: int = 0
    places: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


class LlavaLoader:
    """One rank's endless batches with an exact state.

    Args:
        batch_size: samples per rank and forward.
        accumulation: micro-batches per optimizer step.
        by_modality: see :func:`global_batches`.
        max_bad_fraction: share of unusable samples above which iteration ends with an InputError.
    """

    def __init__(
        self,
        dataset: LlavaDataset,
        collate: Collator,
        *,
        batch_size: int,
        accumulation: int = 1,
        by_modality: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        max_bad_fraction: float = 0.1,
    ):
        self.dataset, self.collate, self.seed, self.by_modality = dataset, collate, seed, by_modality
        self.batch_size, self.accumulation, self.num_workers = batch_size, accumulation, num_workers
        self.rank, self.world_size, self.max_bad_fraction = rank, world_size, max_bad_fraction
        left_out = dataset.samples.report
        if left_out.skipped > max_bad_fraction * left_out.read and left_out.read >= MIN_READ:
            raise InputError(
                f"data {dataset.samples.path}: {summary(left_out, dataset.samples.first)}; fix the data, or raise "
                "--max_bad_fraction"
            )
        no_image = dataset.samples.as_text.by_reason.get(NO_IMAGE, 0)
        if no_image > max_bad_fraction * len(dataset) and (len(dataset) >= MIN_READ or not dataset.samples.with_image):
            raise InputError(
                f'data {dataset.samples.path}: {text_summary(dataset.samples.as_text)}; give each of them "image", a '
                "path below image_folder, or take <image> out of the text, or raise --max_bad_fraction"
            )
        self._given = 0
        self._batches: Any = None
        self._report = LlavaReport(left_out=dict(left_out.by_reason))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every sample is given once."""
        return -(-len(self.dataset) // (self.batch_size * self.world_size * self.accumulation))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches for ever, from where the last iteration or the loaded state stands.

        Raises:
            InputError: too many unusable samples.
        """
        # Workers tokenize one sample each; threads of their own would be forbidden after the fork anyway.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        loader = DataLoader(
            self.dataset,
            batch_sampler=_Given(self._numbers(self._given)),
            num_workers=self.num_workers,
            collate_fn=self.collate,
            worker_init_fn=start_worker if self.num_workers else None,
            generator=torch.Generator().manual_seed(self.seed),  # not the global RNG: dropout is drawn from that
            pin_memory=torch.cuda.is_available(),
        )
        self._batches = iter(loader)
        for batch in batches_of(self._batches):
            if "problem" in batch:
                raise InputError(f"data {self.dataset.samples.path}: {batch['problem']}")
            self._given += 1
            self._report.tokens += batch.pop("tokens")
            self._report.places += batch["input_ids"].numel()
            self._count(batch.pop("skipped"), len(batch["keys"]), batch.pop("truncated"))
            yield batch

    def _numbers(self, given: int) -> Iterator[list[int]]:
        """The samples of each of this rank's batches after the first ``given`` ones."""
        epoch, done = divmod(given, self.steps_per_epoch * self.accumulation)
        lengths = self.dataset.samples.lengths.tolist()
        size, chunks = self.batch_size, self.world_size * self.accumulation
        while True:
            batches = global_batches(lengths, size, chunks, seed=self.seed, epoch=epoch, by_modality=self.by_modality)
            starts = range(self.rank * size, chunks * size, self.world_size * size)
            mine = [batch[start : start + size] for batch in batches for start in starts]
            yield from mine[done:]
            epoch, done = epoch + 1, 0

    def _count(self, skipped: list[tuple[str, str]], used: int, truncated: int) -> None:
        report = self._report
        report.read += used + len(skipped)
        report.truncated += truncated
        for key, reason in skipped:
            report.add(key, reason)
        if report.read >= MIN_READ and report.skipped > self.max_bad_fraction * report.read:
            last = ", ".join(key for key, _ in skipped[-3:])
            raise InputError(
                f"data {self.dataset.samples.path}: {summary(report)} (last {last}); fix the data, or raise "
                "--max_bad_fraction"
            )

    def close(self) -> None:
        """End the workers."""
        end_workers(self._batches)

    def report(self) -> LlavaReport:
        """What the batches given so far took, over all starts of the run."""
        return self._report

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch given; batches that workers prepared ahead do not count."""
        data = self.dataset.samples.fingerprint
        return {"given": self._given, "data": data, "report": self._report.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which ``state`` was taken.

        Raises:
            InputError: the JSON is another one.
        """
        samples = self.dataset.samples
        if state["data"] != samples.fingerprint:
            raise InputError(
                f"data {samples.path} changed since the checkpoint was written, which cannot go on exactly: put the "
                "old file back, or use a new --output_dir"
            )
        self._given = state["given"]
        report = state["report"]
        self._report = LlavaReport(**{**report, "keys": [(key, reason) for key, reason in report["keys"]]})


class _Given:
    """A batch list for DataLoader, which wants an iterable that has no end here."""

    def __init__(self, numbers: Iterator[list[int]]):
        self.numbers = numbers

    def __iter__(self) -> Iterator[list[int]]:
        return self.numbers


def build_loader(
    recipe: LlavaRecipe, table: LlavaStep, samples: Samples, *, rank: int = 0, world_size: int = 1
) -> LlavaLoader:
    """One rank's batches of a training step.

    Raises:
        InputError: tokenizer or processor are missing, the tokenizer cannot write the template, or too many entries
            of the JSON are of no use.
    """
    tokenizer = load_tokenizer(recipe.llm)
    check_template(table.conversation, tokenizer)
    config = llava_config(recipe)
    tokens_per_image, rows = config.image_seq_length, config.text_config.vocab_size
    dataset = LlavaDataset(
        samples,
        template=table.conversation,
        tokenizer=tokenizer,
        view=ImageView(load_image_processor(local(recipe.tower)), table.image_mode),
        tokens_per_image=tokens_per_image,
        max_length=recipe.max_length,
        rows=rows,
    )
    ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, 0)
    return LlavaLoader(
        dataset,
        Collator(next(i for i in ids if i is not None and i < rows), tokens_per_image, packing=table.packing),
        batch_size=table.per_device_batch_size,
        accumulation=table.global_batch_size // (table.per_device_batch_size * world_size),
        by_modality=table.group_by_modality_length,
        seed=recipe.seed,
        rank=rank,
        world_size=world_size,
        num_workers=recipe.num_workers,
        max_bad_fraction=recipe.max_bad_fraction,
    )
