"""One rank of scaling.py: a few steps of a tiny denoiser's training, every collective's tensors counted.

python scaling_worker.py STEPS BATCH REPORT.json ddp|1|2|3 ...
"""

# ruff: noqa: E402 - the path is set before the imports that need it
from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch
import torch.distributed as dist
from enhance_step import build
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from llava_genhancer import recipes

COLLECTIVES = {  # name: the argument whose bytes are the collective's whole data
    "all_reduce": 0, "reduce": 0, "broadcast": 0, "all_gather_into_tensor": 0, "reduce_scatter_tensor": 1,
    "all_gather": 0, "reduce_scatter": 1, "_all_gather_base": 0, "_reduce_scatter_base": 1,
}  # fmt: skip
MICRO_STEPS = 2
# ZeRO-3 would keep a model this small whole; one of the paper's size it does not.
NOTHING_STAYS = {
    "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
}  # fmt: skip


def count_collectives(counts: Counter[str]) -> None:
    """Wrap torch.distributed's collectives, which DeepSpeed calls too."""

    def wrap(name: str, position: int) -> None:
        call = getattr(dist, name)

        def counted(*inputs: Any, **options: Any) -> Any:
            values = [*inputs, *options.values()]
            data = values[position]
            tensors = data if isinstance(data, list | tuple) else [data]
            counts[name] += sum(t.numel() * t.element_size() for t in tensors)
            return call(*inputs, **options)

        setattr(dist, name, counted)

    for name, position in COLLECTIVES.items():
        if hasattr(dist, name):
            wrap(name, position)


def train(way: str, steps: int, batch: int, counts: Counter[str]) -> dict[str, Any]:
    """Some steps in one way: bytes by collective and images per second."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    zero = None if way == "ddp" else int(way)
    recipe = recipes.override(recipes.get_recipe("tiny"), {"per_device_batch_size": batch, "vae_posterior": "mean"})
    enhancer, target, *_ = build(recipe, 1, torch.device("cpu"))
    trained = [p for p in enhancer.parameters() if p.requires_grad]
    sizes = sum(p.numel() for p in trained), sum(p.numel() for p in enhancer.parameters())
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-5)
    generator = torch.Generator().manual_seed(rank)
    images = torch.randint(0, 256, (batch, 3, 48, 48), generator=generator, dtype=torch.uint8)
    seen, latents = enhancer.backbone.normalise(images), target.encode(images)
    model: Any = enhancer
    if zero is None and ranks > 1:
        model = torch.nn.parallel.DistributedDataParallel(enhancer)
        # DDP's reducer is C++ and passes no Python collective; this hook lets it.
        model.register_comm_hook(None, allreduce_hook)
    elif zero is not None:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": batch, "gradient_accumulation_steps": MICRO_STEPS,
            "zero_optimization": {"stage": zero, **NOTHING_STAYS}, "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0,
        }  # fmt: skip
        model, optimizer, *_ = deepspeed.initialize(model=enhancer, optimizer=optimizer, config=config)
    marks, before = [], Counter[str]()
    for step in range(steps + 1):
        if step == 1:  # the first step holds set-up
            before = counts.copy()
        marks.append(time.perf_counter())
        for micro in range(MICRO_STEPS):
            last = micro == MICRO_STEPS - 1
            if zero is None:
                with _quiet(model, not last and ranks > 1):
                    (model(seen, latents) / MICRO_STEPS).backward()
                if last:
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                model.backward(model(seen, latents))
                model.step()
    marks.append(time.perf_counter())
    if zero is not None:
        model.destroy()
    by_kind = {name: (n - before[name]) / steps for name, n in counts.items() if n > before[name]}
    return {
        "zero": zero,
        "bytes": sum(by_kind.values()),
        "by_kind": by_kind,
        "images_per_second": steps * MICRO_STEPS * batch * ranks / (marks[-1] - marks[1]),
        "trained": sizes[0],
        "frozen": sizes[1] - sizes[0],
        "micro_steps": MICRO_STEPS,
    }


def main(steps: int, batch: int, report: Path, ways: list[str]) -> None:
    """Train in every way, and let rank 0 report."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    count_collectives(counts)
    dist.init_process_group("gloo")
    if ways != ["ddp"]:
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo")
    found = [train(way, steps, batch, counts) for way in ways]
    if dist.get_rank() == 0:
        report.write_text(json.dumps(found))


def _quiet(model: Any, quiet: bool) -> Any:
    from contextlib import nullcontext

    return model.no_sync() if quiet else nullcontext()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
