"""`doctor --fork`: the answer is what the fork really does, and a rename that is advised works."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fork_sources import FORKS

from llava_genhancer.cli import main
from llava_genhancer.errors import InputError
from llava_genhancer.tower.choice import REGISTER, RENAME, WORKS, ask, find_rule, fork_choice

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
    except AttributeError as error:  # VILA reads .config on a tower that only remembers its call
        return re.findall(r"'(\w+Tower)' object", str(error))[0]
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
    assert ("llava_genhancer.launch" in choice.todo) == (choice.verdict != WORKS)
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


def test_nothing_of_the_fork_is_imported_or_written(fork: MakeFork, eyes: dict[str, Path], tmp_path: Path) -> None:
    package = fork("LLaVA")
    builder = tmp_path / package / "model" / "multimodal_encoder" / "builder.py"
    source = "raise SystemExit('imported')\n\n\ndef build_vision_tower(cfg):\n    {}\n    return CLIPVisionTower(cfg)\n"
    for line in ("open('out', 'w').write('x')", "torch.save(cfg, 'out')"):
        builder.write_text(source.format(line))
        assert ask(find_rule(tmp_path), str(eyes["clip"])) == "CLIPVisionTower"
    for line in ("import os; os.system('touch out')", "os.system('touch out')"):
        builder.write_text(source.format(line))
        with pytest.raises(InputError, match="could not be followed"):
            fork_choice(str(tmp_path), str(eyes["clip"]))
    assert not (tmp_path / "out").exists()


def test_unknown_layout_and_bad_folders(towers: dict[str, Path], tmp_path: Path, tiny_clip: Path) -> None:
    with pytest.raises(InputError, match=r"Looked for \*/multimodal_encoder/builder\.py"):
        fork_choice(str(tmp_path), str(towers["clip"]))
    with pytest.raises(InputError, match="is not a folder"):
        fork_choice(str(tmp_path / "none"), str(towers["clip"]))
    with pytest.raises(InputError, match="not one of our towers"):
        fork_choice(str(tmp_path), str(tiny_clip))


def test_command(fork: MakeFork, eyes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fork("LLaVA")
    for kind, status, said in (("clip", 0, "is enough"), ("siglip", 1, "llava_genhancer.launch")):
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--fork", str(tmp_path), "--tower", str(eyes[kind])])
        assert ended.value.code == status
        output = capsys.readouterr().out
        assert "CLIPVisionTower" in output
        assert said in output
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--fork", str(tmp_path)])
    assert ended.value.code == 2
    assert "go together" in capsys.readouterr().err
