"""Steps gone bad: a loss that is not finite or far above the usual, a gradient that overflowed. Stop, or skip them.

A skipped step moves no weight and no optimizer state, on any rank: a gradient that is not finite is so everywhere once
it is reduced, and the loss of a spike is made NaN on every rank before it goes backward. DeepSpeed drops such a step
by itself, the trainer drops it elsewhere. What was skipped is part of every checkpoint: a resumed run decides alike.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_genhancer.errors import plain
from llava_genhancer.fields import Guards

log = logging.getLogger(__name__)
WINDOW = 50  # accepted steps whose median is the usual loss
ENOUGH = 10  # steps before anything is called a spike
NO_GRADIENT_STEPS = 20  # first steps of a training, in one of which at least the gradient must not be zero


class BadStep(RuntimeError):
    """Training cannot go on past a step; no checkpoint holds the damage."""


class NonFiniteLoss(BadStep):
    """The loss or a trained weight became NaN or infinite; the message names step, rank and the batch's keys."""


class LossSpike(BadStep):
    """The loss rose above the recipe's multiple of the usual one; the step was not taken."""


class NoGradient(BadStep):
    """In none of the first steps any trained weight had a gradient: the training would end where it began."""


class _Loss:
    """A micro-batch's loss on its way to the CPU; asking for it waits for its own copy, not for later work."""

    def __init__(self, loss: Tensor, step: int, keys: list[str]):
        self.step, self.keys = step, keys
        self._value = loss.detach().to("cpu", non_blocking=True)  # from a GPU: into pinned memory
        self._copied = torch.cuda.Event() if loss.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def value(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)


class LossGuard:
    """Looks at every loss of a training, without making the device wait where the recipe only stops.

    Args:
        folder: the training's; ``bad-steps-rank<R>.jsonl`` there gets a line with the keys of each bad batch.
        total: the sum of a number over all ranks.
    """

    def __init__(self, policy: Guards, folder: Path, rank: int, total: Callable[[float], float]):
        self.policy, self.rank, self.total = policy, rank, total
        self.file = folder / f"bad-steps-rank{rank}.jsonl"
        self.skipped: list[int] = []
        self.without_gradient = 0  # steps from the first one on in which the gradient of every trained weight was 0
        self._accepted: deque[float] = deque(maxlen=WINDOW)
        self._unread: deque[_Loss] = deque()
        self._step_losses: list[Tensor] = []
        self._step_keys: list[str] = []
        self._spike = -1  # the newest step whose loss was made NaN here

    @property
    def skips(self) -> bool:
        """Whether bad steps are left out instead of ending the training."""
        return self.policy.on_bad_step == "skip"

    def state_dict(self) -> dict[str, Any]:
        """JSON types, the same on every rank."""
        return {
            "skipped": self.skipped,
            "accepted": list(self._accepted),
            "without_gradient": self.without_gradient,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.skipped = list(state["skipped"])
        self.without_gradient = state.get("without_gradient", 0)
        self._accepted = deque(state["accepted"], maxlen=WINDOW)

    # --- spikes ---------------------------------------------------------------------------------------------------

    def before_backward(self, loss: Tensor, step: int, keys: list[str], *, last: bool) -> Tensor:
        """The loss to go backward from: NaN on every rank if the step, whose ``last`` micro-batch this is, is a spike.

        Raises:
            LossSpike: it is one, and the recipe says stop.
        """
        if not self.policy.spike_factor:
            return loss
        self._step_losses.append(loss.detach())
        self._step_keys += keys
        if not last:
            return loss
        mine = float(torch.stack(self._step_losses).sum())  # waits for the device
        total, keys = self.total(mine), self._step_keys
        self._step_losses, self._step_keys = [], []
        usual = statistics.median(self._accepted) if len(self._accepted) >= ENOUGH else math.inf
        if not math.isfinite(total):  # no spike: it shows in the gradient
            return loss
        if total <= self.policy.spike_factor * usual:
            self._accepted.append(total)
            return loss
        what = f"the loss of step {step} is {total / usual:.3g} times the usual one"
        self._write(step, mine, keys)
        if not self.skips:
            raise LossSpike(f"{what}; {self._advice(keys)}")
        self._say(f"{what}: skipped", keys)
        self._spike = step
        return loss * math.nan

    # --- what is not finite ---------------------------------------------------------------------------------------

    def after_backward(self, loss: Tensor, step: int, keys: list[str]) -> None:
        """Take a micro-batch's loss, to be looked at by :meth:`check` when the device has come to it."""
        self._unread.append(_Loss(loss, step, keys))

    def check(self, pending: int = 0) -> None:
        """Look at the losses taken, all but the newest ``pending``.

        Raises:
            NonFiniteLoss: one is NaN or infinite, and the recipe says stop.
        """
        while len(self._unread) > pending:
            loss = self._unread.popleft()
            value = loss.value()
            if math.isfinite(value) or loss.step == self._spike:
                continue
            what = f"the loss is {value} in step {loss.step} on rank {self.rank}"
            self._write(loss.step, value, loss.keys)
            if not self.skips:
                raise NonFiniteLoss(f"{what}; {self._advice(loss.keys)}")
            self._say(f"{what}: skipped", loss.keys)

    def drop(self, step: int) -> None:
        """Count a step that was left out.

        Raises:
            BadStep: there were too many.
        """
        self.check()
        self.skipped.append(step)
        if len(self.skipped) > self.policy.max_skipped_steps:
            raise BadStep(
                f"steps {', '.join(map(str, self.skipped))} had to be skipped, more than --max_skipped_steps "
                f"{self.policy.max_skipped_steps}: lower the learning rate, look at the images that "
                f"{self.file.with_name('bad-steps-rank*.jsonl')} names, or raise it, then repeat the command"
            )
        if self.rank == 0:
            log.warning("step %d is skipped on every rank", step)

    # --- no gradient ----------------------------------------------------------------------------------------------

    def check_gradient(self, norm: Any, step: int, last_step: int) -> None:
        """Count the first steps whose gradient norm is zero; ``norm`` is None where DeepSpeed has none to report.

        Raises:
            NoGradient: it was zero in all of the first twenty steps, or in all steps of a shorter training.
        """
        if self.without_gradient != step - 1 or step > NO_GRADIENT_STEPS or norm is None or float(norm) != 0:
            return
        self.without_gradient = step
        if step >= min(NO_GRADIENT_STEPS, last_step):
            raise NoGradient(
                f"the gradient of every trained weight was zero in all of the first {step} steps, so nothing is "
                "learned: check that the data holds what these weights learn from (images, for a projector), then "
                "repeat the command with a new --output_dir"
            )

    # --- words ----------------------------------------------------------------------------------------------------

    def _write(self, step: int, loss: float, keys: list[str]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = {"step": step, "rank": self.rank, "loss": loss if math.isfinite(loss) else str(loss), "keys": keys}
        with open(self.file, "a", encoding="utf-8") as f:
            f.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _advice(self, keys: list[str]) -> str:
        return (
            f"{_batch(keys)} (all in {self.file}). No checkpoint holds the damage: lower the learning rate, look at "
            "those images, or add --on_bad_step skip, then repeat the command"
        )

    def _say(self, what: str, keys: list[str]) -> None:
        log.warning("%s; %s (all in %s)", what, _batch(keys), self.file)


def _batch(keys: list[str]) -> str:
    return f"batch keys: {plain(', '.join(keys[:4]))}{', ...' if len(keys) > 4 else ''}"
