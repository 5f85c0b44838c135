"""Train both stages on a fixed list of batches with given noise and t; run by torchrun or alone.

    python fixed_batches.py CONFIG.json

CONFIG: recipe fields, output folder, a list of (name, DeepSpeed JSON or null, precision). Weights after each go to
OUT/<name>-stage<N>.safetensors.
"""

import json
import os
import sys
from pathlib import Path

import torch

from llava_genhancer import engine, recipes
from llava_genhancer.enhance.stages import build_stage
from llava_genhancer.enhance.targets import load_vae_target
from llava_genhancer.enhance.train import EnhanceTrainer, training_arguments


class FixedBatches:
    """This rank's part of global micro-batches; image, noise and t depend on the sample's global number only."""

    def __init__(self, recipe: recipes.Recipe, rank: int, world: int, token_shape: tuple[int, int], image: int):
        self.size, self.world, self.rank, self.step = recipe.per_device_batch_size, world, rank, 0
        self.accumulate = recipe.global_batch_size // (self.size * world)
        self.token_shape, self.image = token_shape, image

    def sample(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(number)
        image = torch.randint(0, 256, (3, self.image, self.image), generator=g, dtype=torch.uint8)
        return image, torch.randn(self.token_shape, generator=g), torch.rand((), generator=g)

    def __iter__(self):
        while True:
            first = (self.step * self.world + self.rank) * self.size
            images, noise, t = zip(*(self.sample(first + i) for i in range(self.size)), strict=True)
            self.step += 1
            draws = {"noise": torch.stack(noise), "t": torch.stack(t)}
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
        recipe = recipes.override(recipes.Recipe(), fields)
        earlier = []
        for stage in (1, 2):
            args = training_arguments(recipe, stage, out / name / f"stage{stage}", deepspeed)
            target = load_vae_target(recipe.vae, posterior="mean")
            with engine.without_zero_init(args):
                enhancer = build_stage(recipe, stage, target, earlier)
            loader = FixedBatches(recipe, rank, world, enhancer.denoiser.token_shape, enhancer.backbone.image_size)
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
