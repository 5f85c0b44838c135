"""The tower against transformers' own models, and what must not pass in silence."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_genhancer.errors import InputError
from llava_genhancer.tower import export
from llava_genhancer.tower.multiscale import multiscale, resize_tokens
from llava_genhancer.tower.tower import VisionTower, check_loaded, load_vision_model

KINDS = ("clip", "siglip", "siglip2")
SIDES = {"clip": 32, "siglip": 48, "siglip2": 32}
PATCHES = {"clip": 16, "siglip": 36, "siglip2": 16}


def arguments(**fields: object) -> SimpleNamespace:
    return SimpleNamespace(**{"mm_vision_select_layer": -2, **fields})


def images(kind: str, number: int = 3) -> torch.Tensor:
    return torch.randn(number, 3, SIDES[kind], SIDES[kind], generator=torch.Generator().manual_seed(1))


def reference(folder: Path, kind: str, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All hidden states, from the full model; NaFlex patches are cut by transformers' own image processor."""
    import transformers

    full = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}[kind]
    model = getattr(transformers, full).from_pretrained(folder).eval()
    if kind == "siglip2":
        cut = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16, do_rescale=False, do_normalize=False)
        inputs = cut([p.numpy() for p in pixels], do_resize=False, return_tensors="pt")
        seen = model.vision_model(
            inputs["pixel_values"], inputs["pixel_attention_mask"], inputs["spatial_shapes"], output_hidden_states=True
        )
    else:
        seen = model.vision_model(pixels, output_hidden_states=True)
    return seen.hidden_states


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_models_own(towers: dict[str, Path], kind: str) -> None:
    states = reference(towers[kind], kind, images(kind))
    for layer in range(-len(states), len(states)):
        for feature in ("patch", "cls_patch"):
            chosen = arguments(mm_vision_select_layer=layer, mm_vision_select_feature=feature)
            tower = VisionTower(str(towers[kind]), chosen)
            expected = states[layer]
            if kind == "clip" and feature == "patch":
                expected = expected[:, 1:]
            torch.testing.assert_close(tower(images(kind)), expected, atol=1e-5, rtol=1e-5)
    for beyond in (len(states), -len(states) - 1):
        with pytest.raises(InputError, match="does not exist"):
            VisionTower(str(towers[kind]), arguments(mm_vision_select_layer=beyond))
    for feature in ("cls", "slicefour_cls", "slice_x_patch", "slicefour"):
        with pytest.raises(InputError, match=f"'{feature}' is unknown"):
            VisionTower(str(towers[kind]), arguments(mm_vision_select_feature=feature))


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Towers of 12 layers, enough for LLaVA-NeXT's joined layers."""
    import transformers

    from llava_genhancer.toyworld.models import build_clip_config, save_clip, save_siglip
    from llava_genhancer.toyworld.tokenizer import write_tokenizer

    folder = tmp_path_factory.mktemp("deep")
    words = len(write_tokenizer(folder / "original-clip"))
    torch.manual_seed(0)
    clip = transformers.CLIPModel(build_clip_config(words, width=32, layers=12))
    save_clip(clip, folder / "original-clip")
    save_siglip(folder / "original-siglip")
    config = transformers.SiglipConfig.from_pretrained(folder / "original-siglip")
    config.vision_config.num_hidden_layers = 12
    models = {"clip": clip, "siglip": transformers.SiglipModel(config)}
    return {
        kind: export.save_tower(model, folder / kind, source=str(folder / f"original-{kind}"), marker={})
        for kind, model in models.items()
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize(("feature", "layers"), [("slicefour", [1, 4, 7, 10]), ("slice_m25811_f6", [11, 8, 5, 2, 6])])
@pytest.mark.parametrize("tokens", ["patch", "cls_patch"])
def test_llava_nexts_joined_layers(
    deep: dict[str, Path], kind: str, feature: str, layers: list[int], tokens: str
) -> None:
    """LLaVA-NeXT joins these hidden states of 13 for select layer -2."""
    import transformers

    tower = VisionTower(str(deep[kind]), arguments(mm_vision_select_feature=f"{feature}_{tokens}"))
    side = tower.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    full = (
        getattr(transformers, {"clip": "CLIPModel", "siglip": "SiglipModel"}[kind]).from_pretrained(deep[kind]).eval()
    )
    states = full.vision_model(pixels, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer] for layer in layers], dim=-1)
    expected = expected[:, 1:] if kind == "clip" and tokens == "patch" else expected
    features = tower(pixels)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert tower.hidden_size == features.shape[-1] == tower.dummy_feature.shape[-1]


