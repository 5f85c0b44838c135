"""SigLIP: a timm trunk with attention pooling and a text tower without a causal mask, to transformers and back."""

import json
from pathlib import Path

import open_clip
import pytest
import small_open_clip
import torch
from safetensors.torch import load_file

from llava_genhancer.convert.architecture import build_open_clip, hf_config, infer_model_cfg, packaged_siglip
from llava_genhancer.convert.convert import convert
from llava_genhancer.convert.weights import with_text_prefix
from llava_genhancer.errors import InputError


@pytest.fixture(scope="module")
def siglip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In open_clip's format, with a tokenizer of a hundred words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("siglip") / "open_clip"
    small_open_clip.write_folder(folder, small_open_clip.SIGLIP)
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w1", eos_token="w1", unk_token="w2", model_max_length=16
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip lists the tiny SigLIP among its models, as a user's ``add_model_config`` does."""
    from open_clip import factory

    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-SigLIP.json").write_text(json.dumps(small_open_clip.SIGLIP))
    open_clip.add_model_config(tmp_path / "configs")


@torch.no_grad()
def test_outputs_and_bits(siglip_dir, tmp_path, known):
    from transformers import AutoModel

    tower = convert(str(siglip_dir), tmp_path / "tower")
    model = small_open_clip.build(small_open_clip.SIGLIP)
    siglip = AutoModel.from_pretrained(tower).eval()
    pixels, tokens = torch.randn(3, 3, 32, 32), torch.randint(0, 100, (3, 16))
    image, text = model.encode_image(pixels), model.encode_text(tokens)
    torch.testing.assert_close(siglip.get_image_features(pixels).pooler_output, image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(siglip.get_text_features(tokens).pooler_output, text, atol=1e-5, rtol=1e-5)
    logits = siglip(input_ids=tokens, pixel_values=pixels).logits_per_text
    torch.testing.assert_close(logits, model.get_logits(pixels, tokens)[1], atol=1e-4, rtol=1e-5)
    config = json.loads((tower / "config.json").read_text())
    # timm's trunk of this name has the exact GELU, and the text tower was told the other one
    assert config["vision_config"]["hidden_act"] == "gelu"
    assert config["text_config"]["hidden_act"] == "gelu_pytorch_tanh"

    back = convert(str(tower), tmp_path / "back", to="open_clip")
    ours, theirs = (load_file(f / "open_clip_model.safetensors") for f in (back, siglip_dir))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    read, _ = open_clip.create_model_from_pretrained(f"local-dir:{back}")
    torch.testing.assert_close(read.encode_image(pixels), image, atol=1e-5, rtol=1e-5)
    assert open_clip.get_tokenizer(f"local-dir:{back}")(["w5 w7"])[0, :2].tolist() == [5, 7]


def test_another_gelu_is_said(siglip_dir, tmp_path, known, caplog):
    """Google's folders say tanh where open_clip's trunk of that shape computes the exact GELU."""
    tower = convert(str(siglip_dir), tmp_path / "tower")
    config = json.loads((tower / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu_pytorch_tanh"
    (tower / "config.json").write_text(json.dumps(config))
    folder = convert(str(tower), tmp_path / "back", to="open_clip")
    assert "computes GELU gelu and gelu_pytorch_tanh" in caplog.text
    marker = json.loads((folder / "llava_genhancer.json").read_text())
    assert 0 < marker["converted_from"]["largest_difference"] < 0.01


def test_a_lone_file_is_known_by_its_shapes(siglip_dir, tmp_path, known):
    """DIVA's SigLIP files: the trunk's kind from the tensors, the tokenizer from the original."""
    state = load_file(siglip_dir / "open_clip_model.safetensors")
    torch.save({f"class_model.model.{n}": v for n, v in state.items()}, tmp_path / "diva.pth")
    with pytest.raises(InputError, match="no tokenizer to go with it: add --like"):
        convert(str(tmp_path / "diva.pth"), tmp_path / "none")
    original = convert(str(siglip_dir), tmp_path / "original")
    tower = convert(str(tmp_path / "diva.pth"), tmp_path / "tower", like=str(original))
    ours, theirs = load_file(tower / "model.safetensors"), load_file(original / "model.safetensors")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert (tower / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()


def test_a_shape_that_open_clip_does_not_know(siglip_dir, tmp_path):
    tower = convert(str(siglip_dir), tmp_path / "tower")
    with pytest.raises(InputError, match="knows none of this shape"):
        convert(str(tower), tmp_path / "back", to="open_clip")
    with pytest.raises(InputError, match="no model that open_clip knows"):
        convert(str(siglip_dir / "open_clip_model.safetensors"), tmp_path / "file")
    with pytest.raises(InputError, match="QuickGELU"):
        convert(str(siglip_dir), tmp_path / "openai", to="openai")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-SO400M-14-SigLIP", "ViT-SO400M-14-SigLIP-384", "ViT-SO400M-14-SigLIP2-378"])
def test_the_papers_siglips_are_found_again(name):
    cfg = open_clip.get_model_config(name)
    config = hf_config(cfg)
    assert packaged_siglip(config) == open_clip.get_model_config(name)
    state = with_text_prefix(build_open_clip(cfg, "meta").state_dict())
    if name != "ViT-SO400M-14-SigLIP-384":
        assert infer_model_cfg(state, quick_gelu=None, head_width=None) == open_clip.get_model_config(name)
    else:  # at 378 and 384 pixels make the same 27 x 27 patches of 14
        with pytest.raises(InputError, match="add --like and one of"):
            infer_model_cfg(state, quick_gelu=None, head_width=None)
