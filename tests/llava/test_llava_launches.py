"""Two ranks, one with words alone while the other has images: DDP and ZeRO 2 and 3 against one rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llava_batches import train
from safetensors.torch import load_file

from llava_genhancer.resources import resource_dir

pytestmark = pytest.mark.launch
BIN = Path(sys.executable).parent
LORA = {"lora_rank": 4, "lora_dropout": 0.0, "finetune.projector_learning_rate": 1e-2}
BF16 = {"precision": "bf16"}
# Largest |weight - one rank's| after two steps; bf16 models drift by what bf16 resolves.
RUNS = [
    ("ddp-items", "finetune", None, {"normalise_loss": "items"}, 1e-5),
    ("zero2-pretrain", "pretrain", 2, {}, 1e-5),
    ("zero2-lora-bf16", "finetune", 2, {**LORA, **BF16}, 2e-2),
    ("zero3-lora", "finetune", 3, LORA, 1e-5),
    ("zero3-packed", "finetune", 3, {"finetune.packing": True}, 1e-5),
    ("zero3-bf16", "finetune", 3, BF16, 1e-2),
]
RESUMED = (
    "zero2-lora-bf16",
    "zero3-bf16",
)  # stopped in step 2 without a word, begun anew from the checkpoint of step 1


def test_two_ranks_agree_with_one(llava_fields, tmp_path) -> None:
    """A rank that skipped the projector for want of images would hang the other one; the time-out would say so."""
    fields = {**llava_fields, "pretrain.max_steps": 2, "finetune.max_steps": 2, "finetune.save_steps": 1}
    jsons = resource_dir("configs") / "deepspeed"
    runs = []
    for name, step, zero, changes, _ in RUNS:
        run = (step, zero and str(jsons / f"zero{zero}.json"), changes)
        # At once: DeepSpeed replaces torch's linear function in a process that has seen ZeRO-3.
        runs += [(name, *run, None)] + [(f"{name}-resumed", *run, 2)] * (name in RESUMED)
    config = {"fields": fields, "output": str(tmp_path), "runs": runs}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [BIN / "torchrun", "--standalone", "--nproc_per_node=2", Path(__file__).with_name("llava_batches.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, tmp_path / "config.json"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    one: dict[str, dict] = {}
    for name, step, _, changes, tolerance in RUNS:
        padded = {**changes, "finetune.packing": False}
        key = json.dumps([step, padded])
        if key not in one:
            one[key] = load_file(train({**fields, **padded}, step, None, tmp_path / f"one-{len(one)}"))
        expected, got = one[key], load_file(tmp_path / f"{name}.safetensors")
        assert got.keys() == expected.keys(), name
        error = max(float((got[n] - expected[n]).abs().max()) for n in expected)
        assert error <= tolerance, f"{name}: {error}"
    for name in RESUMED:
        whole, resumed = (load_file(tmp_path / f"{n}.safetensors") for n in (name, f"{name}-resumed"))
        assert all(torch.equal(whole[n], resumed[n]) for n in whole), name
