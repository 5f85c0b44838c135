"""EVA-CLIP in open_clip's own format: what LoRA reaches, what is exported, what reads it."""

from pathlib import Path

import open_clip
import pytest
import small_open_clip
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_genhancer import run
from llava_genhancer.convert.convert import convert
from llava_genhancer.enhance.backbones import add_lora, check_backbone, linear_layers, load_backbone, load_full_model
from llava_genhancer.enhance.export import export_tower
from llava_genhancer.enhance.stages import build_stage, trainable_names
from llava_genhancer.enhance.train import enhance
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.towers import load_tower
from llava_genhancer.llava.model import load_tower as load_llava_tower


@pytest.fixture(scope="session")
def eva_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip") / "tiny-eva"
    small_open_clip.write_folder(folder, small_open_clip.EVA)
    return folder


@torch.no_grad()
def test_global_and_local_tokens(eva_dir, recipe_of):
    backbone = load_backbone(recipe_of(backbone=str(eva_dir))).eval()
    model = small_open_clip.build(small_open_clip.EVA)
    pixels = torch.randn(2, 3, 32, 32)
    tokens = backbone.tokens(pixels)
    assert tokens.shape == (2, 1 + 16, 32)
    torch.testing.assert_close(backbone(pixels), model.encode_image(pixels))
    torch.testing.assert_close(tokens[:, 0], model.encode_image(pixels), atol=1e-6, rtol=1e-5)
    # a local token is what timm's own head makes of the trunk's hidden state
    trunk = model.visual.trunk
    local = trunk.head(trunk.fc_norm(trunk.forward_features(pixels)[:, 5]))
    torch.testing.assert_close(tokens[:, 5], local, atol=1e-6, rtol=1e-5)
    assert backbone.image_mean == tuple(small_open_clip.PREPROCESS["mean"])
    assert (backbone.image_size, backbone.patch_size, backbone.token_dim) == (32, 8, 32)


def test_lora_reaches_every_linear_layer_that_is_called(eva_dir, recipe_of, tiny_target):
    recipe = recipe_of(backbone=str(eva_dir))
    expected = {f"visual.trunk.blocks.{i}.attn.{n}" for i in (0, 1) for n in ("q_proj", "k_proj", "v_proj", "proj")}
    expected |= {f"visual.trunk.blocks.{i}.mlp.{n}" for i in (0, 1) for n in ("fc1_g", "fc1_x", "fc2")}
    expected |= {"visual.trunk.head"}
    assert set(linear_layers(load_backbone(recipe))) == expected
    enhancer = build_stage(recipe, 2, tiny_target)
    names = trainable_names(enhancer, recipe, 2)
    biased = {n for n in expected if "k_proj" not in n}  # EVA's keys have none
    assert names == {
        f"backbone.{n}{suffix}"
        for n in expected
        for suffix in (".lora_A.default.weight", ".lora_B.default.weight", *([".base_layer.bias"] * (n in biased)))
    }
    recipe = recipe_of(backbone=str(eva_dir), lora_rank=0)
    vision = {f"backbone.{n}" for n, _ in load_full_model(str(eva_dir)).named_parameters() if n.startswith("visual")}
    assert trainable_names(build_stage(recipe, 2, tiny_target), recipe, 2) == vision


def test_a_bypassed_weight_gets_no_adapter(recipe_of, eva_dir):
    """Some of timm's attentions read ``qkv.weight`` itself: an adapter there would never be called."""
    from llava_genhancer.enhance.eva import OpenClipBackbone

    model = small_open_clip.build(small_open_clip.EVA)
    attention = model.visual.trunk.blocks[0].attn
    inner = attention.proj
    attention.proj = torch.nn.Sequential(inner)
    attention.proj.forward = lambda x: torch.nn.functional.linear(x, inner.weight, inner.bias)
    backbone = OpenClipBackbone(model, [0.5] * 3, [0.5] * 3)
    assert backbone.bypassed == ["visual.trunk.blocks.0.attn.proj.0"]
    assert "visual.trunk.blocks.0.attn.proj.0" not in linear_layers(backbone)
    assert "visual.trunk.blocks.1.attn.proj" in linear_layers(backbone)


