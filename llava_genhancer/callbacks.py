"""What happens around a training step of the exact trainer: each rank's noise, snapshots, stops, progress."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from llava_genhancer.units import duration, rate_in_words

if TYPE_CHECKING:
    from llava_genhancer.trainer import ExactTrainer


class Flow(TrainerCallback):
    """Per-rank noise, snapshots, and the agreed stop."""

    def __init__(self, trainer: ExactTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer seeds every rank alike, which would give all ranks the same noise. On resume the saved state follows.
        torch.manual_seed(args.seed + 1_000_003 * self.trainer.rank)
        self.trainer.last_log = (time.monotonic(), state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.trainer.snapshot_steps:
            self.trainer.check_weights()
            self.trainer.save_trained(self.trainer.stage_dir / "snapshots" / f"step-{state.global_step}.safetensors")
        if self.trainer.agreed_stop():
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.guard.check()
        if self.trainer.leads:
            self.trainer.write_history()


class Progress(TrainerCallback):
    """A bar with loss, images/s and time left on a terminal; a line now and then elsewhere."""

    LINE_SECONDS = 20.0

    def __init__(self, trainer: ExactTrainer):
        self.trainer = trainer
        self.bar: Any = None
        self.last_line = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.rank == 0:
            from tqdm import tqdm

            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.trainer.stage_dir.name,
                unit="step",
                disable=not sys.stderr.isatty(),
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n if not self.bar.disable else 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.bar is None or not logs or "loss" not in logs:
            return
        text = f"loss {logs['loss']:.4f}, {rate_in_words(logs.get('images_per_second', 0.0), 'image')}"
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
        elif time.monotonic() - self.last_line > self.LINE_SECONDS or state.global_step >= state.max_steps:
            self.last_line = time.monotonic()
            rate = logs.get("images_per_second", 0) / (
                args.train_batch_size * args.gradient_accumulation_steps * self.trainer.world_size
            )
            left = f", {duration((state.max_steps - state.global_step) / rate)} left" if rate else ""
            name = self.trainer.stage_dir.name
            with contextlib.suppress(OSError):  # nobody reads; the training goes on
                print(f"{name} step {state.global_step}/{state.max_steps}: {text}{left}", file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
