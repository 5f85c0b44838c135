"""What the trainer adds to a step: time outside the models, their backward pass and the optimizer, and host syncs."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from enhance_step import build, images_of
from torch import Tensor

from llava_genhancer import recipes
from llava_genhancer.recipes import Recipe

WARMUP = 2


@contextlib.contextmanager
def host_syncs(device: torch.device) -> Iterator[Counter[str]]:
    """Count the places at which the host waits for the GPU; nothing is counted on a CPU."""
    found: Counter[str] = Counter()
    if device.type != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(
        f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if "synchroniz" in str(w.message)
    )


def trainer_step(recipe: Recipe, stage: int, device: torch.device, folder: Path, steps: int) -> dict[str, Any]:
    """Seconds a step in the trainer, the share of them outside its parts, and its host syncs a step.

    The parts are timed in the second half of the steps. On a GPU those marks wait for the device, which the trainer
    itself does not: the share is then an upper bound, and ``step_s`` is of the first half.
    """
    from transformers import TrainerCallback

    from llava_genhancer import engine
    from llava_genhancer.enhance.train import EnhanceTrainer, training_arguments

    name, total = f"stage{stage}", WARMUP + 2 * steps
    recipe = recipes.override(
        recipe,
        {
            f"{name}.max_steps": total, f"{name}.warmup_steps": 0, f"{name}.save_steps": total + 1,
            f"{name}.log_steps": 10, f"{name}.sample_steps": 0,
        },
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as watched:
        args = training_arguments(recipe, stage, Path(out) / name, None)
        args.save_strategy = "no"
        enhancer, target, *_ = build(recipe, stage, device)
        batches = _Batches(images_of(recipe, folder, enhancer.backbone.image_size, torch.device("cpu")))
        inside: list[float] = []
        marks: list[tuple[float, float]] = []
        syncs: list[Counter[str]] = []

        def timed(owner: Any, method: str) -> None:
            work = getattr(owner, method)

            def wrapped(*inputs: Any, **options: Any) -> Any:
                _wait(device)
                started = time.perf_counter()
                result = work(*inputs, **options)
                _wait(device)
                inside.append(time.perf_counter() - started)
                return result

            setattr(owner, method, wrapped)

        class Steps(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step in (WARMUP, WARMUP + steps):  # the host alone runs ahead of the device
                    _wait(device)
                if state.global_step == WARMUP:
                    syncs.append(watched.enter_context(host_syncs(device)))
                if state.global_step == WARMUP + steps:
                    watched.close()
                    timed(batches, "next")  # reading data is another benchmark's matter
                    timed(trainer.target, "encode")
                    timed(enhancer, "forward")
                    timed(trainer.accelerator, "backward")
                    timed(trainer.accelerator, "clip_grad_norm_")
                    timed(trainer.optimizer, "step")
                marks.append((time.perf_counter(), sum(inside)))

        trainer = EnhanceTrainer(enhancer, args, batches, target=target, keep_checkpoints=2, facts={})
        trainer.add_callback(Steps())
        trainer.train()
        engine.forget()
    plain = marks[WARMUP - 1 : WARMUP + steps]
    whole = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks[WARMUP + steps :])]
    return {
        "step_s": (plain[-1][0] - plain[0][0]) / steps,
        "outside_share": statistics.median((w - i) / w for w, i in whole),
        "host_syncs_per_step": syncs[0].total() / steps,
        "host_syncs": dict(syncs[0]),
    }


class _Batches:
    """A loader for the trainer, with reading as a method of its own."""

    def __init__(self, stream: Iterator[Tensor]):
        self.stream = stream

    def next(self) -> Tensor:
        return next(self.stream)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            images = self.next()
            yield {"images": images, "keys": ["-"] * len(images)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def report(self) -> Any:
        return None

    def close(self) -> None:
        pass


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
