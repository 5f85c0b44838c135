"""register() in every fork's layout: our class where the fork cannot load a tower folder, the fork's own otherwise."""

import importlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fork_sources import FORKS, UNREADABLE_FORK, Fork

from llava_genhancer.errors import InputError
from llava_genhancer.tower import register
from llava_genhancer.tower.forks import Chooser
from llava_genhancer.tower.tinyllava import FactoryTower
from llava_genhancer.tower.tower import VisionTower

MakeFork = Callable[[str | Fork], str]


def arch_of(name: str) -> ModuleType:
    return importlib.import_module(f"{FORKS[name].package}.model.{FORKS[name].arch}")


def build(name: str, path: str, **kwargs: Any) -> Any:
    """Build one tower as the fork's model does."""
    fork = FORKS[name]
    function = getattr(arch_of(name), fork.function)
    if name == "VILA":
        fields = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "cls_patch", **kwargs}
        return function(path, SimpleNamespace(model_dtype="torch.bfloat16", **fields))
    if name == "TinyLLaVA":
        config = SimpleNamespace(model_name_or_path=path.split(":")[-1], patch_size=8)
        found = function(path)
        return found if found is FactoryTower else found(config.model_name_or_path)
    fields = {key: path for key in ("mm_vision_tower", "mm_image_tower")}
    fields |= {"vision_tower_aux_list": [path], "vision_tower_aux_token_len_list": [16]}
    built = function(SimpleNamespace(mm_vision_select_layer=-2, **fields), **kwargs)
    return built[0] if isinstance(built, list) else built


# The towers' folders are named clip and siglip, which these forks' rules take to the right class of their own.
TAKES_BY_PATH = {
    "clip": {"LLaVA", "Open-LLaVA-NeXT", "LLaVA-NeXT", "ShareGPT4V", "Video-LLaVA", "Bunny", "VILA", "ross", "GLaMM"}
    | {"always cut"},
    "siglip": {"Bunny", "VILA", "ross"},
}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", [name for name in FORKS if name not in ("GLaMM", "UHD")])
def test_every_fork_builds_a_tower_that_loads_the_folder(
    towers: dict[str, Path], fork: MakeFork, name: str, when: str, kind: str
) -> None:
    package = fork(name)
    if when == "after":
        arch_of(name)
    register()
    arch = arch_of(name)
    builders = [n for n in register() if n.split(".")[0] == package]  # the second call changes nothing
    assert len(builders) == 1
    chooser = getattr(arch, FORKS[name].function)
    assert chooser is getattr(sys.modules[builders[0]], FORKS[name].function)
    assert isinstance(chooser, Chooser)
    assert not isinstance(chooser.original, Chooser)

    tower = build(name, str(towers[kind]))
    if name == "TinyLLaVA":
        by_name = {"clip": "CLIPVisionTower", "siglip": "FactoryTower"}[kind]  # its SigLIP class drops a patch
        assert chooser(f"{kind}:{towers[kind]}").__name__ == chooser(str(towers[kind])).__name__ == by_name
        assert chooser(f"{'siglip' if kind == 'clip' else 'clip'}:{towers[kind]}") is FactoryTower
    elif name in TAKES_BY_PATH[kind]:
        assert type(tower).__module__ == f"{package}.model.multimodal_encoder.towers"
        assert tower.name == str(towers[kind])
        assert chooser.built == []
    else:
        assert isinstance(tower, VisionTower)
        assert tower.is_loaded
        assert chooser.built == [str(towers[kind])]


@pytest.mark.parametrize("name", FORKS)
def test_everything_else_falls_through(fork: MakeFork, tiny_clip: Path, name: str) -> None:
    """Unmarked folders, hub ids and refusals are the fork's own, with and without register()."""
    fork(name)

    def answers() -> list[Any]:
        found = []
        for path in (str(tiny_clip), "openai/clip-vit", "google/siglip-so400m", "nonsense", "clip:/x", "siglip:/x"):
            try:
                tower = build(name, path)
                found.append((type(tower).__name__, tower.name))
            except (ValueError, AssertionError) as error:
                found.append(repr(error))
        return found

    before = answers()
    assert any(isinstance(answer, tuple) for answer in before) or name in ("MGM", "UHD")
    register()
    assert answers() == before


