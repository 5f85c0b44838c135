"""`doctor --fork`: it predicts what the fork does, runs nothing of the fork, and the remedies that it prints work."""

import hashlib
import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fork_sources import BOTH, FORKS
from safetensors.torch import load_file, save_file

from llava_genhancer.cli import main
from llava_genhancer.errors import InputError
from llava_genhancer.tower.choice import IMPOSSIBLE, REGISTER, RENAME, UNKNOWN, WORKS, fork_choice
from llava_genhancer.tower.export import MARKER

MakeFork = Callable[[str], str]
# The folder's name is `eyes`, which no rule knows.
EXPECTED = {
    ("LLaVA", "clip"): ("CLIPVisionTower", WORKS),
    ("LLaVA", "siglip"): ("CLIPVisionTower", REGISTER),
    ("Open-LLaVA-NeXT", "clip"): ("CLIPVisionTower", WORKS),
    ("Open-LLaVA-NeXT", "siglip"): ("CLIPVisionTower", REGISTER),
    ("LLaVA-NeXT", "clip"): ("CLIPVisionTower", WORKS),
    ("LLaVA-NeXT", "siglip"): ("CLIPVisionTower", REGISTER),
    ("ShareGPT4V", "clip"): ("CLIPVisionTower", WORKS),
    ("ShareGPT4V", "siglip"): ("CLIPVisionTower", REGISTER),
    ("Video-LLaVA", "clip"): ("CLIPVisionTower", WORKS),
    ("Video-LLaVA", "siglip"): ("CLIPVisionTower", REGISTER),
    ("MoE-LLaVA", "clip"): (None, RENAME),
    ("MoE-LLaVA", "siglip"): (None, RENAME),
    ("Cambrian", "clip"): (None, RENAME),
    ("Cambrian", "siglip"): (None, REGISTER),
    ("Bunny", "clip"): (None, RENAME),
    ("Bunny", "siglip"): (None, RENAME),
    ("VILA", "clip"): (None, RENAME),
    ("VILA", "siglip"): (None, RENAME),
    ("ross", "clip"): (None, RENAME),
    ("ross", "siglip"): (None, RENAME),
    ("GLaMM", "clip"): (None, RENAME),
    ("GLaMM", "siglip"): (None, IMPOSSIBLE),
    ("Parrot", "clip"): (None, RENAME),
    ("Parrot", "siglip"): (None, REGISTER),
    ("MGM", "clip"): (None, RENAME),
    ("MGM", "siglip"): (None, REGISTER),
    ("UHD", "clip"): (None, IMPOSSIBLE),
    ("UHD", "siglip"): (None, IMPOSSIBLE),
    ("of one table", "clip"): (None, UNKNOWN),
    ("of one table", "siglip"): (None, UNKNOWN),
    ("always cut", "clip"): (None, RENAME),
    ("always cut", "siglip"): (None, REGISTER),
    ("TinyLLaVA", "clip"): (None, RENAME),
    ("TinyLLaVA", "siglip"): (None, RENAME),
}


