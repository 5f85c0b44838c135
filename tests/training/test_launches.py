"""Several processes: ZeRO 1-3 against one rank, and stops and kills under torchrun and the deepspeed launcher."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_genhancer import run
from llava_genhancer.resources import resource_dir

pytestmark = pytest.mark.launch
BIN = Path(sys.executable).parent
HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
ENVIRONMENT["PATH"] = f"{BIN}:{ENVIRONMENT['PATH']}"
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]


def zero(stage: int) -> str:
    return str(resource_dir("configs") / "deepspeed" / f"zero{stage}.json")


def call(command: list[str], timeout: float = 240) -> subprocess.CompletedProcess:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.mark.parametrize("denoiser", ["flow", pytest.param("masked", marks=pytest.mark.slow)])
def test_zero_1_2_3_and_ddp_agree_with_one_rank(tiny_fields, masked_fields, tmp_path, denoiser: str) -> None:
    """Both stages, dropout 0, given draws: 1 rank, and 2 ranks x half batch under DDP and ZeRO 1, 2, 3."""
    fields = {
        **{"flow": tiny_fields, "masked": masked_fields}[denoiser],
        "lora_dropout": 0.0,
        "sample_images": 0,
        "stage1.max_steps": 6,
        "stage2.max_steps": 6,
        "stage2.snapshot_steps": "",
    }
    runs = [("ddp", None, "fp32"), *((f"zero{z}", zero(z), "fp32") for z in (1, 2, 3))]
    runs += [(f"zero{z}-bf16", zero(z), "bf16") for z in (2, 3)]
    for name, chosen, launcher in (("one", [("one", None, "fp32")], [sys.executable]), ("two", runs, TORCHRUN)):
        config = {"fields": fields, "output": str(tmp_path / name), "half_batch": 4, "runs": chosen}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        call([*launcher, str(HERE / "fixed_batches.py"), str(tmp_path / f"{name}.json")])
    for stage in (1, 2):
        expected = load_file(tmp_path / "one" / f"one-stage{stage}.safetensors")
        for name, _, precision in runs:
            got = load_file(tmp_path / "two" / f"{name}-stage{stage}.safetensors")
            assert got.keys() == expected.keys()
            assert {v.dtype for v in got.values()} == {torch.float32}
            error = max(float((got[n] - expected[n]).abs().max()) for n in expected)
            assert error < (1e-5 if precision == "fp32" else 0.02), f"{name}, stage {stage}: {error}"
        if stage == 1:  # the master weights, not their bf16 copies, are what is kept
            kept = load_file(tmp_path / "two" / "zero2-bf16-stage1.safetensors")
            assert any(not torch.equal(v, v.bfloat16().float()) for v in kept.values())


@pytest.fixture(scope="module")
def long_fields(tiny_fields) -> list[str]:
    fields = {
        **tiny_fields,
        "num_workers": 1,
        "sample_images": 2,
        "stage1.max_steps": 40,
        "stage1.save_steps": 10,
        "stage1.sample_steps": 20,
        "stage2.max_steps": 40,
        "stage2.save_steps": 10,
        "stage2.sample_steps": 20,
        "stage2.snapshot_steps": "",
    }
    return [f"--{k}={v}" for k, v in fields.items()]


def enhance(launcher: list[str], run_dir: Path, fields: list[str]) -> list[str]:
    module = ["--module"] if "deepspeed" in launcher[0] else ["-m"]
    arguments = ["--output_dir", str(run_dir), "--deepspeed", zero(2), *fields]
    return [*launcher, *module, "llava_genhancer", "enhance", "openai-l14-224", *arguments]


@pytest.fixture(scope="module")
def whole(long_fields, tmp_path_factory) -> Path:
    """ZeRO-2 on two ranks with data workers, never interrupted."""
    run_dir = tmp_path_factory.mktemp("launch") / "whole"
    call(enhance(TORCHRUN, run_dir, long_fields))
    return run_dir


def interrupt(command: list[str], run_dir: Path, stage: str, checkpoint: int, hit) -> tuple[int, str]:
    """Start, wait for a checkpoint, do ``hit(process)``, and return how it ended; no process may be left."""
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / stage / f"checkpoint-{checkpoint}" / run.MARKER).exists():
            assert process.poll() is None, process.stdout.read()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        hit(process)
        output, _ = process.communicate(timeout=120)
        deadline = time.monotonic() + 15
        while ours(run_dir) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not ours(run_dir), "processes were left behind"
        return process.returncode, output
    finally:
        for pid in ours(run_dir):
            os.kill(pid, signal.SIGKILL)


def ours(run_dir: Path) -> list[int]:
    """Processes that carry the run folder on their command line (ranks, workers, launchers)."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(run_dir).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def is_rank(pid: int) -> bool:
    try:
        return b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def ranks(run_dir: Path) -> list[int]:
    """The two training processes: launched with a rank by a launcher that has none (data workers inherit theirs)."""

    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])

    return [pid for pid in ours(run_dir) if is_rank(pid) and not is_rank(parent(pid))]


