"""What the doctor says about machines that are good, poor, wrongly set up or without the training packages."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_genhancer import cli, costs, doctor, machine, recipes
from llava_genhancer.costs import GIB, folders
from llava_genhancer.doctor import devices, environment, models
from llava_genhancer.doctor.devices import Gpu
from llava_genhancer.doctor.findings import NOTE, OK, PROBLEM, Finding
from llava_genhancer.doctor.plan import Plan
from llava_genhancer.errors import InputError

TINY, PAPER = recipes.get_recipe("tiny"), recipes.get_recipe("openai-l14-224")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def ordinary_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine like any other, whatever this one has: memory and disk enough, a hub to be reached, a token."""
    monkeypatch.setattr(machine, "host_memory", lambda: 512 * GIB)
    monkeypatch.setattr(machine, "free_bytes", lambda path: 512 * GIB)
    monkeypatch.setattr(devices, "find_gpus", lambda torch: [])
    monkeypatch.setattr(devices, "matmul_rate", lambda torch, device, *rest: 1e12 if device == "cpu" else 600e12)
    monkeypatch.setattr(models, "has_token", lambda: True)
    monkeypatch.setattr(folders, "cached", lambda name, *files: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def gpu(gigabytes: float, free: float = 1.0, capability: tuple[int, int] = (9, 0)) -> Gpu:
    return Gpu("Test GPU", free * gigabytes * 1e9, gigabytes * 1e9, capability)


def use(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    monkeypatch.setattr(devices, "find_gpus", lambda torch: list(gpus))


def findings(recipe: recipes.Recipe, **kwargs: object) -> dict[str, Finding]:
    return {f.what: f for f in doctor.inspect(recipe, **kwargs)}


def problems(recipe: recipes.Recipe, **kwargs: object) -> dict[str, Finding]:
    return {what: f for what, f in findings(recipe, **kwargs).items() if f.status == PROBLEM}


def test_tiny_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "tiny", "--output_dir", str(tmp_path / "run")])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "tiny can run here"
    assert all(re.match(r"(OK  |note|PROBLEM)    | {20}", line) or not line for line in lines[:-1])
    assert not (tmp_path / "run").exists()


def test_the_paper_wants_a_gpu(capsys: pytest.CaptureFixture) -> None:
    assert doctor.examine(PAPER) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"PROBLEM devices \d+ CPU cores?, no GPU -> use a machine with a GPU", text)
    assert text.endswith("openai-l14-224 cannot run here yet: 1 problem above")


def test_eight_large_gpus_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, *[gpu(80)] * 8)
    found = findings(PAPER)
    assert not [f for f in found.values() if f.status == PROBLEM]
    assert "8 x 16 x 2 accumulated = 256 images" in found["batch"].found
    assert "8 GPUs" in found["compute"].found
    assert found["memory stage 1"].status == OK


def test_a_small_gpu_gets_advice_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, *[gpu(24)] * 8)
    bad = problems(PAPER)["memory stage 1"]
    assert "--deepspeed configs/deepspeed/zero2.json" in bad.todo
    use(monkeypatch, gpu(4))
    assert problems(PAPER)["memory stage 1"].todo.startswith("no setting fits")


def test_advice_lowers_the_batch_last() -> None:
    backbone = costs.KNOWN_BACKBONES[PAPER.backbone]
    words = Plan(PAPER, backbone, costs.FLUX_VAE, costs.Zero(2), 8, [], Path()).smaller(2, 10 * GIB)
    changed = recipes.override(PAPER, dict(pair.split() for pair in words.removeprefix("use --").split(" --")))
    assert costs.memory(changed, 2, backbone, zero=costs.Zero(2), ranks=8).total < 10 * GIB


def test_the_discrete_denoisers_tokenizer_is_counted(tmp_path: Path) -> None:
    recipe = recipes.get_recipe("tiny-masked")
    found = findings(recipe)
    assert re.fullmatch(r"toyworld:vq: [\d.]+ M parameters, \d+ codes", found["VQ-GAN"].found)
    assert not [f for f in found.values() if f.status == PROBLEM and f.what not in ("devices", "run folder")]
    assert "target tokenizer" in findings(recipes.get_recipe("openai-l14-224-masked"))["memory stage 1"].found
    assert "does not exist" in problems(recipes.get_recipe("openai-l14-224-masked"))["VQ-GAN"].found
    assert "multiple of 4" in problems(recipes.override(recipe, {"target_size": 50}))["image size"].todo


def test_a_pretrained_denoiser_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.get_recipe("tiny-diva")
    assert re.fullmatch(r"toyworld:sd: [\d.]+ M parameters", findings(recipe)["denoiser"].found)
    gone = dataclasses.replace(recipe, denoiser_weights=str(tmp_path / "nowhere"))
    assert "does not exist" in problems(gone)["denoiser"].found
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "given")
    assert "22.2 GiB" in findings(recipes.get_recipe("openai-l14-224-flux"))["denoiser"].found


