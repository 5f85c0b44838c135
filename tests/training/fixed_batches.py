"""Train both stages on a fixed list of batches with given noise and t, or given masks; run by torchrun or alone.

    python fixed_batches.py CONFIG.json

CONFIG: recipe fields, output folder, a list of (name, DeepSpeed JSON or null, precision). Weights after each go to
OUT/<name>-stage<N>.safetensors.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from llava_genhancer import engine, recipes
from llava_genhancer.enhance.enhancer import Enhancer
from llava_genhancer.enhance.stages import build_stage
from llava_genhancer.enhance.targets import load_target
from llava_genhancer.enhance.train import EnhanceTrainer, training_arguments


def flow_draws(denoiser: Any, g: torch.Generator) -> dict[str, torch.Tensor]:
    return {"noise": torch.randn(denoiser.token_shape, generator=g), "t": torch.rand((), generator=g)}


def masked_draws(denoiser: Any, g: torch.Generator) -> dict[str, torch.Tensor]:
    return {"masked": torch.rand(denoiser.tokens, generator=g) < 0.3 + 0.6 * torch.rand((), generator=g)}


DRAWS = {"flow": flow_draws, "masked": masked_draws}


class FixedBatches:
    """This rank's part of global micro-batches; an image and its draws depend on the sample's global number only."""

    def __init__(self, recipe: recipes.Recipe, rank: int, world: int, enhancer: Enhancer):
        self.size, self.world, self.rank, self.step = recipe.per_device_batch_size, world, rank, 0
        self.accumulate = recipe.global_batch_size // (self.size * world)
        self.draws, self.enhancer = DRAWS[recipe.denoiser], enhancer

    def sample(self, number: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        g = torch.Generator().manual_seed(number)
        size = self.enhancer.backbone.image_size
        image = torch.randint(0, 256, (3, size, size), generator=g, dtype=torch.uint8)
        return image, self.draws(self.enhancer.denoiser, g)

    def __iter__(self):
        while True:
            first = (self.step * self.world + self.rank) * self.size
            images, drawn = zip(*(self.sample(first + i) for i in range(self.size)), strict=True)
            self.step += 1
            draws = {name: torch.stack([d[name] for d in drawn]) for name in drawn[0]}
            keys = [str(first + i) for i in range(self.size)]
            yield {"images": torch.stack(images), "draws": draws, "keys": keys}

    def close(self):
        pass

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def main(config: dict) -> None:
    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    out = Path(config["output"])
    for name, deepspeed, precision in config["runs"]:
        fields = {
            **config["fields"],
            "precision": precision,
            "per_device_batch_size": config["half_batch"] * 2 // world,
        }
        if "vae" in fields:  # its posterior would be drawn rank by rank
            fields["vae_posterior"] = "mean"
        recipe = recipes.override(recipes.Recipe(), fields)
        earlier = []
        for stage in (1, 2):
            args = training_arguments(recipe, stage, out / name / f"stage{stage}", deepspeed)
            target = load_target(recipe)
            with engine.without_zero_init(args):
                enhancer = build_stage(recipe, stage, target, earlier)
            loader = FixedBatches(recipe, rank, world, enhancer)
            trainer = EnhanceTrainer(enhancer, args, loader, target=target, keep_checkpoints=2, facts={"world": world})
            final = trainer.run()
            earlier.append(final / "weights.safetensors")
            if rank == 0:
                (out / f"{name}-stage{stage}.safetensors").write_bytes(earlier[-1].read_bytes())
                losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
                (out / f"{name}-stage{stage}.json").write_text(json.dumps(losses))
            trainer.barrier()
            engine.forget()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
