"""The package's command with a fault built in: CHAOS_FAULT=KIND:STEP:RANK, KIND one of nan, spike, hang."""

from __future__ import annotations

import os
import time
from typing import Any

from torch import Tensor

from llava_genhancer import cli
from llava_genhancer.enhance.train import EnhanceTrainer


def install(fault: str) -> None:
    """Make the last micro-batch of a step go wrong on one rank, whichever process gets there."""
    kind, step, rank = fault.split(":")
    original = EnhanceTrainer.batch_loss

    def batch_loss(self: EnhanceTrainer, model: Any, inputs: dict[str, Any], num_items: Any) -> Tensor:
        loss = original(self, model, inputs, num_items)
        hit = self.state.global_step + 1 == int(step) and self.rank == int(rank) and self.accelerator.sync_gradients
        if hit and kind == "hang":
            time.sleep(3600)
        return loss * {"nan": float("nan"), "spike": 1000.0}[kind] if hit else loss

    EnhanceTrainer.batch_loss = batch_loss  # type: ignore[method-assign]


if __name__ == "__main__":
    if fault := os.environ.get("CHAOS_FAULT"):
        install(fault)
    cli.main()