def test_vila_must_keep_every_patch_of_siglip(towers: dict[str, Path], fork: MakeFork, tmp_path: Path) -> None:
    """It reads the tower it saved with a class of its own, which would drop one."""
    fork("VILA")
    register()
    with pytest.raises(InputError, match="cls_patch"):
        build("VILA", str(towers["siglip"]), mm_vision_select_feature="patch")
    (tmp_path / "eyes").symlink_to(towers["clip"])  # no word that VILA looks for
    tower = build("VILA", "eyes", mm_vision_select_feature="patch")
    assert (tower.num_patches, tower.dtype) == (16, torch.bfloat16)
    with pytest.raises(InputError, match="use a CLIP or SigLIP tower"):
        build("VILA", str(towers["siglip2"]))


@torch.no_grad()
def test_cambrians_list_keeps_its_order(towers: dict[str, Path], fork: MakeFork) -> None:
    fork("Cambrian")
    register()
    names = [str(towers["siglip"]), "openai/clip-a", str(towers["clip"])]
    config = SimpleNamespace(
        mm_vision_select_layer=-2, vision_tower_aux_list=names, vision_tower_aux_token_len_list=[9, 576, 64]
    )
    first, middle, last = arch_of("Cambrian").build_vision_tower_aux_list(config)
    assert middle.name == "openai/clip-a-interp576"
    assert config.vision_tower_aux_list == names
    assert (first.num_patches, last.num_patches) == (9, 64)
    assert first(torch.randn(2, 3, 48, 48)).shape == (2, 9, first.hidden_size)
    assert last(torch.randn(2, 3, 32, 32)).shape == (2, 64, last.hidden_size)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_tinyllava_builds_loads_and_saves(towers: dict[str, Path], kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(towers[kind]).vision_config
    config.model_name_or_path = str(towers[kind])
    tower = FactoryTower(config)
    tower.load_model(str(towers[kind]))
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    given = {"vision_feature_layer": -2, "vision_feature_select_strategy": "patch"}
    expected = VisionTower(str(towers[kind]), SimpleNamespace())(pixels)
    torch.testing.assert_close(tower(pixels, **given), expected)
    assert tower._image_processor.crop_size["height"] == config.image_size

    # What its recipes save and the next stage reads.
    torch.save(dict(tower._vision_tower.named_parameters()), tmp_path / "pytorch_model.bin")
    next_stage = FactoryTower(config)
    assert not torch.equal(next_stage(pixels, **given), expected)
    next_stage.load_model(str(towers[kind]), pretrained_vision_tower_path=str(tmp_path))
    torch.testing.assert_close(next_stage(pixels, **given), expected)
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="does not hold this tower's weights"):
        FactoryTower(config).load_model(str(towers[kind]), pretrained_vision_tower_path=str(tmp_path))


def test_an_unknown_layout_is_left_alone(fork: MakeFork, tmp_path: Path) -> None:
    package = fork("LLaVA")
    builder = tmp_path / package / "model" / "multimodal_encoder" / "builder.py"
    builder.write_text("def make_my_tower(config):\n    return None\n")
    register()
    assert importlib.import_module(f"{package}.model.multimodal_encoder.builder").make_my_tower(None) is None
    assert [n for n in register() if n.startswith(package)] == []