@pytest.fixture
def eyes(towers: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    for kind in ("clip", "siglip"):
        (tmp_path / f"the-{len(kind)}").mkdir()
        (tmp_path / f"the-{len(kind)}" / "eyes").symlink_to(towers[kind])
    return {kind: Path(f"the-{len(kind)}/eyes") for kind in ("clip", "siglip")}


def really_chosen(name: str, path: str) -> str | None:
    """The class that the fork itself builds, by running it."""
    fork = FORKS[name]
    function = getattr(importlib.import_module(f"{fork.package}.model.{fork.arch}"), fork.function)
    fields = {key: path for key in ("mm_vision_tower", "mm_image_tower")}
    fields |= {"vision_tower_aux_list": [path], "vision_tower_aux_token_len_list": [576]}
    try:
        if name == "TinyLLaVA":
            return str(function(path).__name__)
        built = function(path, SimpleNamespace()) if name == "VILA" else function(SimpleNamespace(**fields))
    except (ValueError, AssertionError):
        return None
    return type(built[0] if isinstance(built, list) else built).__name__


@pytest.mark.parametrize(("name", "kind"), EXPECTED)
def test_choice_is_what_the_fork_does(
    fork: MakeFork, eyes: dict[str, Path], tmp_path: Path, name: str, kind: str
) -> None:
    fork(name)
    choice = fork_choice(str(tmp_path), str(eyes[kind]))
    assert (choice.chosen, choice.verdict) == EXPECTED[name, kind]
    assert choice.chosen == really_chosen(name, str(eyes[kind]))
    assert choice.rule.function == FORKS[name].function
    launches = choice.verdict in (RENAME, REGISTER, UNKNOWN) and name != "GLaMM"
    assert ("start training as `python -m llava_genhancer.launch" in choice.todo) == launches
    if choice.verdict == RENAME:
        found = re.search(r"(?:--vision_tower|folder to) ([^ ,]+)", choice.todo)
        assert found is not None
        new = found[1]
        if ":" not in new:
            Path(new).parent.mkdir(exist_ok=True)
            Path(new).symlink_to(tmp_path / eyes[kind])
        wanted = {"clip": "CLIPVisionTower", "siglip": "SiglipVisionTower"}[kind]
        assert really_chosen(name, new) == wanted
        cut = kind == "siglip" and name in ("MoE-LLaVA", "VILA")
        assert ("cls_patch" in choice.todo) == (cut or (name, kind) == ("TinyLLaVA", "siglip"))


def test_words_that_a_class_looks_for_once_more(fork: MakeFork, eyes: dict[str, Path], tmp_path: Path) -> None:
    """ShareGPT4V takes a path with "eva" for an EVA-CLIP, after its builder said CLIP."""
    fork("ShareGPT4V")
    (tmp_path / "medieval").symlink_to(tmp_path / eyes["clip"])
    choice = fork_choice(str(tmp_path), "medieval")
    assert (choice.chosen, choice.verdict) == ("CLIPVisionTower", RENAME)
    assert "'eva'" in choice.reason
    assert "openai/clip-enhanced" in choice.todo


BAIT = """
import os

os.makedirs({bait!r} + "/module", exist_ok=True)


@(lambda f: os.makedirs({bait!r} + "/decorator") or f)
def build_vision_tower(config, extra=os.makedirs({bait!r} + "/default", exist_ok=True), **kwargs):
    name = getattr(config, "mm_vision_tower", None)
    os.makedirs({bait!r} + "/body")
    if os.path.exists(name):
        [].append(os.makedirs({bait!r} + "/call"))
        return CLIPVisionTower(name)
    raise ValueError(os.makedirs({bait!r} + "/refusal"))


class CLIPVisionTower(os.makedirs({bait!r} + "/bases") or object):
    from transformers import CLIPVisionModel

    os.makedirs({bait!r} + "/class")
    model = CLIPVisionModel
"""


def test_nothing_of_the_fork_runs(
    fork: MakeFork, eyes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every place in a fork's files where code could run makes a folder; no folder is made, no module imported."""
    package = fork("LLaVA")
    bait = tmp_path / "bait"
    for path in (tmp_path / package).rglob("*.py"):
        path.write_text(f"import os\nos.makedirs({str(bait)!r})\n" + path.read_text())
    builder = tmp_path / package / "model" / "multimodal_encoder" / "builder.py"
    builder.write_text(BAIT.format(bait=str(bait)))
    assert doctor(tmp_path, eyes["clip"]) == 0
    assert doctor(tmp_path, eyes["siglip"]) == 1
    assert "CLIPVisionTower" in capsys.readouterr().out
    assert not bait.exists()
    assert [name for name in sys.modules if name.split(".")[0] == package] == []


@pytest.mark.parametrize(
    "body",
    [
        "if re.search('clip', name):\n        return CLIPVisionTower(name)",
        "return pick(name)",
        "while True:\n        return CLIPVisionTower(name)",
        "for word in words():\n        if word in name:\n            return CLIPVisionTower(name)",
        "return SomewhereElseVisionTower(name)",
        "name, revision = name.split('@')\n    if 'clip' in name:\n        return CLIPVisionTower(name)",
        "name += config.suffix\n    if 'clip' in name:\n        return CLIPVisionTower(name)",
        "if config.kind in name or name.startswith(config.kind):\n        return CLIPVisionTower(name)",
        "if getattr(config, pick(name), 'clip') == 'clip':\n        return CLIPVisionTower(name)",
        "with torch.device('meta'):\n        return CLIPVisionTower(name)",
        "if name in open('list').read():\n        return CLIPVisionTower(name)",
        "return CLIPVisionTower(name) if config.number * 2 == 4 else SiglipVisionTower(name)",
        "match name:\n        case 'a':\n            return CLIPVisionTower(name)",
        "(" * 300 + ")" * 300,
        "x = " + "not " * 3000 + "name\n    return CLIPVisionTower(name)",
    ],
)
def test_what_cannot_be_predicted_is_reported_with_what_works(
    fork: MakeFork, eyes: dict[str, Path], tmp_path: Path, body: str
) -> None:
    package = fork("LLaVA-NeXT")
    builder = tmp_path / package / "model" / "multimodal_encoder" / "builder.py"
    head = f"{BOTH}\n\ndef build_vision_tower(config):\n    name = config.mm_vision_tower\n    "
    builder.write_text(f"{head}if 'my-word' in name:\n        return CLIPVisionTower(name)\n    {body}\n")
    for kind in ("clip", "siglip"):
        choice = fork_choice(str(tmp_path), str(eyes[kind]))
        assert (choice.chosen, choice.verdict) == (None, UNKNOWN)
        assert "cannot be predicted without running the fork" in choice.reason
        assert "llava_genhancer.launch" in choice.todo
        assert "\n" not in choice.reason + choice.todo


def test_options_that_the_builder_reads_are_named(fork: MakeFork, eyes: dict[str, Path], tmp_path: Path) -> None:
    package = fork("LLaVA")
    builder = tmp_path / package / "model" / "multimodal_encoder" / "builder.py"
    source = builder.read_text().replace("    if os", "    if vision_tower_cfg.ps3:\n        return Other()\n    if os")
    builder.write_text(source)
    choice = fork_choice(str(tmp_path), str(eyes["clip"]))
    assert (choice.chosen, choice.verdict) == ("CLIPVisionTower", WORKS)
    assert "as long as ps3 are not set" in choice.reason


# --- the fork's transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pin", "too_old"),
    [
        ("transformers==4.31.0", True),
        ("transformers >= 4.30, < 4.37", True),
        ("transformers~=4.36.0", True),
        ("transformers==4.36.2", True),
        ("transformers==4.37.0", False),
        ("transformers<4.38", False),
        ("transformers>=4.31", False),
        ("transformers@git+https://github.com/huggingface/transformers.git@1c39974a", False),
        ("sentence_transformers==1.0", False),
    ],
)
@pytest.mark.parametrize("file", ["pyproject.toml", "requirements.txt"])
def test_siglip_in_a_fork_whose_transformers_lacks_it(
    fork: MakeFork, eyes: dict[str, Path], tmp_path: Path, pin: str, too_old: bool, file: str
) -> None:
    fork("ShareGPT4V")
    text = f'dependencies = [\n    "torch==2.0.1", "{pin}", "tokenizers"]\n' if file == "pyproject.toml" else f"{pin}\n"
    (tmp_path / file).write_text(text)
    choice = fork_choice(str(tmp_path), str(eyes["siglip"]))
    titles = [title for title, _ in choice.commands]
    if too_old:
        assert choice.verdict == IMPOSSIBLE
        assert "needs transformers 4.37 or newer, so llava_genhancer.launch fails" in choice.todo
        assert titles[0] == "transformers"
    else:
        assert choice.verdict == REGISTER
        assert "transformers" not in titles
    assert fork_choice(str(tmp_path), str(eyes["clip"])).verdict == WORKS
    assert fork_choice(str(tmp_path / "share4v"), str(eyes["siglip"])).verdict == choice.verdict


def test_vila_needs_cls_patch_with_the_launcher_too(fork: MakeFork, eyes: dict[str, Path], tmp_path: Path) -> None:
    fork("VILA")
    choice = fork_choice(str(tmp_path), str(eyes["siglip"]))
    rename, launch = choice.todo.split("; or ")
    assert "cls_patch" in rename
    assert "cls_patch" in launch
    Path("google").mkdir()
    Path("google/siglip").symlink_to(tmp_path / eyes["siglip"])
    choice = fork_choice(str(tmp_path), "google/siglip")
    assert (choice.verdict, choice.todo) == (RENAME, "give --mm_vision_select_feature cls_patch")


def test_siglip2_in_vila_has_no_way(fork: MakeFork, towers: dict[str, Path], tmp_path: Path) -> None:
    fork("VILA")
    choice = fork_choice(str(tmp_path), str(towers["siglip2"]))
    assert choice.verdict == IMPOSSIBLE
    assert "use a CLIP or SigLIP tower" in choice.todo


# --- layouts and folders --------------------------------------------------------------------------------------------


def test_a_builder_elsewhere_is_read_but_not_registered(fork: MakeFork, eyes: dict[str, Path], tmp_path: Path) -> None:
    """VideoLLaMA2 keeps its builder in model/encoder.py, which register() does not reach."""
    package = fork("ross")
    encoder = tmp_path / package / "model" / "multimodal_encoder"
    source = (encoder / "towers.py").read_text() + (encoder / "builder.py").read_text().replace(BOTH, "import os\n")
    shutil.rmtree(encoder)
    (tmp_path / package / "model" / "encoder.py").write_text(source)
    choice = fork_choice(str(tmp_path), str(eyes["clip"]))
    assert (choice.chosen, choice.verdict) == (None, RENAME)
    assert "llava_genhancer.launch" not in choice.todo
    (tmp_path / package / "model" / "encoder.py").write_text(source.replace("SiglipVisionModel", "TimmModel"))
    choice = fork_choice(str(tmp_path), str(eyes["siglip"]))
    assert choice.verdict == IMPOSSIBLE
    assert "register() does not reach encoder.py" in choice.todo


def test_unknown_layout_and_bad_folders(
    fork: MakeFork, towers: dict[str, Path], tmp_path: Path, tiny_clip: Path
) -> None:
    with pytest.raises(InputError, match=r"Looked for \*/multimodal_encoder/builder\.py"):
        fork_choice(str(tmp_path), str(towers["clip"]))
    (tmp_path / "model.py").write_text("tower = CLIPVisionModel.from_pretrained(path)\n")
    with pytest.raises(InputError, match=r"model\.py calls CLIPVisionModel\.from_pretrained: a CLIP tower is"):
        fork_choice(str(tmp_path), str(towers["clip"]))
    with pytest.raises(InputError, match="is not a folder"):
        fork_choice(str(tmp_path / "none"), str(towers["clip"]))
    with pytest.raises(InputError, match="not one of our towers"):
        fork_choice(str(tmp_path), str(tiny_clip))
    fork("LLaVA")
    fork("ShareGPT4V")
    with pytest.raises(InputError, match=r"2 tower builders .* give the folder of one fork"):
        fork_choice(str(tmp_path), str(towers["clip"]))
    assert fork_choice(str(tmp_path / "llava"), str(towers["clip"])).verdict == WORKS


def drop(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    resign(folder)


def resign(folder: Path, **fields: object) -> None:
    """Put the present hashes, and other fields, into the marker."""
    marker = json.loads((folder / MARKER).read_text())
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in marker["weights"]}
    (folder / MARKER).write_text(json.dumps({**marker, "weights": hashes, **fields}))


def rename_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    marker = json.loads((folder / MARKER).read_text())
    weights = {"weights.safetensors": marker["weights"]["model.safetensors"]}
    (folder / MARKER).write_text(json.dumps({**marker, "weights": weights}))


def widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "no processor": (lambda f: (f / "preprocessor_config.json").unlink(), r"preprocessor_config\.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "no weights listed": (lambda f: resign(f, weights={}), "lists no weight files"),
    "weights under a name that is not loaded": (rename_weights, r"has no model\.safetensors"),
    "config of no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
    "processor of no object": (lambda f: (f / "preprocessor_config.json").write_text("[]"), "holds no JSON object"),
    "another model in the marker": (lambda f: resign(f, model_type="siglip"), "lists 'siglip'"),
    "another hash": (lambda f: resign(f, weights={"model.safetensors": "0" * 64}), "not the file that was exported"),
    "a vision weight missing": (
        lambda f: drop(f, "vision_model.encoder.layers.1.mlp.fc1.weight"),
        r"vision_model\.encoder\.layers\.1\.mlp\.fc1\.weight is in none of its weight files",
    ),
    "a projection missing": (lambda f: drop(f, "visual_projection.weight"), "visual_projection"),
    "another shape": (widen, "has shape .* but config.json asks for"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_tower_that_is_not_whole_is_not_approved(
    fork: MakeFork, towers: dict[str, Path], tmp_path: Path, case: str
) -> None:
    fork("LLaVA")
    folder = Path(shutil.copytree(towers["clip"], tmp_path / "broken"))
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(InputError, match=message):
        fork_choice(str(tmp_path / "llava"), str(folder))


# --- the command ----------------------------------------------------------------------------------------------------


def doctor(fork: Path, tower: Path) -> object:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--fork", str(fork), "--tower", str(tower)])
    return ended.value.code


def test_command(fork: MakeFork, eyes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed names the class, and for SigLIP every line from installing to evaluating."""
    package = fork("LLaVA")
    for name in ("train/train_mem.py", "train/train.py", "eval/model_vqa.py"):
        (tmp_path / package / name).parent.mkdir(exist_ok=True)
        (tmp_path / package / name).touch()
    assert doctor(tmp_path, eyes["clip"]) == 0
    output = capsys.readouterr().out
    assert "CLIPVisionTower" in output
    assert "is enough" in output
    assert "pip install" not in output
    assert doctor(tmp_path, eyes["siglip"]) == 1
    output = capsys.readouterr().out
    for line in (
        "python -m pip install --no-deps",
        "python -m llava_genhancer.launch llava.train.train_mem --vision_tower",
        "deepspeed --module llava_genhancer.launch llava.train.train_mem",
        "python -m llava_genhancer.launch llava.eval.model_vqa --model-path CHECKPOINT",
        "from llava_genhancer.tower import register; register()",
    ):
        assert line in output
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--fork", str(tmp_path)])
    assert ended.value.code == 2
    assert "go together" in capsys.readouterr().err