def test_gpus_with_something_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, gpu(80, capability=(7, 0)))
    assert "--precision fp32" in problems(PAPER)["GPU 0"].todo
    use(monkeypatch, gpu(80, free=0.5))
    assert findings(PAPER)["GPU 0"].status == NOTE
    assert "several nodes" in findings(PAPER, gpus=4)["GPUs"].todo


def test_more_gpus_than_the_batch_allows() -> None:
    assert "not a multiple of 3 x 16" in problems(PAPER, gpus=3)["batch"].found
    with pytest.raises(InputError, match="--gpus 0"):
        list(doctor.inspect(PAPER, gpus=0))


def test_forecast_for_a_cluster_names_the_zero_stage(tmp_path: Path) -> None:
    found = {}
    for stage in (1, 2, 3):
        path = tmp_path / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}, "gradient_clipping": "auto"}))
        line = findings(PAPER, deepspeed=str(path), gpus=8)["memory stage 1"].found
        assert f"(8 GPUs, ZeRO-{stage})" in line
        found[stage] = float(line.split()[0])
    assert found[1] > found[2] > found[3]


def test_deepspeed_json(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"optimizer": {}, "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}))
    lines = [f for f in doctor.inspect(PAPER, deepspeed=str(path)) if f.what == "deepspeed JSON"]
    assert [f.status for f in lines] == [OK, NOTE, NOTE]
    assert "clips at 1.0" in lines[1].found
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    zero, _ = environment.deepspeed_json(str(path))
    assert zero == costs.Zero(3, offload_optimizer=True)
    for text in ("{", "[]", '{"zero_optimization": {"stage": 7}}'):
        path.write_text(text)
        assert "cannot be used" in problems(PAPER, deepspeed=str(path))["deepspeed JSON"].found
    assert "deepspeed JSON" in problems(PAPER, deepspeed=str(tmp_path / "none.json"))


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.4.1+cu121", "transformers": "4.37.2", "peft": "0.20.0.dev0"}
    monkeypatch.setattr(environment, "version", lambda package: versions.get(package))
    bad = problems(TINY)
    assert bad["torch"].found == "2.4.1+cu121, needed 2.8 or newer"
    assert bad["diffusers"].found == "not installed"
    assert [f.todo for f in bad.values() if f.todo] == ['pip install "llava-genhancer[train]"']
    assert "transformers" in bad
    assert not {"peft", "deepspeed"} & set(bad)


def test_required_versions_are_those_of_pyproject() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {}
    for line in (*project["dependencies"], *project["optional-dependencies"]["train"]):  # [train] overrides the base
        name, _, least = re.match(r"([\w-]+)(>=)?([\d.]*)", line).groups()
        bounds[name] = least
    for name, least in {**environment.REQUIRED, **environment.SOMETIMES}.items():
        assert bounds[name] == least, name


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PYTHON", (9, 0))
    assert "new environment" in problems(TINY)["python"].todo


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_torch", lambda: None)
    assert "compute" not in findings(TINY)


def test_too_little_memory_or_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_memory", lambda: 2 * GIB)
    monkeypatch.setattr(machine, "free_bytes", lambda path: GIB)
    assert {"main memory", "disk"} <= set(problems(PAPER, gpus=8))
    assert "HF_HOME" in problems(PAPER)["backbone"].todo


def test_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "will be downloaded (about 1.6 GiB)" in findings(PAPER)["backbone"].found
    assert findings(PAPER)["VAE"].status == NOTE
    monkeypatch.setattr(models, "has_token", lambda: False)
    assert "ae.safetensors" in problems(PAPER)["VAE"].todo
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in problems(PAPER)["backbone"].found
    unknown = dataclasses.replace(PAPER, backbone="someone/else")
    assert findings(unknown)["backbone"].status == NOTE


def test_local_folders(tiny_clip: Path, tiny_vae: Path, images_folder: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(TINY, backbone=str(tiny_clip), vae=str(tiny_vae), data=str(images_folder))
    found = findings(recipe)
    assert not [f for f in found.values() if f.status == PROBLEM]
    assert "32 px" in found["backbone"].found
    assert "40 images" in found["data"].found
    (tmp_path / "config.json").write_bytes((tiny_clip / "config.json").read_bytes())
    assert "no weights" in problems(dataclasses.replace(recipe, backbone=str(tmp_path)))["backbone"].found
    assert "no weights" in problems(dataclasses.replace(recipe, vae=str(tmp_path)))["VAE"].found
    assert "no config.json" in problems(dataclasses.replace(recipe, backbone=str(images_folder)))["backbone"].found
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "cannot be used" in problems(dataclasses.replace(recipe, backbone=str(tmp_path)))["backbone"].found
    pickle = tmp_path / "ae.ckpt"
    pickle.touch()
    assert "VAE" in problems(dataclasses.replace(recipe, vae=str(pickle)))
    assert "does not exist" in problems(dataclasses.replace(recipe, data="/nowhere/at/all"))["data"].found
    assert "image size" in problems(dataclasses.replace(recipe, image_size=36))


def test_a_cache_is_forecast(
    tiny_clip: Path, tiny_vae: Path, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = {"backbone": str(tiny_clip), "vae": str(tiny_vae), "data": str(images_folder), "cache_crops": 3}
    recipe = recipes.override(TINY, local)
    facts = costs.facts_of(recipe)
    assert facts is not None
    found = findings(recipe, run_dir=str(tmp_path / "run"))
    # Two moments of 4 channels on 16 x 16 latents, and one token of 32 numbers, in two bytes each.
    assert "targets: about 40 images x 3 crops x 2.0 KiB; tokens: about 40 images x 3 crops x 0.1 KiB" in (
        found["cache"].found
    )
    assert found["cache"].found.endswith(f"in {tmp_path / 'run' / 'cache'}")
    assert "filling the cache" in found["compute"].found
    plain = findings(recipes.override(recipe, {"cache_crops": 0}))
    assert "cache" not in plain
    assert "filling" not in plain["compute"].found

    large = recipes.override(PAPER, {"cache_crops": 4})  # of how many images is not known
    found = findings(large, run_dir=str(tmp_path / "run"))
    # 2 x 16 x 28 x 28 moments and 768 numbers, in two bytes each.
    assert "targets: 4 crops x 49.0 KiB an image; tokens: 4 crops x 1.5 KiB an image" in found["cache"].found
    assert "per 1000 images" in found["cache"].found
    assert "cached targets 0.2 GiB" in found["disk"].found
    monkeypatch.setattr(machine, "free_bytes", lambda path: GIB)
    assert "larger disk" in problems(large, run_dir=str(tmp_path / "run"))["disk"].todo


def test_a_cache_on_a_disk_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one disk only")
    recipe = recipes.override(PAPER, {"cache_crops": 400, "cache_folder": "/dev/shm/none/cache"})
    found = findings(recipe, run_dir=str(tmp_path / "run"))
    assert found["cache"].found.endswith("512.0 GiB free at /dev/shm")
    assert "cached" not in found["disk"].found
    monkeypatch.setattr(machine, "free_bytes", lambda path: 512 * GIB if str(path) != "/dev/shm" else GIB)
    assert "fewer --cache_crops" in problems(recipe, run_dir=str(tmp_path / "run"))["cache"].todo


def test_run_folder(tmp_path: Path) -> None:
    assert findings(TINY, run_dir=str(tmp_path / "a" / "b"))["run folder"].status == OK
    (tmp_path / "manifest.json").write_text(json.dumps({"recipe": recipes.to_dict(TINY)}))
    assert "would go on" in findings(TINY, run_dir=str(tmp_path))["run folder"].found
    other = dataclasses.replace(TINY, seed=7)
    assert "seed: 0 -> 7" in problems(other, run_dir=str(tmp_path))["run folder"].found
    (tmp_path / "manifest.json").rename(tmp_path / "notes.json")
    assert "not an empty folder" in problems(TINY, run_dir=str(tmp_path))["run folder"].found


def test_base_install_is_enough() -> None:
    """Without the training packages the doctor lists them all and ends with status 1."""
    heavy = ["torchvision", "accelerate", "diffusers", "peft", "torchdata", "tensorboard", "matplotlib"]
    code = f"""
import sys, importlib.metadata as metadata, importlib.util as util
heavy = {heavy!r}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in heavy:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
version, find = metadata.version, util.find_spec
def absent(name):
    if name in heavy:
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = absent
util.find_spec = lambda name, *rest: None if name in heavy else find(name, *rest)
from llava_genhancer.doctor import examine
from llava_genhancer.recipes import get_recipe
sys.exit(examine(get_recipe("tiny")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    for package in heavy:
        assert re.search(rf"PROBLEM  {package} +not installed", done.stdout)


LIGHT = ("doctor/*", "costs/*", "machine", "fields", "method", "recipe", "recipes", "errors", "run", "cli")


@pytest.mark.parametrize("pattern", LIGHT)
def test_syntax_of_python_3_10(pattern: str) -> None:
    files = list((ROOT / "llava_genhancer").glob(f"{pattern}.py"))
    assert files
    for file in files:
        ast.parse(file.read_text(), feature_version=(3, 10))


def test_a_frozen_denoiser_in_bfloat16_needs_half_of_the_main_memory() -> None:
    """As much as the run itself asks for before it loads anything."""
    flux = recipes.get_recipe("openai-l14-224-flux")
    facts = costs.facts_of(flux)
    expected = costs.built_bytes(flux, 2, *facts)
    needed = float(findings(dataclasses.replace(flux, num_workers=0), gpus=8)["main memory"].found.split()[0])
    assert expected / 2**30 == pytest.approx(23.4, abs=0.2)
    assert needed == pytest.approx(expected / 2**30 + 1, abs=0.1)