# --- what a fork offers stays ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("feature", ["patch", "slicefour_patch"])
@pytest.mark.parametrize(("builder", "word"), [("LLaVA-NeXT", "clip"), ("ross", "clip"), ("unreadable", "eyes")])
def test_a_fork_keeps_its_own_class_for_a_clip(
    towers: dict[str, Path], fork: MakeFork, tmp_path: Path, feature: str, builder: str, word: str
) -> None:
    """Arguments and features that only the fork's class has work with register() as without it."""
    made = UNREADABLE_FORK if builder == "unreadable" else replace(FORKS[builder], classes=("real", "siglip"))
    package = fork(made)
    (tmp_path / word).symlink_to(towers["clip"])
    config = SimpleNamespace(mm_vision_tower=word, mm_vision_select_layer=-2, mm_vision_select_feature=feature)
    arch = importlib.import_module(f"{package}.model.{made.arch}")
    pixels = torch.randn(2, 3, 32, 32)
    expected = arch.build_vision_tower(config, delay_load=True)(pixels, return_cls_token=True)
    register()
    tower = arch.build_vision_tower(config, delay_load=True)
    assert type(tower).__module__ == f"{package}.model.multimodal_encoder.towers"
    torch.testing.assert_close(tower(pixels, return_cls_token=True), expected)
    assert expected.shape[1] == 17


@pytest.mark.parametrize(("kind", "folder"), [("siglip", "siglip"), ("clip", "my_own"), ("clip", "nothing")])
def test_a_builder_that_cannot_be_read(
    towers: dict[str, Path], fork: MakeFork, tmp_path: Path, kind: str, folder: str
) -> None:
    """Our class for SigLIP; for a CLIP where the fork's builder refuses it or picks another class."""
    package = fork(UNREADABLE_FORK)
    (tmp_path / folder).symlink_to(towers[kind])
    register()
    arch = importlib.import_module(f"{package}.model.llava_arch")
    config = SimpleNamespace(mm_vision_tower=folder, mm_vision_select_layer=-2)
    assert isinstance(arch.build_vision_tower(config), VisionTower)


def test_a_builders_options_count(towers: dict[str, Path], fork: MakeFork, tmp_path: Path) -> None:
    """Bunny refuses S2 with a CLIP: then our class is built, which has it."""
    package = fork("Bunny")
    builder = tmp_path / package / "model" / "multimodal_encoder" / "builder.py"
    refusal = (
        "if getattr(vision_tower_cfg, 'use_s2', False):\n            raise ValueError('no S2')\n        return CLIP"
    )
    builder.write_text(builder.read_text().replace("return CLIP", refusal))
    register()
    assert build("Bunny", str(towers["clip"])).name == str(towers["clip"])
    config = SimpleNamespace(mm_vision_tower=str(towers["clip"]), mm_vision_select_layer=-2, use_s2=True)
    tower = arch_of("Bunny").build_vision_tower(config)
    assert isinstance(tower, VisionTower)
    assert tower.scales == [32, 64, 96]


def test_a_fork_that_expects_more_than_features_is_not_served(
    towers: dict[str, Path], fork: MakeFork, tmp_path: Path
) -> None:
    """GLaMM's and FasterVLM's forward returns a pair: a tensor of two images would be taken apart in silence.
    LLaVA-UHD's requires the patches' sizes."""
    fork("UHD")
    fork("GLaMM")
    (tmp_path / "eyes").symlink_to(towers["clip"])
    register()
    for path in (str(towers["siglip"]), "eyes"):
        with pytest.raises(InputError, match="forward returns more than features"):
            build("GLaMM", path)
        with pytest.raises(InputError, match="forward requires more than images"):
            build("UHD", path)
    assert build("GLaMM", str(towers["clip"])).name == str(towers["clip"])


def test_a_changed_tower_is_refused_before_the_forks_class_loads_it(
    towers: dict[str, Path], fork: MakeFork, tmp_path: Path
) -> None:
    fork("LLaVA")
    register()
    folder = Path(shutil.copytree(towers["clip"], tmp_path / "changed"))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="not the file that was exported"):
        build("LLaVA", str(folder))


def test_other_projects_modules_are_left_alone(fork: MakeFork, tmp_path: Path) -> None:
    """A `model.vision_tower` without TinyLLaVA's factory is somebody else's."""
    package = fork("TinyLLaVA")
    (tmp_path / package / "model" / "vision_tower" / "__init__.py").write_text("WIDTH = 3\n")
    register()
    assert importlib.import_module(f"{package}.model.vision_tower").WIDTH == 3
    assert [n for n in register() if n.startswith(package)] == []
