"""Fill a cache and train stage 1 on it, alone or as one of several ranks; a step has the same samples either way.

    python cached_ranks.py CONFIG.json

CONFIG: recipe fields, the cache's folder, an output folder, and a list of (name, DeepSpeed JSON or null). Weights and
losses go to OUT/<name>.safetensors and .json, the units that a rank wrote to OUT/written-<rank>.json.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from llava_genhancer import engine, recipes
from llava_genhancer.data import records_fill
from llava_genhancer.data.images import open_source
from llava_genhancer.enhance.cache import Cache
from llava_genhancer.enhance.cache_fill import open_cache
from llava_genhancer.enhance.stages import build_stage
from llava_genhancer.enhance.targets import load_target
from llava_genhancer.enhance.train import EnhanceTrainer, training_arguments


class CachedBatches:
    """This rank's part of each global batch; a sample, its crop and its draws follow from its global number."""

    def __init__(self, cache: Cache, denoiser: Any, size: int, rank: int, world: int):
        self.cache, self.denoiser, self.size, self.rank, self.world, self.step = cache, denoiser, size, rank, world, 0
        source: Any = cache.source
        self.samples = [sample for unit in range(len(source)) for sample in source.read(unit)]

    def sample(self, number: int) -> tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        sample = self.samples[number % len(self.samples)]
        g = torch.Generator().manual_seed(number)
        draws = {"noise": torch.randn(self.denoiser.token_shape, generator=g), "t": torch.rand((), generator=g)}
        return sample.key, self.cache.view(sample, number), draws

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            first = (self.step * self.world + self.rank) * self.size
            keys, images, draws = zip(*map(self.sample, range(first, first + self.size)), strict=True)
            self.step += 1
            yield {"keys": list(keys), "images": default_collate(images), "draws": default_collate(draws)}

    def close(self) -> None:
        pass

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def main(config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    out = Path(config["output"])
    written: list[str] = []
    finish = records_fill._Writer.finish

    def noted(writer: Any) -> None:
        written.append(f"{writer.layer.folder.name}/{writer.unit}")
        finish(writer)

    records_fill._Writer.finish = noted  # type: ignore[method-assign]
    size = config["fields"]["global_batch_size"] // world
    recipe = recipes.override(recipes.Recipe(), {**config["fields"], "per_device_batch_size": size})
    for name, deepspeed in config["runs"]:
        args = training_arguments(recipe, 1, out / name / "stage1", deepspeed)
        target = load_target(recipe)
        with engine.without_zero_init(args):
            enhancer = build_stage(recipe, 1, target)
        cache = open_cache(
            recipe, 1, Path(config["cache"]), open_source(str(recipe.data)), target, enhancer, args.device
        )
        loader = CachedBatches(cache, enhancer.denoiser, size, rank, world)
        trainer = EnhanceTrainer(
            enhancer, args, loader, target=target, cache=cache, keep_checkpoints=2, facts={"world": world}
        )
        final = trainer.run()
        if rank == 0:
            (out / f"{name}.safetensors").write_bytes((final / "weights.safetensors").read_bytes())
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            (out / f"{name}.json").write_text(json.dumps(losses))
        trainer.barrier()
        engine.forget()
    (out / f"written-{rank}.json").write_text(json.dumps(written))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
