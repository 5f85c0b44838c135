"""Names that stand for towers: weight files, others' releases, folders inside hub repositories."""

import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import re
from pathlib import Path

import pytest
import torch

from llava_genhancer.cli import main
from llava_genhancer.convert import released
from llava_genhancer.convert.convert import convert
from llava_genhancer.convert.released import RELEASED, Release, tower_folder
from llava_genhancer.enhance.backbones import check_backbone
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.paper import BACKBONES
from llava_genhancer.evaluate.towers import load_tower
from llava_genhancer.llava.model import load_tower as load_llava_tower
from llava_genhancer.tower.export import is_tower, verify_tower


@pytest.fixture
def weights(make_clip, tmp_path, monkeypatch) -> Path:
    """A traced CLIP, as OpenAI's are; the cache is empty."""
    monkeypatch.setenv("LLAVA_GENHANCER_CACHE", str(tmp_path / "cache"))
    _, model = make_clip()
    pixels, tokens = torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long)
    traced = torch.jit.trace_module(model, {"encode_image": pixels, "encode_text": tokens}, check_trace=False)
    traced.save(str(tmp_path / "ViT.pt"))
    return tmp_path / "ViT.pt"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_weight_file_is_a_tower_everywhere(weights):
    tower = load_tower(str(weights), "cpu")
    assert tower.model_type == "clip"
    assert tower.text_features(["a photo of a dog"]).shape == (1, 48)
    assert check_backbone(str(weights)) == "clip"
    assert load_llava_tower(str(weights), torch.float32).config.hidden_size == 128
    folder = Path(tower_folder(str(weights)))
    first = (folder / "model.safetensors").stat().st_mtime_ns
    assert tower_folder(str(weights)) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == first  # converted once


def test_a_file_that_says_too_little_names_the_command(make_clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLAVA_GENHANCER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights.pth"
    torch.save(make_clip()[1].state_dict(), path)
    with pytest.raises(InputError, match=r"--activation.*of `llava-genhancer convert .*weights\.pth --output_dir DIR`"):
        load_tower(str(path), "cpu")
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(path), "--output_dir", str(tmp_path / "tower")])
    assert "do not say which GELU" in capsys.readouterr().err
    command = ["convert", str(path), "--output_dir", str(tmp_path / "tower"), "--activation", "quick_gelu"]
    with pytest.raises(SystemExit, match="0"):
        main(command)
    assert load_tower(str(tmp_path / "tower"), "cpu").model_type == "clip"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_release_is_completed_and_remembers_whose_it_is(weights, tmp_path, monkeypatch):
    from transformers import CLIPModel

    original = convert(str(weights), tmp_path / "original")
    CLIPModel.from_pretrained(original).save_pretrained(tmp_path / "release")
    stand_in = {"genhancer:openai-l14-224": Release("genhancer", str(tmp_path / "release"), str(original))}
    monkeypatch.setattr(released, "RELEASED", stand_in)
    tower = load_tower("genhancer:openai-l14-224", "cpu")
    assert tower.method == "genhancer"
    assert tower.recipe is None
    assert tower.backbone is None  # it has 32 pixels, so its name alone makes it no row of Table 1
    assert json.loads((tmp_path / "cache/towers/genhancer-openai-l14-224/llava_genhancer.json").read_text())["weights"]


def test_every_backbone_of_table_1_has_both_releases():
    names = {b.recipe for b in BACKBONES}
    assert {n.split(":")[1] for n in RELEASED if n.startswith("genhancer:")} == names
    assert {n.split(":")[1] for n in RELEASED if n.startswith("diva:")} == names | {"dfn-h14-224", "dfn-h14-378"}
    for name, release in RELEASED.items():
        backbone = {b.recipe: b for b in BACKBONES}.get(name.split(":")[1])
        if backbone is not None and "/" in release.like:
            assert release.like == backbone.hub_id
        assert re.fullmatch(r"hf://[\w-]+/\w+/.+", release.path)


def test_what_cannot_be_fetched_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAVA_GENHANCER_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("diva:openai-l14-224", "hf://nobody/nothing/folder"):
        with pytest.raises(InputError, match="cannot be fetched") as caught:
            tower_folder(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no released tower: choose genhancer:openai-l14-224"):
        tower_folder("genhancer:openai-l14")
    assert tower_folder("runs/x/tower") == "runs/x/tower"  # no hub is asked for a path that is not there


def test_the_papers_row_is_the_methods():
    from llava_genhancer.evaluate.mmvp.results import MmvpResult

    result = MmvpResult("diva:openai-l14-224", "diva", "clip", (), backbone="openai-l14-224", method="diva")
    assert result.paper is not None
    assert result.paper.average == 25.9
    assert dataclasses.replace(result, method=None).paper.average == 19.3


def race(count: int, *arguments: object) -> list[str]:
    """Ask for a tower in several processes at once; what each got, or how it failed."""
    fork = multiprocessing.get_context("fork")
    answers, start = fork.Queue(), fork.Barrier(count)

    def ask() -> None:
        torch.set_num_threads(1)
        start.wait()
        try:
            folder = tower_folder(*arguments)
            verify_tower(folder)
            answers.put(folder)
        except BaseException as error:
            answers.put(repr(error))

    processes = [fork.Process(target=ask) for _ in range(count)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    return found


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("locks", ["flock", "none", "of this host alone"])
def test_processes_that_convert_one_file_at_once_all_get_a_whole_tower(weights, tmp_path, monkeypatch, locks):
    def flock(*args):
        if locks == "none":
            raise OSError(errno.ENOLCK, "No locks available")

    if locks != "flock":
        monkeypatch.setattr(fcntl, "flock", flock)
    converted = released.convert

    def counted(*args, **kwargs):
        (tmp_path / f"converted-{os.getpid()}").touch()
        return converted(*args, **kwargs)

    monkeypatch.setattr(released, "convert", counted)
    found = race(3, str(weights))
    assert len(set(found)) == 1, found
    times = len(list(tmp_path.glob("converted-*")))
    assert times == (3 if locks == "of this host alone" else 1), "one converts while the others wait"
    left = {p.name for p in (tmp_path / "cache" / "towers").iterdir() if not p.name.endswith(".lock")}
    assert left == {Path(found[0]).name}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_killed_conversion_leaves_nothing_that_counts_and_is_repeated(weights, tmp_path, monkeypatch):
    pid = os.fork()
    if not pid:
        torch.set_num_threads(1)
        monkeypatch.setattr("llava_genhancer.tower.export.check_keys", lambda folder: os.kill(os.getpid(), 9))
        tower_folder(str(weights))
    assert os.waitpid(pid, 0)[1] == 9
    towers = tmp_path / "cache" / "towers"
    assert not any(is_tower(p) for p in towers.iterdir() if not p.name.startswith("."))
    assert list(towers.rglob("*.safetensors")), "it was killed in the middle"
    folder = Path(tower_folder(str(weights)))
    verify_tower(folder)
    assert {p.name for p in towers.iterdir()} == {folder.name, f".{folder.name}.lock"}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_others_may_read_a_tower_as_the_umask_says(weights, tmp_path, mask):
    before = os.umask(mask)
    try:
        folder = Path(tower_folder(str(weights)))
        for kind in ("open_clip", "openai"):
            convert(str(folder), tmp_path / kind, to=kind)
    finally:
        os.umask(before)
    for each in (folder, tmp_path / "open_clip", tmp_path / "openai"):
        for path in (each, *each.rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path