def test_joined_layers_that_a_small_tower_lacks_are_refused(towers: dict[str, Path]) -> None:
    for feature in ("slicefour_patch", "slice_m25811_f6_patch"):
        with pytest.raises(InputError, match="mm_vision_select"):
            VisionTower(str(towers["clip"]), arguments(mm_vision_select_feature=feature))


@torch.no_grad()
def test_what_forks_pass_beside_the_images(towers: dict[str, Path]) -> None:
    """Options that are off change nothing, the CLS comes when asked for, and the rest is one clear line."""
    off = {"cache_dir": "./cache_dir", "trust_remote_code": False, "load_pretrained": None}
    clip = VisionTower(str(towers["clip"]), arguments(), delay_load=True, **off)
    clip.load_model(device_map=None, pretrained=None, model_path="")
    siglip = VisionTower(str(towers["siglip"]), arguments())
    for tower, pixels in ((clip, images("clip")), (siglip, images("siglip"))):
        torch.testing.assert_close(tower(pixels, return_cls_token=False), tower(pixels))
        torch.testing.assert_close(tower(pixels, None, prompts=[], tgt_sizes=None), tower(pixels))
        for args, kwargs in (((torch.ones(2),), {}), ((), {"top_down_prompts": ["x"]}), ((), {"num": 1})):
            with pytest.raises(
                InputError, match=r"the fork calls its tower with .* which llava_genhancer's class does not"
            ):
                tower(pixels, *args, **kwargs)
        with pytest.raises(InputError, match="the fork loads its tower with pretrained=x"):
            VisionTower(tower.vision_tower_name, arguments(), delay_load=True).load_model(pretrained="x")
        with pytest.raises(InputError, match="the fork builds its tower with load_pretrained=True"):
            VisionTower(tower.vision_tower_name, arguments(), delay_load=True, load_pretrained=True)
    whole = clip(images("clip"), return_cls_token=True)
    torch.testing.assert_close(whole[:, 1:], clip(images("clip")))
    torch.testing.assert_close(clip(list(images("clip")), return_cls_token=True)[1], whole[1:2], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="there is no CLS token in siglip models"):
        siglip(images("siglip"), return_cls_token=True)
    with pytest.raises(InputError, match="there is no CLS token on S2's"):
        VisionTower(str(towers["clip"]), arguments(s2=True))(images("clip"), return_cls_token=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_interface(towers: dict[str, Path], kind: str) -> None:
    """Everything a fork reads on a tower; batches and lists; loading that waits; moves."""
    tower = VisionTower(str(towers[kind]), arguments(), delay_load=True)
    config = json.loads((towers[kind] / "config.json").read_text())["vision_config"]
    sizes = (tower.hidden_size, tower.num_patches, tower.num_patches_per_side**2, tower.image_size)
    assert sizes == (config["hidden_size"], PATCHES[kind], PATCHES[kind], SIDES[kind])
    assert not tower.is_loaded
    assert list(tower.parameters()) == []
    tower.load_model(device_map="auto")
    loaded = tower.vision_tower
    tower.load_model()
    assert tower.vision_tower is loaded
    assert (tower.hidden_size, tower.num_patches, tower.config.image_size) == (sizes[0], sizes[1], SIDES[kind])
    assert not any(p.requires_grad for p in tower.parameters())

    batch = tower(images(kind))
    assert batch.shape == (3, PATCHES[kind], sizes[0])
    listed = tower(list(images(kind)))
    torch.testing.assert_close(torch.cat(listed), batch, atol=1e-5, rtol=1e-5)
    tower.to(dtype=torch.bfloat16)
    assert (tower.dtype, tower.device) == (torch.bfloat16, torch.device("cpu"))
    assert tower(images(kind)).dtype == torch.float32  # the images' own
    assert tower(images(kind).bfloat16()).dtype == torch.bfloat16
    assert (tower.dummy_feature.shape, tower.dummy_feature.dtype) == ((1, sizes[0]), torch.bfloat16)


@pytest.mark.parametrize("fields", [{"unfreeze_mm_vision_tower": True}, {"mm_tunable_parts": "mm_vision_tower,x"}])
def test_a_tower_that_learns_is_loaded_at_once_and_has_gradients(towers: dict[str, Path], fields: dict) -> None:
    tower = VisionTower(str(towers["siglip"]), arguments(**fields), delay_load=True)
    assert tower.is_loaded
    tower.requires_grad_(True)
    tower(images("siglip")).sum().backward()
    assert tower.vision_tower.get_input_embeddings().weight.grad is not None


def test_images_of_another_size_are_named(towers: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"48 x 48 .* 32 x 32"):
        VisionTower(str(towers["clip"]), arguments())(images("siglip"))


@pytest.mark.parametrize("kind", KINDS)
def test_processor_is_what_llava_reads(towers: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Text-only samples read crop_size, padding reads image_mean, anyres cuts tiles by crop_size and shortest_edge."""
    import transformers

    processor = VisionTower(str(towers[kind]), arguments()).image_processor
    side = SIDES[kind]
    assert dict(processor.crop_size) == {"height": side, "width": side}
    assert processor.size["shortest_edge"] == side
    assert len(processor.image_mean) == 3
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    plain = {
        "clip": lambda: transformers.CLIPImageProcessor.from_pretrained(towers[kind]),
        "siglip": lambda: transformers.SiglipImageProcessor.from_pretrained(towers[kind]),
        "siglip2": lambda: transformers.SiglipImageProcessor(
            size={"height": side, "width": side}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
    }[kind]()
    expected = plain(picture, return_tensors="pt")["pixel_values"][0]
    assert expected.shape == (3, side, side)
    torch.testing.assert_close(processor.preprocess(picture, return_tensors="pt")["pixel_values"][0], expected)
    torch.testing.assert_close(processor([picture], return_tensors="pt")["pixel_values"][0], expected)
    tiles = [picture.resize((side, side))] + [
        picture.resize((2 * side, side)).crop((x, 0, x + side, side)) for x in (0, side)
    ]
    stack = torch.stack([processor.preprocess(tile, return_tensors="pt")["pixel_values"][0] for tile in tiles])
    assert VisionTower(str(towers[kind]), arguments())(stack).shape[:2] == (3, PATCHES[kind])
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").is_file()
    copy.deepcopy(processor)


# --- several scales -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("kind", "flag"), [("clip", "s2"), ("siglip", "use_s2")])
def test_s2_is_every_tile_in_its_place(towers: dict[str, Path], kind: str, flag: str) -> None:
    """Against a slow reading of the paper: one tile at a time, pooled cell by cell."""
    side = SIDES[kind]
    tower = VisionTower(str(towers[kind]), arguments(**{flag: True, "s2_scales": f"{2 * side},{side}"}))
    one = VisionTower(str(towers[kind]), arguments())
    assert tower.hidden_size == 2 * one.hidden_size
    assert dict(tower.image_processor.crop_size) == {"height": 2 * side, "width": 2 * side}
    large = torch.randn(2, 3, 2 * side, 2 * side, generator=torch.Generator().manual_seed(2))
    n = one.num_patches_per_side
    got = tower(large).unflatten(1, (n, n))
    small = torch.nn.functional.interpolate(large, size=(side, side), mode="bicubic")
    torch.testing.assert_close(got[..., : one.hidden_size], one(small).unflatten(1, (n, n)), atol=1e-5, rtol=1e-4)
    whole = torch.zeros(2, 2 * n, 2 * n, one.hidden_size)
    for row in (0, 1):
        for column in (0, 1):
            tile = large[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
            whole[:, row * n : (row + 1) * n, column * n : (column + 1) * n] = one(tile).unflatten(1, (n, n))
    for row in range(n):
        for column in range(n):
            cell = whole[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
            torch.testing.assert_close(got[:, row, column, one.hidden_size :], cell, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat(tower(list(large))), tower(large), atol=1e-5, rtol=1e-4)


def test_s2_defaults_and_refusals(towers: dict[str, Path]) -> None:
    tower = VisionTower(str(towers["clip"]), arguments(s2=True), delay_load=True)
    assert (tower.scales, tower.max_split_size) == ([32, 64, 96], 32)
    with pytest.raises(InputError, match="cls_patch"):
        VisionTower(str(towers["clip"]), arguments(s2=True, mm_vision_select_feature="cls_patch"), delay_load=True)
    dynamic = VisionTower(str(towers["siglip"]), arguments(dynamic_s2=True, s2_scales="48,96"))
    assert dynamic.hidden_size == 2 * dynamic.config.hidden_size  # VILA joins the scales itself
    assert dynamic(images("siglip")).shape[-1] == dynamic.config.hidden_size
    assert dynamic.image_processor.crop_size["height"] == 48


def test_scales_of_one_tile_change_nothing() -> None:
    pixels = torch.randn(2, 3, 8, 8)
    tokens = multiscale(lambda x: x.flatten(2).transpose(1, 2), pixels, [8], 8)
    torch.testing.assert_close(tokens, pixels.flatten(2).transpose(1, 2))
    torch.testing.assert_close(resize_tokens(tokens, 64), tokens)
    constant = torch.full((1, 16, 2), 3.0)
    torch.testing.assert_close(resize_tokens(constant, 9), torch.full((1, 9, 2), 3.0))


# --- a tower that stayed random is an error -------------------------------------------------------------------------


def resign(folder: Path) -> None:
    """Put the folder's present hashes into its marker, as if it had been exported so."""
    marker = json.loads((folder / export.MARKER).read_text())
    marker["weights"] = {name: export.sha256(folder / name) for name in marker["weights"]}
    (folder / export.MARKER).write_text(json.dumps(marker))


@pytest.fixture
def broken(towers: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(towers["siglip"], tmp_path / "broken"))


def test_changed_files_are_refused(broken: Path) -> None:
    path = broken / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="not the file that was exported"):
        VisionTower(str(broken), arguments())


def test_names_that_old_readers_miss_are_refused(broken: Path) -> None:
    """What transformers 5 writes for a vision model alone."""
    state = load_file(broken / "model.safetensors")
    state = {k.removeprefix("vision_model."): v for k, v in state.items() if k.startswith("vision_model.")}
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    resign(broken)
    with pytest.raises(InputError, match="would not load"):
        VisionTower(str(broken), arguments())


def test_a_missing_weight_is_refused(broken: Path) -> None:
    state = load_file(broken / "model.safetensors")
    del state["vision_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    resign(broken)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.fc1\.weight is not in its weight files"):
        VisionTower(str(broken), arguments())


def test_one_random_parameter_is_found(towers: dict[str, Path]) -> None:
    for kind in KINDS:
        model = load_vision_model(str(towers[kind]), kind)
        check_loaded(model.bfloat16(), str(towers[kind]))
        name, parameter = list(model.named_parameters())[-3]
        with torch.no_grad():
            parameter.view(-1)[0] += 1
        with pytest.raises(InputError, match=rf"{name} did not load and stayed random"):
            check_loaded(model, str(towers[kind]))


def test_folders_that_are_not_ours_are_refused(tiny_clip: Path, broken: Path) -> None:
    with pytest.raises(InputError, match="not one of our towers"):
        VisionTower(str(tiny_clip), arguments())
    marker = json.loads((broken / export.MARKER).read_text())
    (broken / export.MARKER).write_text(json.dumps({**marker, "model_type": "dinov2"}))
    with pytest.raises(InputError, match="'dinov2' model: known are clip, siglip, siglip2"):
        VisionTower(str(broken), arguments())


@pytest.mark.launch
def test_slices_of_zero_3_are_compared_too(towers: dict[str, Path]) -> None:
    script = f"""
import torch, deepspeed
from types import SimpleNamespace
from transformers.integrations import HfDeepSpeedConfig
from llava_genhancer.errors import InputError
from llava_genhancer.tower.tower import VisionTower, check_loaded
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(dist_backend="gloo")
settings = {{"train_micro_batch_size_per_gpu": 1, "bf16": {{"enabled": True}}, "zero_optimization": {{"stage": 3}}}}
keep = HfDeepSpeedConfig(settings)
tower = VisionTower({str(towers["siglip"])!r}, SimpleNamespace(mm_vision_select_layer=-2))
weight = tower.vision_tower.get_input_embeddings().weight
assert weight.numel() == 0 and weight.ds_numel > 0
with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
    weight.data.view(-1)[0] += 1
try:
    check_loaded(tower.vision_tower, {str(towers["siglip"])!r})
except InputError as error:
    assert "stayed random" in str(error)
    print("compared")
"""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29671"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "compared"