def same_weights(a: Path, b: Path) -> None:
    for name in ("stage1/weights.safetensors", "stage2/weights.safetensors", "tower/model.safetensors"):
        assert run.sha256(a / name) == run.sha256(b / name), name


def test_sigterm_and_kill_under_torchrun(whole, long_fields, tmp_path) -> None:
    run_dir = tmp_path / "run"
    command = enhance(TORCHRUN, run_dir, long_fields)
    # A polite stop of the launcher in stage 1: a checkpoint at the step's end, on both ranks.
    status, output = interrupt(command, run_dir, "stage1", 10, lambda p: p.send_signal(signal.SIGTERM))
    assert status != 0
    assert "saving at the end of this step" in output, output[-3000:]
    step = int(run.last_complete_checkpoint(run_dir / "stage1").name.split("-")[1])
    assert step > 10
    # kill -9 of one rank in stage 2: at most the steps since the last checkpoint are lost.
    status, output = interrupt(command, run_dir, "stage2", 10, lambda p: os.kill(ranks(run_dir)[0], signal.SIGKILL))
    assert status != 0
    assert run.last_complete_checkpoint(run_dir / "stage2") is not None
    call(command)
    same_weights(run_dir, whole)


@pytest.mark.skipif(shutil.which("deepspeed", path=str(BIN)) is None, reason="deepspeed's launcher is not installed")
def test_sigterm_under_the_deepspeed_launcher(whole, long_fields, tmp_path) -> None:
    run_dir = tmp_path / "run"
    launcher = [str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={29500 + os.getpid() % 2000}"]
    command = enhance(launcher, run_dir, long_fields)
    status, output = interrupt(command, run_dir, "stage1", 10, lambda p: p.send_signal(signal.SIGTERM))
    assert status != 0
    assert int(run.last_complete_checkpoint(run_dir / "stage1").name.split("-")[1]) >= 10
    assert "saving at the end of this step" in output, output[-3000:]
    call(command)
    same_weights(run_dir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_masters_in_fp32_over_a_frozen_bf16_denoiser_resume_under_zero_2(precision: str, tmp_path: Path) -> None:
    """FLUX's method, both stages: DeepSpeed gets parts of two precisions, and neither may leak into what is trained."""
    fields = {"denoiser_dtype": "bfloat16", "precision": precision, "num_workers": 1, "sample_images": 0}
    fields |= {"global_batch_size": 8, "per_device_batch_size": 4, "stage2.snapshot_steps": ""}
    for stage in (1, 2):
        fields |= {f"stage{stage}.max_steps": 30, f"stage{stage}.save_steps": 5, f"stage{stage}.warmup_steps": 0}
    command = [*TORCHRUN, "-m", "llava_genhancer", "enhance", "tiny-flux", "--deepspeed", zero(2)]
    command += [f"--{name}={value}" for name, value in fields.items()]
    whole, cut = ([*command, "--output_dir", str(tmp_path / name)] for name in ("whole", "cut"))
    call(whole)
    for stage in ("stage1", "stage2"):
        interrupt(cut, tmp_path / "cut", stage, 10, lambda p: os.kill(ranks(tmp_path / "cut")[1], signal.SIGKILL))
    call(cut)
    same_weights(tmp_path / "cut", tmp_path / "whole")
    for stage in ("stage1", "stage2"):
        learnt = load_file(tmp_path / "cut" / stage / "weights.safetensors")
        assert {value.dtype for value in learnt.values()} == {torch.float32}
        assert any(not torch.equal(value, value.bfloat16().float()) for value in learnt.values()), "no masters"
        assert not any(name.startswith("denoiser.") for name in learnt)


@pytest.mark.parametrize("wrong", [{1}, {0, 1}])
def test_an_error_before_training_is_one_line_and_ends_the_launch(images_folder, tmp_path, wrong: set[int]) -> None:
    """Of the second rank alone, which nobody printed, and of all ranks."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys; from llava_genhancer import cli\n"
        "data = sys.argv[2 + int(os.environ['RANK'])]\n"
        "size = ['--per_device_batch_size', '16']\n"
        "cli.main(['enhance', 'tiny', '--output_dir', sys.argv[1], '--data', data, *size])"
    )
    data = [str(tmp_path / "nowhere" if rank in wrong else images_folder) for rank in range(2)]
    done = subprocess.run(
        [*TORCHRUN, str(script), str(tmp_path / "run"), *data],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if "llava-genhancer: " in line)
    assert "nowhere" in line