def test_the_whole_way_through_open_clips_format(eva_dir, recipe_of, tmp_path):
    recipe = recipe_of(backbone=str(eva_dir), **{"stage1.max_steps": 2, "stage2.max_steps": 2, "sample_images": 0})
    tower = enhance(recipe, tmp_path / "run")
    marker = run.read_json(tower / "llava_genhancer.json")
    assert marker["model_type"] == "open_clip"
    assert "local-dir:" in (tower / "README.md").read_text()
    before, after = (load_file(f / "open_clip_model.safetensors") for f in (eva_dir, tower))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert before.keys() == after.keys()
    assert changed
    assert all(n.startswith("visual.trunk.") for n in changed)

    # open_clip itself reads it, and computes what the adapters computed
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{tower}")
    backbone = load_backbone(recipe)
    add_lora(backbone, recipe)
    weights = load_file(tmp_path / "run" / "stage2" / "weights.safetensors")
    backbone.load_state_dict(
        {n.removeprefix("backbone."): v for n, v in weights.items() if "backbone" in n}, strict=False
    )
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), backbone.eval()(pixels), atol=1e-5, rtol=1e-4)

    written = (tower / "open_clip_model.safetensors").stat().st_mtime_ns
    export_tower(tmp_path / "run", tower, recipe)
    assert (tower / "open_clip_model.safetensors").stat().st_mtime_ns == written  # up to date, left alone
    (tower / "open_clip_model.safetensors").write_bytes(b"")
    export_tower(tmp_path / "run", tower, recipe)
    assert load_file(tower / "open_clip_model.safetensors").keys() == before.keys()


def test_measured_as_open_clip_computes_it(eva_dir):
    tower = load_tower(str(eva_dir), "cpu")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{eva_dir}")
    images = [Image.effect_noise((40, 60 + i), 90).convert("RGB") for i in range(3)]
    texts = ["a photo of a Dog", "two cats"]
    pixels, tokens = torch.stack([preprocess(i) for i in images]), open_clip.get_tokenizer("EVA02-L-14")(texts)
    with torch.no_grad():
        torch.testing.assert_close(tower.image_features(images), model.encode_image(pixels))
        torch.testing.assert_close(tower.text_features(texts), model.encode_text(tokens))
        torch.testing.assert_close(tower.logits(images, texts), model.get_logits(pixels, tokens)[1])
    assert tower.model_type == "open_clip"
    assert list(tower.weights) == ["open_clip_model.safetensors"]


def test_a_lone_file_becomes_a_folder(eva_dir, tmp_path, monkeypatch):
    """The trunk's kind is found among open_clip's models by the tensors' shapes."""
    from open_clip import factory

    monkeypatch.setattr(factory, "_MODEL_CONFIGS", {"tiny": small_open_clip.EVA, **factory._MODEL_CONFIGS})
    torch.save(load_file(eva_dir / "open_clip_model.safetensors"), tmp_path / "eva.pt")
    folder = convert(str(tmp_path / "eva.pt"), tmp_path / "folder", to="open_clip")
    assert check_backbone(str(folder)) == "open_clip"
    ours, theirs = (load_file(f / "open_clip_model.safetensors") for f in (folder, eva_dir))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_what_is_said_instead(eva_dir, recipe_of, tmp_path):
    with pytest.raises(InputError, match="without SigLIP's pooling"):
        convert(str(eva_dir), tmp_path / "tower")
    with pytest.raises(InputError, match="keeps its own size"):
        load_backbone(recipe_of(backbone=str(eva_dir), image_size=64))
    with pytest.raises(InputError):
        load_llava_tower(str(eva_dir), torch.float32)
    small_open_clip.write_folder(tmp_path / "siglip", small_open_clip.SIGLIP)
    with pytest.raises(InputError, match="llava-genhancer convert"):
        check_backbone(str(tmp_path / "siglip"))
    (tmp_path / "siglip" / "open_clip_config.json").write_text("{}")
    with pytest.raises(InputError, match="has no model_cfg"):
        check_backbone(str(tmp_path / "siglip"))
