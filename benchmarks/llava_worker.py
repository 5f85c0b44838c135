"""One training of LLaVA, ours or llava-torch's own, with a watch on its steps; started by `llava_train.py`.

Runs in either environment: transformers 4.37 and 5 call the same hooks, so both are timed by the same lines.

    python llava_worker.py ours|theirs pretrain|finetune FOLDER RESULT.json TURN_IN TURN_OUT

The last two are pipes: a step waits for a byte from the one, and its end puts a byte into the other.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback

IMAGE_TOKEN_INDEX = -200  # of both


class Watch(TrainerCallback):
    """Seconds of every step, its data included, real tokens of every batch, and memory.

    Args:
        tokens_per_image: places that an image takes in the language model's input.
        turns: descriptors to read a turn from and to write it to; without them no step waits.
    """

    def __init__(self, tokens_per_image: int, turns: tuple[int, int] | None = None):
        self.tokens_per_image, self.turns = tokens_per_image, turns
        self.begun = (0.0, 0.0)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []
        self.memory: dict[str, int] = {}

    def begin(self) -> None:
        """Wait for the turn, then start the clocks: the wall's, and of this process alone."""
        if self.turns is not None:
            os.read(self.turns[0], 1)
        self.begun = (time.perf_counter(), time.process_time())

    def end(self) -> None:
        """Stop the clocks and give the turn away."""
        self.seconds.append(time.perf_counter() - self.begun[0])
        self.cpu_seconds.append(time.process_time() - self.begun[1])
        self.give()

    def give(self) -> None:
        """The other one's turn."""
        if self.turns is not None:
            os.write(self.turns[1], b"x")

    def count(self, inputs: dict[str, Any]) -> None:
        """Padding aside, with images as long as the language model sees them: ours comes so, theirs as one token."""
        shown = 0
        if "images" in inputs:
            shown = int((inputs["input_ids"] == IMAGE_TOKEN_INDEX).sum())
        self.tokens.append(int(inputs["attention_mask"].sum()) + shown * (self.tokens_per_image - 1))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.memory["start_bytes"] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end()
        self.begin()  # after the last step too: what this one writes then must not disturb the other one's step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.give()
        self.memory["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def result(self) -> dict[str, Any]:
        """What was seen, step by step."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "tokens": self.tokens,
            "losses": self.losses,
            **self.memory,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def watch_trainers(watch: Watch) -> None:
    """Every Trainer of this process calls the watch."""
    transformers.trainer.DEFAULT_CALLBACKS.append(watch)
    step = Trainer.training_step

    def counted(self: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        watch.count(inputs)
        return step(self, model, inputs, *rest)

    Trainer.training_step = counted  # type: ignore[method-assign]


def ours(stage: str, folder: Path, job: dict[str, Any], output: str) -> None:
    """What `llava-genhancer llava pretrain` and `finetune` do."""
    from llava_genhancer import recipes
    from llava_genhancer.llava.recipes import LlavaRecipe
    from llava_genhancer.llava.train import train_step

    fields = {
        "llm": str(folder / "llm"),
        "tower": str(folder / "tower"),
        "precision": "fp32",
        "max_length": job["max_length"],
        "num_workers": 0,
        "pretrain.max_steps": 0,  # no projector to start from, as theirs has none
        f"{stage}.data": str(folder / f"{stage}.json"),
        f"{stage}.image_folder": str(folder / "images"),
        f"{stage}.global_batch_size": job["batch"],
        f"{stage}.per_device_batch_size": job["batch"],
        f"{stage}.learning_rate": job["learning_rate"],
        f"{stage}.max_steps": job["steps"],
        f"{stage}.packing": job["packing"],
    }
    train_step(recipes.override(LlavaRecipe(), fields), stage, output)


def theirs(stage: str, folder: Path, job: dict[str, Any], output: str) -> None:
    """llava.train.train with the arguments of its scripts/v1_5, on a CPU."""
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.train.train import train

    # Without bf16 it puts the tower into half precision, which is slow on a CPU: here it stays as it was loaded.
    CLIPVisionTower.to = lambda self, *args, **kwargs: self
    fields = {
        "model_name_or_path": folder / "llm",
        "vision_tower": folder / "tower",
        "data_path": folder / f"{stage}.json",
        "image_folder": folder / "images",
        "output_dir": Path(output) / f"llava-{stage}",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_cpu": True,
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch"],
        "save_strategy": "no",
        "learning_rate": job["learning_rate"],
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "model_max_length": job["max_length"],
        "gradient_checkpointing": True,
        "dataloader_num_workers": 0,
        "lazy_preprocess": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if stage == "pretrain":
        fields |= {"version": "plain", "tune_mm_mlp_adapter": True}
    else:
        fields |= {"version": "v1", "image_aspect_ratio": "pad", "group_by_modality_length": True}
    sys.argv = ["train.py", *(part for name, value in fields.items() for part in (f"--{name}", str(value)))]
    train()


def main(trainer: str, stage: str, folder: str, result_file: str, turn_in: str, turn_out: str) -> None:
    """Train and write what the watch saw."""
    job = json.loads(Path(folder, "job.json").read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    watch = Watch(job["tokens_per_image"], (int(turn_in), int(turn_out)))
    watch_trainers(watch)
    with tempfile.TemporaryDirectory() as output:
        {"ours": ours, "theirs": theirs}[trainer](stage, Path(folder), job, output)
    Path(result_file).write_text(json.dumps(watch.result()))


if __name__ == "__main__":
    main(*sys.argv[1:])
