"""CLIP through all three formats: outputs of independent readers, bits after a round trip, honest refusals."""

import json
import os
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_genhancer.convert.architecture import build_open_clip, hf_config, infer_model_cfg, model_cfg_of
from llava_genhancer.convert.convert import OPENAI_WEIGHTS, convert
from llava_genhancer.convert.weights import with_text_prefix
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.towers import load_tower
from llava_genhancer.tower.export import verify_tower
from llava_genhancer.toyworld.paths import resolve

SENTENCES = ["a photo of a dog", "It's 3 RED cubes, left of the (blue) ball!", "über-naïve café", "x" * 400, ""]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_a_plain_state_dict_becomes_a_tower(make_clip, inputs, tmp_path, quick_gelu, precision):
    _, model = make_clip(quick_gelu)
    model.to(precision).float()  # what the file can hold
    torch.save({n: v.to(precision) for n, v in model.state_dict().items()}, tmp_path / "weights.pt")
    name = "quick_gelu" if quick_gelu else "gelu"
    folder = convert(str(tmp_path / "weights.pt"), tmp_path / "tower", activation=name)
    assert verify_tower(folder)["converted_from"]["largest_difference"] < 1e-5

    from transformers import AutoModel

    tower = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        image, text = model.encode_image(inputs[0]), model.encode_text(inputs[1])
        torch.testing.assert_close(tower.get_image_features(inputs[0]).pooler_output, image, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tower.get_text_features(inputs[1]).pooler_output, text, atol=1e-5, rtol=1e-5)
        logits = tower(input_ids=inputs[1], pixel_values=inputs[0]).logits_per_text
        torch.testing.assert_close(logits, model.get_logits(*inputs)[1], atol=1e-4, rtol=1e-5)


def test_there_and_back_in_every_format_keeps_every_bit(make_clip, tmp_path):
    _, model = make_clip()
    original = model.state_dict()
    torch.save(original, tmp_path / "weights.pt")
    tower = convert(str(tmp_path / "weights.pt"), tmp_path / "tower", activation="quick_gelu")
    folder = convert(str(tower), tmp_path / "open_clip", to="open_clip")
    assert same(load_file(folder / "open_clip_model.safetensors"), original)
    again = convert(str(folder), tmp_path / "again")
    assert same(load_file(again / "model.safetensors"), load_file(tower / "model.safetensors"))
    openai = convert(str(again), tmp_path / "openai", to="openai")
    assert same(torch.load(openai / OPENAI_WEIGHTS), original)


