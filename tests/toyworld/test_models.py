"""The shipped CLIP, VAE and tokenizer: they load strictly, stay small, and are neither blind nor perfect."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer, CLIPImageProcessor, CLIPModel, SiglipModel

from llava_genhancer.errors import InputError
from llava_genhancer.toyworld import models, probes, scenes, tokenizer, training

CLIP, VAE = (Path(models.resolve(name)) for name in ("toyworld:clip", "toyworld:vae"))


@pytest.fixture(scope="module")
def clip():
    return models.load_clip(CLIP)


def test_shipped_weights_are_half_precision_and_under_five_megabytes():
    files = [path for folder in (CLIP, VAE) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as weights:
                assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118


def test_clip_loads_strictly_with_the_keys_of_a_full_clip():
    model, report = CLIPModel.from_pretrained(CLIP, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with safe_open(CLIP / "model.safetensors", "pt") as weights:
        stored = set(weights.keys())
    rooms = {"vision_model", "text_model", "visual_projection", "text_projection", "logit_scale"}
    assert {key.split(".")[0] for key in stored} == rooms
    assert stored == {name for name, _ in model.named_parameters()}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_tokenizer_loads_from_the_folder_and_knows_every_word_of_the_world():
    loaded = AutoTokenizer.from_pretrained(CLIP)
    assert loaded.model_max_length == 77
    for word in tokenizer.world_words():
        assert len(loaded(word).input_ids) == 3, word
    ids = loaded("An Orange diamond, critter!", padding="max_length", max_length=77).input_ids
    assert len(ids) == 77
    config = json.loads((CLIP / "config.json").read_text())["text_config"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (loaded.bos_token_id, loaded.eos_token_id)
    assert config["eos_token_id"] == config["vocab_size"] - 1 == max(ids)
    assert loaded.decode(ids, skip_special_tokens=True).split() == ["an", "orange", "diamond", ",", "critter", "!"]


def test_image_processor_does_what_training_did():
    processor = CLIPImageProcessor.from_pretrained(CLIP)
    scene = scenes.sample_scene(Random(0))
    processed = processor(scenes.render(scene), return_tensors="pt").pixel_values
    expected = training.normalise(training.to_tensor([scene]), models.CLIP_MEAN, models.CLIP_STD)
    torch.testing.assert_close(processed, expected, atol=1e-4, rtol=0)


def test_vae_reconstructs_fresh_scenes_and_its_latents_are_unit_sized():
    vae, report = AutoencoderKL.from_pretrained(VAE, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rng = Random(21)
    drawn = [scenes.sample_scene(rng, "test") for _ in range(64)]
    images = training.normalise(training.to_tensor(drawn), (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
        decoded = vae.decode(latents).sample
    assert latents.shape == (64, 8, 12, 12)
    psnr = float(10 * torch.log10(4 / (decoded - images).square().mean()))
    print(f"VAE reconstruction: {psnr:.1f} dB")
    assert psnr > 26
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.1
    assert 0.9 < scaled.std() < 1.1


def _pair_accuracy(clip, split: str, pairs_per_pattern: int, seed: int) -> dict[str, float]:
    model, words = clip
    rng = Random(seed)
    scores = {}
    for pattern in scenes.PATTERNS:
        pairs = [scenes.pair(pattern, rng, split) for _ in range(pairs_per_pattern)]
        images = training.to_tensor([scene for pair in pairs for scene in (pair[0], pair[2])])
        texts = [f"a photo of {text}" for pair in pairs for text in (pair[1], pair[3])]
        pixels = training.normalise(images, models.CLIP_MEAN, models.CLIP_STD)
        with torch.no_grad():
            output = model(pixel_values=pixels, **words(texts, padding=True, return_tensors="pt"))
        image, text = (e.unflatten(0, (-1, 2)) for e in (output.image_embeds, output.text_embeds))
        similarity = torch.einsum("ntd,nid->nti", text, image)
        right = similarity[:, 0, 0].gt(similarity[:, 0, 1]) & similarity[:, 1, 1].gt(similarity[:, 1, 0])
        scores[pattern.type] = 100 * right.float().mean().item()
    return scores


def test_the_clip_has_real_blind_spots(clip):
    scores = _pair_accuracy(clip, "dev", 40, seed=5)
    average = float(np.mean(list(scores.values())))
    print("pairs right, %: " + ", ".join(f"{name} {score:.0f}" for name, score in scores.items()))
    print(f"average {average:.1f}")
    assert 15 <= average <= 60
    assert max(scores.values()) >= 60, "it should see some details"
    assert min(scores.values()) <= 25, "it should be blind to some"


def test_probes_see_what_is_there_and_nothing_in_shuffled_labels(clip):
    train_images, train_labels = probes.labelled_scenes(1200, 31, "train")
    test_images, test_labels = probes.labelled_scenes(500, 32, "test")
    train, test = (probes.extract(clip[0], images) for images in (train_images, test_images))
    report = probes.probe_accuracy(train, train_labels, test, test_labels)
    for detail, row in report.items():
        low, high = row["interval"]
        assert 0 <= low < row["accuracy"] < high <= 1 or row["accuracy"] in (0, 1), detail
        assert row["chance"] == 1 / len(scenes.DETAILS[detail])
    for detail in ("colour", "texture", "size"):
        assert report[detail]["interval"][0] > report[detail]["chance"], f"{detail} should be in the embedding"
    generator = torch.Generator().manual_seed(0)
    shuffled = {d: labels[torch.randperm(len(labels), generator=generator)] for d, labels in train_labels.items()}
    blind = probes.probe_accuracy(train, shuffled, test, test_labels)
    deviations = [
        (row["accuracy"] - row["chance"]) / (row["chance"] * (1 - row["chance"]) / 500) ** 0.5 for row in blind.values()
    ]
    assert max(deviations) < 3.5, "a probe on shuffled labels must stay at chance"


def test_patch_tokens_can_be_probed_too(clip):
    images, _ = probes.labelled_scenes(3, 1, "test")
    vision = clip[0].config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    assert probes.extract(clip[0], images, "patches").shape == (3, patches * vision.hidden_size)


def test_run_probes_reports_in_the_reports_shape():
    report = probes.run_probes(["toyworld:clip", CLIP], train_scenes=150, test_scenes=60)
    assert report["details"] == list(scenes.DETAILS)
    assert report["original"] == report["enhanced"]
    assert json.loads(json.dumps(report)) == report


def test_probing_what_is_no_clip_is_a_clear_error(tmp_path):
    with pytest.raises(InputError, match="not a folder of a CLIPModel"):
        probes.run_probes([tmp_path / "nowhere"], train_scenes=10, test_scenes=10)
    with pytest.raises(InputError, match="not 0"):
        probes.run_probes([])


def test_a_random_siglip_for_tests_is_an_ordinary_folder(tmp_path):
    state = torch.random.get_rng_state()
    models.save_siglip(tmp_path / "a", seed=1)
    models.save_siglip(tmp_path / "b", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state), "building must not disturb the caller's random state"
    first, second = (AutoModel.from_pretrained(tmp_path / name) for name in "ab")
    assert isinstance(first, SiglipModel)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    words = AutoTokenizer.from_pretrained(tmp_path / "a")
    tokens = words(["a round critter"], padding="max_length", max_length=64, return_tensors="pt")
    assert first.get_text_features(input_ids=tokens.input_ids) is not None


def test_training_runs_and_repeats_exactly():
    pool = training.render_pool(24, 0)
    first, second = (training.train_clip(pool, seed=3, steps=3, batch_size=8) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    vaes = [training.train_vae(pool, seed=3, steps=2, batch_size=4) for _ in range(2)]
    assert vaes[0].config.scaling_factor == vaes[1].config.scaling_factor > 0
