"""Backbones: transformers' own global tokens from every kind of folder, one line for a folder of no use."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from llava_genhancer.enhance.backbones import (
    add_lora,
    check_backbone,
    linear_layers,
    load_backbone,
    load_full_model,
    load_image_statistics,
)
from llava_genhancer.errors import InputError


@pytest.fixture
def folders(tiny_clip, tiny_siglip, tiny_siglip2) -> dict[str, Path]:
    return {"clip": tiny_clip, "siglip": tiny_siglip, "siglip2": tiny_siglip2}


def pictures(size: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(size)
    pixels = torch.randint(0, 256, (3, size, size, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(array) for array in pixels.numpy()]


def full_model_token(folder: Path, kind: str, images: list[Image.Image], size: int) -> Tensor:
    """What transformers' full model makes of the images, through its own processor."""
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    text = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    if kind == "siglip2":
        inputs = processor(images, return_tensors="pt", max_num_patches=(size // 8) ** 2)
        return model(**inputs, **text).vision_model_output.pooler_output
    box = {"height": size, "width": size}
    inputs = processor(images, return_tensors="pt", size=box, **({"crop_size": box} if kind == "clip" else {}))
    output = model(**inputs, **text, interpolate_pos_encoding=True)
    token = output.vision_model_output.pooler_output  # for CLIP, projected already
    assert torch.allclose(token / token.norm(dim=-1, keepdim=True), output.image_embeds, atol=1e-6)
    return token


@pytest.mark.parametrize(
    ("kind", "native", "size"),
    [
        ("clip", 32, 32),
        ("clip", 32, 48),
        ("siglip", 48, 48),
        ("siglip", 48, 32),
        ("siglip2", 32, 32),
        ("siglip2", 32, 48),
    ],
)
@torch.no_grad()
def test_the_global_token_is_the_full_models(recipe_of, folders, kind: str, native: int, size: int) -> None:
    backbone = load_backbone(recipe_of(backbone=str(folders[kind]), image_size=None if size == native else size)).eval()
    assert backbone.image_size == size
    assert backbone.model_type == kind
    images = pictures(size)
    token = backbone(backbone.normalise(torch.stack([pil_to_tensor(image) for image in images])))
    expected = full_model_token(folders[kind], kind, images, size)
    assert token.shape == (3, backbone.token_dim)
    assert torch.allclose(token, expected, atol=1e-5)
    assert (token[0] - token[1]).abs().max() > 1e-3, "the token does not see the image"


def test_the_clip_token_is_not_normalised(recipe_of) -> None:
    backbone = load_backbone(recipe_of())
    norms = backbone(torch.randn(4, 3, 32, 32)).norm(dim=-1)
    assert (norms - 1).abs().max() > 1e-2


def test_a_size_that_does_not_fit_the_patch(recipe_of) -> None:
    with pytest.raises(InputError, match="image_size=30 is not a multiple of the backbone's patch, 8"):
        load_backbone(recipe_of(image_size=30))


def test_weights_stored_in_half_arrive_in_fp32(recipe_of, tiny_clip, tmp_path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "half")
    weights = {n: v.half().contiguous() for n, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    state = load_backbone(recipe_of(backbone=str(folder))).state_dict()
    assert {v.dtype for n, v in state.items()} == {torch.float32}
    assert all(torch.equal(v, weights[n].float()) for n, v in state.items())


# --- LoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_lora_never_goes_inside_multihead_attention(recipe_of, folders, kind: str) -> None:
    """torch's attention reads out_proj.weight itself: an adapter there would learn nothing."""
    recipe = recipe_of(backbone=str(folders[kind]))
    backbone = load_backbone(recipe)
    fused = [n for n, m in backbone.named_modules() if isinstance(m, nn.MultiheadAttention)]
    assert fused == ["vision_model.head.attention"]
    assert not [n for n in linear_layers(backbone) if n.startswith(fused[0])]
    add_lora(backbone, recipe)
    assert not [n for n, _ in backbone.named_parameters() if n.startswith(fused[0]) and "lora" in n]
    assert [n for n, _ in backbone.named_parameters() if n.startswith("vision_model.head.mlp.fc1.lora_A")]


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_fresh_lora_changes_nothing(recipe_of, folders, kind: str) -> None:
    recipe = recipe_of(backbone=str(folders[kind]))
    plain, adapted = load_backbone(recipe).eval(), load_backbone(recipe).eval()
    add_lora(adapted, recipe)
    adapted.eval()
    pixels = torch.randn(2, 3, plain.image_size, plain.image_size)
    assert torch.equal(plain(pixels), adapted(pixels))


# --- folders that cannot be used -------------------------------------------------------------------------------------


def _config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _without(prefix: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        file = folder / "model.safetensors"
        kept = {n: v for n, v in load_file(file).items() if not n.startswith(prefix)}
        save_file(kept, file, metadata={"format": "pt"})

    return remove


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _vision_only(folder: Path) -> None:
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json there"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "cannot be loaded"),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), "cannot be loaded"),
    "another model": (lambda f: _config(f, model_type="bert"), "is a 'bert' model: needed is a CLIPModel"),
    "vision only": (_vision_only, "is a 'clip_vision_model' model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights cannot be loaded"),
    "cut weights": (_cut, "weights cannot be loaded"),
    "no text tower": (_without("text_model."), "weights are not in its files (first: text_model."),
    "no projection": (_without("visual_projection"), "1 weights are not in its files (first: visual_projection"),
    "other width": (lambda f: _config(f, projection_dim=64), "weights"),
    "no processor": (lambda f: (f / "preprocessor_config.json").unlink(), "no usable image processor"),
    "processor is no JSON": (lambda f: (f / "preprocessor_config.json").write_text("{"), "no usable image processor"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_one_line(recipe_of, tiny_clip, tmp_path, case: str) -> None:
    damage, words = BAD_FOLDERS[case]
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    damage(folder)
    with pytest.raises(InputError) as caught:
        load_backbone(recipe_of(backbone=str(folder)))
    message = str(caught.value)
    assert words in message
    assert str(folder) in message
    assert "\n" not in message
    assert "()" not in message, "a reason is missing"


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"backbone /no/such/clip: no config\.json there"):
        check_backbone("/no/such/clip")
    with pytest.raises(InputError, match="give a local folder, or a hub id"):
        check_backbone("nobody/such-a-clip")


def test_a_home_folder_is_found(recipe_of, tiny_clip, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_clip.parent))
    assert check_backbone("~/clip") == "clip"
    assert load_full_model("~/clip") is not None
    assert load_image_statistics("~/clip") == load_image_statistics(str(tiny_clip))


@torch.no_grad()
def test_a_rim_that_no_patch_covers_is_left_out_as_transformers_does(recipe_of, tmp_path: Path) -> None:
    """SigLIP at 384 px has patches of 14: 27 of them and six pixels over."""
    from transformers import SiglipModel, SiglipVisionConfig

    from llava_genhancer.toyworld.models import build_siglip_config, save_siglip

    folder = save_siglip(tmp_path / "siglip")
    config = build_siglip_config(64)
    config.vision_config = SiglipVisionConfig(**{**config.vision_config.to_dict(), "image_size": 54, "patch_size": 8})
    model = SiglipModel(config).eval()
    model.save_pretrained(folder)
    backbone = load_backbone(recipe_of(backbone=str(folder))).eval()
    pixels = torch.randn(2, 3, 54, 54)
    assert torch.allclose(backbone(pixels), model.vision_model(pixels).pooler_output, atol=1e-6)
    assert torch.equal(
        backbone(pixels), backbone(torch.nn.functional.pad(pixels[..., :48, :48], (0, 6, 0, 6), value=9))
    )
    assert backbone.tokens(pixels).shape[1] == 1 + 6 * 6
    with pytest.raises(InputError, match="image_size=60 is not a multiple of the backbone's patch, 8"):
        load_backbone(recipe_of(backbone=str(folder), image_size=60))