def test_open_clip_itself_reads_our_folder(make_clip, inputs, tmp_path):
    _, model = make_clip(quick_gelu=False, vision={"head_width": 32})
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    tower = convert(str(tmp_path / "weights.pt"), tmp_path / "tower", activation="gelu", head_width=32)
    folder = convert(str(tower), tmp_path / "open_clip", to="open_clip")
    read, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    with torch.no_grad():
        torch.testing.assert_close(read.encode_image(inputs[0]), model.encode_image(inputs[0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(read.encode_text(inputs[1]), model.encode_text(inputs[1]), atol=1e-5, rtol=0)
    assert json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["quick_gelu"] is False

    from transformers import AutoImageProcessor

    image = Image.effect_noise((57, 41), 80).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(tower, backend="pil")(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, preprocess(image), atol=1e-5, rtol=0)


def test_a_small_vocabulary_brings_its_own_tokenizer(tmp_path):
    """The toy world's CLIP: 679 words, heads of 32, fp16; measured in both formats."""
    toy = resolve("toyworld:clip")
    folder = convert(toy, tmp_path / "open_clip", to="open_clip")
    again = load_file(convert(str(folder), tmp_path / "again") / "model.safetensors")
    original = load_file(f"{toy}/model.safetensors")
    assert same(again, {n: v.float() for n, v in original.items()})
    images = [Image.effect_noise((60, 48), 90).convert("RGB")]
    texts = ["a photo of two red cubes", "one blue ball"]
    one, other = (load_tower(str(f), "cpu") for f in (toy, folder))
    torch.testing.assert_close(other.logits(images, texts), one.logits(images, texts), atol=1e-4, rtol=1e-5)
    with pytest.raises(InputError, match="heads of 64"):
        convert(toy, tmp_path / "openai", to="openai")


def test_openais_reader_gets_its_own_file(make_clip, inputs, tmp_path):
    """open_clip's port of OpenAI's loader, which infers everything from shapes, and the fp16 of OpenAI's files."""
    from open_clip.openai import load_openai_model

    _, model = make_clip()
    theirs = open_clip.model.build_model_from_openai_state_dict(dict(model.state_dict()))
    original = theirs.state_dict()  # partly fp16, as OpenAI's files are
    torch.save(original, tmp_path / "openai.pt")
    tower = convert(str(tmp_path / "openai.pt"), tmp_path / "tower", activation="quick_gelu")
    back = convert(str(tower), tmp_path / "back", to="openai", dtype="float16")
    written = torch.load(back / OPENAI_WEIGHTS)
    assert same(written, original)
    assert {n: v.dtype for n, v in written.items()} == {n: v.dtype for n, v in original.items()}
    loaded = load_openai_model(str(back / OPENAI_WEIGHTS), device="cpu")

    from transformers import CLIPModel

    with torch.no_grad():
        ours = CLIPModel.from_pretrained(tower).eval().get_image_features(inputs[0]).pooler_output
        torch.testing.assert_close(loaded.encode_image(inputs[0]), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_openais_torchscript_archive_says_which_gelu(make_clip, inputs, tmp_path):
    _, model = make_clip()
    traced = torch.jit.trace_module(model, {"encode_image": inputs[0], "encode_text": inputs[1]}, check_trace=False)
    traced.save(str(tmp_path / "ViT.pt"))
    tower = convert(str(tmp_path / "ViT.pt"), tmp_path / "tower")
    assert json.loads((tower / "config.json").read_text())["vision_config"]["hidden_act"] == "quick_gelu"


def test_a_trainers_checkpoint_is_found_inside(make_clip, tmp_path):
    """DIVA saves its diffusion model around the CLIP; open_clip's trainer wraps and prefixes."""
    _, model = make_clip()
    state = model.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    outside = {"unet.conv_in.weight": torch.ones(2), "visual_proj.weight": torch.ones(3)}
    torch.save({**outside, **{f"class_model.model.{n}": v for n, v in state.items()}}, tmp_path / "diva.pth")
    wrapped = {"epoch": 3, "state_dict": {f"module.{n}": v for n, v in state.items()}, "optimizer": {"state": {}}}
    torch.save(wrapped, tmp_path / "trainer.pt")
    plain, diva, trainer = (
        load_file(
            convert(str(tmp_path / name), tmp_path / f"{name}.out", activation="quick_gelu") / "model.safetensors"
        )
        for name in ("plain.pt", "diva.pth", "trainer.pt")
    )
    assert same(plain, diva)
    assert same(plain, trainer)


def test_the_tokenizer_reads_as_open_clips(make_clip, tmp_path):
    from transformers import AutoTokenizer

    _, model = make_clip()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    tower = convert(str(tmp_path / "weights.pt"), tmp_path / "tower", activation="quick_gelu")
    tokenizer = AutoTokenizer.from_pretrained(tower)
    theirs = open_clip.get_tokenizer("ViT-L-14")(SENTENCES)
    ours = tokenizer(SENTENCES, padding="max_length", truncation=True, max_length=77, return_tensors="pt")["input_ids"]
    ends = (ours == 49407).int().argmax(-1)
    for row, end in enumerate(ends.tolist()):  # after it CLIP reads nothing: open_clip fills up with 0, HF with the end
        assert torch.equal(ours[row, : end + 1], theirs[row, : end + 1])
        assert set(theirs[row, end + 1 :].tolist()) <= {0}


def test_open_clips_names_and_folders_can_stand_for_what_a_file_lacks(make_clip, tmp_path):
    cfg, model = make_clip(quick_gelu=False)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "like").mkdir()
    said = {"model_cfg": cfg, "preprocess_cfg": {"resize_mode": "squash", "mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "like" / "open_clip_config.json").write_text(json.dumps(said))
    tower = convert(str(tmp_path / "weights.pt"), tmp_path / "tower", like=str(tmp_path / "like"))
    processor = json.loads((tower / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.1, 0.2, 0.3]
    assert processor["size"] == {"height": 32, "width": 32}
    assert processor["do_center_crop"] is False
    # and a tower in transformers' format says its activation and brings its own companions
    other = convert(str(tmp_path / "weights.pt"), tmp_path / "other", like=str(tower))
    assert (other / "preprocessor_config.json").read_bytes() != b""
    assert same(load_file(other / "model.safetensors"), load_file(tower / "model.safetensors"))
    with pytest.raises(InputError, match="do not fit its model_cfg"):
        convert(str(tmp_path / "weights.pt"), tmp_path / "wrong", like="ViT-B-32")


def test_a_released_folder_gets_what_it_lacks(make_clip, tmp_path):
    """GenHancer's and DCR's releases are ``save_pretrained``'s: whole models, no processor, no tokenizer."""
    from transformers import CLIPModel

    _, model = make_clip()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    original = convert(str(tmp_path / "weights.pt"), tmp_path / "original", activation="quick_gelu")
    CLIPModel.from_pretrained(original).to(torch.bfloat16).save_pretrained(tmp_path / "release")
    with pytest.raises(InputError, match=r"no preprocessor_config\.json: add"):
        convert(str(tmp_path / "release"), tmp_path / "tower")
    tower = convert(str(tmp_path / "release"), tmp_path / "tower", like=str(original))
    assert verify_tower(tower)["source"] == str(tmp_path / "release")
    ours = load_file(tower / "model.safetensors")
    assert same(ours, {n: v.float() for n, v in load_file(tmp_path / "release" / "model.safetensors").items()})
    assert (tower / "merges.txt").read_bytes() == (original / "merges.txt").read_bytes()


@pytest.mark.parametrize(
    "name", ["ViT-B-32", "ViT-L-14-336-quickgelu", "ViT-H-14-quickgelu", "ViT-g-14", "ViT-bigG-14", "ViT-B-16-plus"]
)
def test_sizes_and_heads_come_from_the_tensors(name):
    """MetaCLIP's and DFN's ViT-H have heads of 80; no weight is made here."""
    cfg = open_clip.get_model_config(name)
    expected = hf_config(cfg)
    state = with_text_prefix(build_open_clip(cfg, "meta").state_dict())
    inferred = infer_model_cfg(state, quick_gelu=cfg.get("quick_gelu", False), head_width=None)
    assert hf_config(inferred).to_dict() == expected.to_dict()
    assert hf_config(model_cfg_of(expected)).to_dict() == expected.to_dict()


def test_what_cannot_be_known_or_held_is_refused(make_clip, tmp_path):
    _, model = make_clip()
    state = model.state_dict()

    def refused(match, file="weights.pt", to="hf", **options):
        with pytest.raises(InputError, match=match):
            convert(str(tmp_path / file), tmp_path / "out", to=to, **options)
        assert not (tmp_path / "out").exists()

    torch.save(state, tmp_path / "weights.pt")
    refused("do not say which GELU it uses: add --activation")
    refused("--to onnx is unknown", to="onnx")
    refused("does not exist", file="absent.pt")
    refused("makes every model with QuickGELU", to="openai", activation="gelu")
    torch.save({**state, "visual.extra": torch.ones(1)}, tmp_path / "more.pt")
    refused("visual.extra", file="more.pt", activation="gelu")
    torch.save({n: v for n, v in state.items() if n != "ln_final.bias"}, tmp_path / "less.pt")
    refused("ln_final.bias", file="less.pt", activation="gelu")
    torch.save({n: v for n, v in state.items() if n.startswith("visual.")}, tmp_path / "half.pt")
    refused("holds no CLIP", file="half.pt", activation="gelu")
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"model": Path("x"), "run": os.getcwd}))
    refused("cannot be read safely", file="code.pt")
    torch.save({"visual.layer1.0.conv1.weight": torch.ones(1), "logit_scale": torch.ones(())}, tmp_path / "resnet.pt")
    refused("ResNet", file="resnet.pt")
    torch.save({**state, "visual.positional_embedding": torch.ones(30, 128)}, tmp_path / "grid.pt")
    refused("positional_embedding", file="grid.pt", activation="gelu")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"is not empty: choose another --output_dir$"):
            convert(str(tmp_path / "weights.pt"), tmp_path / "out", activation="gelu", overwrite=overwrite)


@pytest.mark.parametrize("to", ["hf", "open_clip"])
def test_an_earlier_tower_is_replaced_when_asked_for(make_clip, tmp_path, to):
    _, model = make_clip()
    towers = []
    for scale, name in enumerate(("first.pt", "second.pt")):
        torch.save({**model.state_dict(), "logit_scale": torch.tensor(float(scale))}, tmp_path / name)
        towers.append(convert(str(tmp_path / name), tmp_path / name[:-3], to=to, activation="quick_gelu"))
    weights = "model.safetensors" if to == "hf" else "open_clip_model.safetensors"
    first, second = ((tower / weights).read_bytes() for tower in towers)
    options = {"to": to, "activation": "quick_gelu"}
    with pytest.raises(InputError, match="is not empty: choose another --output_dir, or add --overwrite"):
        convert(str(tmp_path / "second.pt"), towers[0], **options)
    assert (towers[0] / weights).read_bytes() == first != second
    assert (convert(str(tmp_path / "second.pt"), towers[0], **options, overwrite=True) / weights).read_bytes() == second


def test_models_that_pool_otherwise_stay_in_open_clips_format(make_clip, tmp_path):
    cfg, model = make_clip(vision={"pool_type": "avg"})
    from llava_genhancer.convert.open_clip import write_folder

    (tmp_path / "folder").mkdir()
    write_folder(
        tmp_path / "folder",
        cfg,
        {"mean": [0.5] * 3, "std": [0.5] * 3},
        with_text_prefix(model.state_dict()),
        torch.float32,
    )
    with pytest.raises(InputError, match="pools by 'avg'"):
        convert(str(tmp_path / "folder"), tmp_path / "tower")


@pytest.mark.parametrize("content", [b"junk\n", b"", bytes(range(256)), b"\x80\x04K\x01h\xff."])
def test_bytes_that_are_no_pickle_are_one_line(tmp_path, content):
    (tmp_path / "junk.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"junk\.pt cannot be read safely"):
        convert(str(tmp_path / "junk.pt"), tmp_path / "tower")
    assert not (tmp_path / "tower").exists()


def test_a_missing_folder_beside_others_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="models/clip does not exist"):
        convert("models/clip", tmp_path / "tower")


@pytest.mark.parametrize("start", ["hf", "open_clip"])
@pytest.mark.parametrize("to", ["open_clip", "openai", "hf"])
def test_weights_that_are_not_finite_are_converted_to_nothing(tiny_clip, tmp_path, start, to) -> None:
    """In the image tower, in the text tower, or once they are written in half precision."""
    import shutil

    broken = tmp_path / "broken"
    if start == "hf":
        shutil.copytree(tiny_clip, broken)
    else:
        convert(str(tiny_clip), broken, to="open_clip")
    file = broken / ("model.safetensors" if start == "hf" else "open_clip_model.safetensors")
    state = load_file(file)
    image = next(n for n in state if n in ("visual.proj", "visual_projection.weight"))
    text = next(n for n in state if n.endswith(("text_model.final_layer_norm.bias", "ln_final.bias")))
    for name, value, dtype, words in (
        (image, "nan", "float32", "not finite"),
        (text, "inf", "float32", "not finite"),
        (text, "1e6", "float16", "too large for float16"),
    ):
        changed = state[name].clone()
        changed.view(-1)[0] = float(value)
        save_file({**state, name: changed}, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=words):
            convert(str(broken), tmp_path / "out", to=to, dtype=dtype)
        assert not (tmp_path / "out").exists()
