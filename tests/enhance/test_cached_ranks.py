"""Two ranks fill and read one cache: no unit twice, the bytes of one rank, and its loss under DDP and ZeRO-2."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llava_genhancer.resources import resource_dir

pytestmark = [pytest.mark.slow, pytest.mark.launch]
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
ENVIRONMENT["PATH"] = f"{BIN}:{ENVIRONMENT['PATH']}"
SHARDS = 5


def launch(launcher: list[str], folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "output": str(folder)}))
    command = [*launcher, str(Path(__file__).parent / "cached_ranks.py"), str(folder / "config.json")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_two_ranks_share_a_cache(tiny_fields: dict[str, object], images_folder: Path, tmp_path: Path) -> None:
    files = sorted(images_folder.glob("*.jpg"))
    (data := tmp_path / "data").mkdir()
    for shard in range(SHARDS):
        with tarfile.open(data / f"{shard}.tar", "w") as tar:
            for file in files[shard::SHARDS]:
                tar.add(file, file.name)
    fields = {
        **tiny_fields,
        "data": str(data),
        "cache_crops": 2,
        "vae_posterior": "mean",  # a draw from it would be each rank's own
        "sample_images": 0,
        "stage1.max_steps": 6,
        "stage1.log_steps": 1,
    }
    zero = str(resource_dir("configs") / "deepspeed" / "zero2.json")
    one, two = ({"fields": fields, "cache": str(tmp_path / f"cache-{n}")} for n in ("one", "two"))
    launch([sys.executable], tmp_path / "one", {**one, "runs": [("plain", None)]})
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]
    launch(torchrun, tmp_path / "two", {**two, "runs": [("ddp", None), ("zero2", zero)]})

    cache = {p.relative_to(tmp_path / "cache-one"): p.read_bytes() for p in (tmp_path / "cache-one").rglob("0*")}
    assert len(cache) == 2 * 2 * SHARDS  # records and keys of targets and of tokens
    assert {
        p.relative_to(tmp_path / "cache-two"): p.read_bytes() for p in (tmp_path / "cache-two").rglob("0*")
    } == cache
    mine, other = (json.loads((tmp_path / "two" / f"written-{rank}.json").read_text()) for rank in (0, 1))
    assert len(mine) + len(other) == len({*mine, *other}) == 2 * SHARDS, "a unit is written once, by one rank"
    assert mine
    assert other

    expected = load_file(tmp_path / "one" / "plain.safetensors")
    losses = json.loads((tmp_path / "one" / "plain.json").read_text())
    assert len(losses) == 6
    for name in ("ddp", "zero2"):
        assert json.loads((tmp_path / "two" / f"{name}.json").read_text()) == pytest.approx(losses, abs=2e-4)  # rounded
        got = load_file(tmp_path / "two" / f"{name}.safetensors")
        assert got.keys() == expected.keys()
        assert max(float((got[key] - expected[key]).abs().max()) for key in expected) < 1e-5, name
