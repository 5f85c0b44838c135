"""Train LLaVA's steps on fixed micro-batches, some without images; run by torchrun, or called in one process.

    python llava_batches.py CONFIG.json

CONFIG: recipe fields, output folder, a list of (name, step, DeepSpeed JSON or null, changed fields, training step after
which it crashes and is begun anew, or null). The trained weights of each go to OUT/<name>.safetensors. Micro-batch m of
all is the same for any number of ranks.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from llava_genhancer import engine, recipes
from llava_genhancer.llava.batches import LlavaReport
from llava_genhancer.llava.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_genhancer.llava.model import build_llava, llava_config
from llava_genhancer.llava.recipes import LlavaRecipe
from llava_genhancer.llava.train import build_trainer, training_arguments

LENGTH = 40


def micro_batch(number: int, size: int, patches: int, side: int, words: int) -> dict:
    """Samples of random words; every odd micro-batch is text alone, the others have an image in most samples."""
    g = torch.Generator().manual_seed(number)
    ids = torch.randint(3, words, (size, LENGTH), generator=g)
    labels = ids.clone()
    images = []
    for i in range(size):
        length = int(torch.randint(patches + 8, LENGTH + 1, (), generator=g))
        labels[i, : patches + 2] = IGNORE_INDEX
        if number % 2 == 0 and i != 1:
            ids[i, 1 : patches + 1] = IMAGE_TOKEN_INDEX
            images.append(torch.randn(3, side, side, generator=g))
        ids[i, length:], labels[i, length:] = 0, IGNORE_INDEX
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.stack(images) if images else None,
        "keys": [f"{number}.{i}" for i in range(size)],
    }


def cut(batch: dict, part: int, size: int) -> dict:
    """Samples ``part * size`` to ``(part + 1) * size`` of a batch."""
    rows = slice(part * size, (part + 1) * size)
    shown = (batch["input_ids"] == IMAGE_TOKEN_INDEX).any(1)
    first, count = int(shown[: rows.start].sum()), int(shown[rows].sum())
    return {
        "input_ids": batch["input_ids"][rows],
        "labels": batch["labels"][rows],
        "pixel_values": batch["pixel_values"][first : first + count] if count else None,
        "keys": batch["keys"][rows],
    }


def pack(batch: dict) -> dict:
    """The same samples in one row; what teaches nothing at the end of a sample is taken for padding."""
    lengths = [max(i for i, label in enumerate(row) if label != IGNORE_INDEX) + 1 for row in batch["labels"].tolist()]
    row = torch.cat([torch.arange(n) + i * batch["labels"].shape[1] for i, n in enumerate(lengths)])
    labels = batch["labels"].flatten()[row]
    assert (labels[torch.tensor([0, *lengths[:-1]]).cumsum(0)] == IGNORE_INDEX).all()
    return {**batch, "input_ids": batch["input_ids"].flatten()[row][None], "labels": labels[None], "lengths": lengths}


class FixedBatches:
    """This rank's micro-batches, or the parts of ``size`` samples that larger ones of ``whole`` are cut into."""

    def __init__(self, rank: int, world: int, *, size: int, whole: int | None = None, packing=False, **shape: int):
        self.rank, self.world, self.shape, self.packing, self.step = rank, world, shape, packing, 0
        self.size, self.whole = size, whole or size

    def __iter__(self):
        while True:
            number = self.step * self.world + self.rank
            self.step += 1
            parts = self.whole // self.size
            batch = cut(micro_batch(number // parts, self.whole, **self.shape), number % parts, self.size)
            yield pack(batch) if self.packing else batch

    def close(self):
        pass

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]

    def report(self):
        return LlavaReport()


class Crash(BaseException):
    """Stands for kill -9."""


class Bomb(TrainerCallback):
    """Ends training after a step, before anything of it is saved."""

    def __init__(self, at: int):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise Crash


def train(
    fields: dict, step: str, deepspeed: str | None, folder: Path, whole: int | None = None, crash: int | None = None
) -> Path:
    """The weights after a step, trained in this launch.

    ``whole`` as in :class:`FixedBatches`; ``crash`` is the step after which training ends, to be begun anew.
    """
    recipe = recipes.override(LlavaRecipe(name="test"), fields)
    config = llava_config(recipe)
    args = training_arguments(recipe, step, folder, deepspeed, samples=0)
    with engine.without_zero_init(args):
        model = build_llava(recipe, step, bf16_everywhere=deepspeed is not None and recipe.precision == "bf16")
    loader = FixedBatches(
        args.process_index,
        args.world_size,
        size=recipe.step(step).per_device_batch_size,
        whole=whole,
        packing=recipe.step(step).packing,
        patches=config.image_seq_length,
        side=config.vision_config.image_size,
        words=config.text_config.vocab_size,
    )
    trainer = build_trainer(recipe, step, model, args, loader)
    if crash is not None:
        trainer.add_callback(Bomb(crash))
        with contextlib.suppress(Crash):
            trainer.run()
        engine.forget()
        return train(fields, step, deepspeed, folder, whole)
    final = trainer.run()
    assert all(b.dtype == torch.float32 for b in model.buffers() if b.is_floating_point()), "RoPE was rounded"
    trainer.barrier()
    engine.forget()
    return final / "weights.safetensors"


def main(config: dict) -> None:
    torch.set_num_threads(1)
    out = Path(config["output"])
    for name, step, deepspeed, changes, crash in config["runs"]:
        weights = train({**config["fields"], **changes}, step, deepspeed, out / name, crash=crash)
        if int(os.environ.get("RANK", "0")) == 0:
            (out / f"{name}.safetensors").write_bytes(weights.read_bytes())


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
