"""Bytes that ranks exchange per optimizer step, by ZeRO stage: counted with two ranks, and forecast for more.

Every tensor that a collective of torch.distributed is given during a step is counted, in two gloo ranks on this
machine, without DeepSpeed (DDP) and under ZeRO 1, 2 and 3; the counts are set beside the model of ``scaling.md``. Then
one rank and two ranks take the same steps: images per second, both sharing this machine's cores. Last, the model's
forecast for the paper's recipe on 8, 64 and 512 GPUs.

    python benchmarks/scaling.py                        # two minutes
"""

# ruff: noqa: E402 - the path is set before the imports that need it
from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from llava_genhancer import costs, recipes
from llava_genhancer.recipes import Recipe

WORKER = Path(__file__).with_name("scaling_worker.py")
GBIT = 1e9 / 8


def payload(
    stage: int | None, trained: int, frozen: int, width: int, micro_steps: int, through: bool
) -> tuple[float, float]:
    """Bytes of the tensors in one rank's collectives for one optimizer step: all-reduced, and all others (scaling.md).

    Args:
        stage: ZeRO's; None is DDP.
        trained: parameters that learn; ``frozen``: those that do not.
        width: bytes of a weight and of a gradient: 2 in bf16, 4 in fp32.
        micro_steps: forward and backward passes in the step.
        through: whether gradients pass through the frozen ones, which ZeRO-3 then gathers a second time.
    """
    weights = float(width * trained)
    if stage is None:
        return 4.0 * trained, 0.0  # fp32 gradients, in the last micro-step
    if stage < 3:
        return (micro_steps if stage == 2 else 1) * weights, weights
    gathered = width * (2 * trained + (2 if through else 1) * frozen)  # for the forward and for the backward pass
    return 0.0, float(micro_steps * (gathered + weights))


def wire(
    stage: int | None, trained: int, frozen: int, width: int, micro_steps: int, through: bool, ranks: int
) -> float:
    """Bytes that one rank sends in a step over rings: (r - 1) / r of each tensor, twice that for an all-reduce."""
    reduced, moved = payload(stage, trained, frozen, width, micro_steps, through)
    return (2 * reduced + moved) * (ranks - 1) / ranks


def forecast(recipe: Recipe, stage: int, link: float, flops: float) -> list[dict[str, Any]]:
    """Seconds of communication and of computing per step of the recipe, by ranks and ZeRO stage.

    Args:
        link: bytes per second that a GPU sends across nodes, at best.
        flops: FLOP/s of one GPU in the step.
    """
    backbone = costs.KNOWN_BACKBONES[recipe.backbone]
    trained = costs.trained_parameters(recipe, stage, backbone)
    frozen = costs.engine_parameters(recipe, stage, backbone) - trained
    image = sum(costs.step_flops(recipe, stage, backbone).values())
    rows = []
    for ranks in (8, 64, 512):
        batch = min(recipe.per_device_batch_size, max(1, recipe.global_batch_size // ranks))
        micro = max(1, recipe.global_batch_size // (batch * ranks))
        computing = micro * batch * image / flops
        for zero in (None, 1, 2, 3):
            seconds = wire(zero, trained, frozen, 2, micro, stage == 2, ranks) / link
            rows.append(
                {
                    "stage": stage, "ranks": ranks, "zero": zero, "images_per_rank": batch * micro,
                    "communication_s": seconds, "computing_s": computing,
                }
            )  # fmt: skip
    return rows


def launch(ways: list[str], ranks: int, steps: int, batch: int) -> list[dict[str, Any]]:
    """Short trainings in the worker, one after the other; rank 0's reports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        workers = []
        for rank in range(ranks):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            }  # fmt: skip
            command = [sys.executable, str(WORKER), str(steps), str(batch), str(out), *ways]
            workers.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            )
        errors = [worker.communicate(timeout=600)[1] for worker in workers]
        if any(worker.returncode for worker in workers):
            raise RuntimeError(errors[0].decode()[-2000:])
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def measured(steps: int) -> list[dict[str, Any]]:
    """Counted bytes beside the model's, for each way to train."""
    rows = launch(["ddp", "1", "2", "3"], 2, steps, 4)
    for row in rows:
        row["model_bytes"] = sum(
            payload(row["zero"], row["trained"], row["frozen"], 4, row["micro_steps"], through=False)
        )
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--link_gbit", type=float, default=400.0, help="each GPU's link across nodes")
    parser.add_argument("--tflops", type=float, default=400.0, help="what a GPU reaches in the step")
    parser.add_argument("--output", metavar="JSON")
    args = parser.parse_args(argv)
    rows = measured(args.steps)
    print(f"{'two ranks':12}{'bytes a step':>16}{'model':>16}{'ratio':>8}")
    for row in rows:
        name = "DDP" if row["zero"] is None else f"ZeRO-{row['zero']}"
        print(f"{name:12}{row['bytes']:>16,.0f}{row['model_bytes']:>16,.0f}{row['bytes'] / row['model_bytes']:>8.3f}")
    one = launch(["ddp"], 1, args.steps, 8)[0]["images_per_second"]
    speed = {"1": one, "2": rows[0]["images_per_second"]}
    print(f"one rank {one:.1f} images/s, two ranks with half the batch each {speed['2']:.1f}")
    recipe = recipes.get_recipe("openai-l14-224")
    table = [r for s in (1, 2) for r in forecast(recipe, s, args.link_gbit * GBIT, args.tflops * 1e12)]
    for row in table:
        name = "DDP" if row["zero"] is None else f"ZeRO-{row['zero']}"
        share = row["communication_s"] / row["computing_s"]
        print(
            f"stage {row['stage']}, {row['ranks']:>3} GPUs, {name:7}{row['communication_s'] * 1e3:>9.1f} ms sent, "
            f"{row['computing_s'] * 1e3:>9.1f} ms computed, {share:>7.2f}"
        )
    result = {"two_ranks": rows, "images_per_second": speed, "forecast": table, "date": time.strftime("%Y-%m-%d")}
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
