"""The protocol: parity with a plain re-derivation, independence of the batch, a score known beforehand."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate import paper
from llava_genhancer.evaluate.mmvp.measure import evaluate_tower, load_benchmark, pair_logits, run, short_labels, table
from llava_genhancer.evaluate.mmvp.results import MmvpResult, compare, load_results
from llava_genhancer.evaluate.tower import Tower, exact_fp32
from llava_genhancer.evaluate.towers import load_tower

KINDS = ("clip_dir", "siglip_dir", "siglip2_dir")


@pytest.fixture(scope="module")
def benchmark(benchmark_dir):
    return load_benchmark(benchmark_dir)


def plain_protocol(tower_dir, folder):
    """The official loop written again from its description: one statement, two images, one forward at a time."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(tower_dir)
    kind = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}[config.model_type]
    model = getattr(transformers, kind).from_pretrained(tower_dir).eval().float()
    if config.model_type == "clip":
        tokenizer = transformers.CLIPTokenizer.from_pretrained(tower_dir)
        options = {"max_length": 77}
    elif config.model_type == "siglip":
        tokenizer, options = transformers.SiglipTokenizer.from_pretrained(tower_dir), {}
    else:
        tokenizer, options = transformers.AutoTokenizer.from_pretrained(tower_dir), {"max_length": 64}
    processor = transformers.AutoImageProcessor.from_pretrained(tower_dir, backend="pil")
    with open(folder / "Questions.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.reader(f))[1:]
    answers = []
    for i in range(0, len(rows), 2):
        (id1, kind1, text1), (id2, _, text2) = rows[i], rows[i + 1]
        images = [Image.open(folder / "MLLM_VLM Images" / kind1 / f"{x}.jpg") for x in (id1, id2)]
        inputs = processor(images=images, return_tensors="pt")
        probabilities, correct = [], []
        for number, text in ((int(id1), text1), (int(id2), text2)):
            text = "a photo of " + text
            text = text.lower() if config.model_type == "siglip2" else text
            ids = tokenizer(text, truncation=True, padding="max_length", return_tensors="pt", **options)["input_ids"]
            with torch.no_grad():
                p = model(input_ids=ids, **inputs).logits_per_text.softmax(-1)[0, 0].item()
            probabilities.append(p)
            correct.append((p > 0.5) == (number % 2 == 1))
        answers.append((probabilities, correct))
    return answers


@pytest.mark.parametrize("kind", KINDS)
def test_same_answers_as_the_plain_loop(kind, request, benchmark, benchmark_dir):
    folder = request.getfixturevalue(kind)
    result = evaluate_tower(str(folder), benchmark, batch_size=64)
    expected = plain_protocol(folder, benchmark_dir)
    assert [list(p.correct) for p in result.pairs] == [correct for _, correct in expected]
    ours = torch.tensor([p.probability for p in result.pairs])
    theirs = torch.tensor([p for p, _ in expected])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert ours.std() > 0.05  # the towers do have opinions
    right = [all(correct) for _, correct in expected]
    assert [s.right for s in result.patterns] == [sum(right[i : i + 15]) for i in range(0, 135, 15)]
    assert result.average.percent == pytest.approx(100 * sum(right) / 135)


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_changes_nothing(kind, request, benchmark):
    tower = load_tower(str(request.getfixturevalue(kind)), "cpu")
    small = torch.cat([pair_logits(tower, [p]) for p in benchmark.pairs[:20]])
    for size in (3, 20):
        batched = torch.cat([pair_logits(tower, benchmark.pairs[i : i + size]) for i in range(0, 20, size)])[:20]
        torch.testing.assert_close(batched, small, atol=1e-5, rtol=1e-5)
    assert torch.equal(pair_logits(tower, benchmark.pairs[:20]), pair_logits(tower, benchmark.pairs[:20]))


def test_an_odd_batch_size_is_taken_in_whole_pairs(clip_dir, benchmark):
    tower = load_tower(str(clip_dir), "cpu")
    one, seven = (evaluate_tower(tower, benchmark, batch_size=b) for b in (1, 7))
    assert [p.correct for p in one.pairs] == [p.correct for p in seven.pairs]
    with pytest.raises(InputError, match="batch_size=0"):
        evaluate_tower(tower, benchmark, batch_size=0)


def test_towers_are_loaded_as_the_protocol_says(clip_dir, siglip_dir, siglip2_dir):
    clip, siglip, naflex = (load_tower(str(d), "cpu") for d in (clip_dir, siglip_dir, siglip2_dir))
    assert (clip.max_length, siglip.max_length, naflex.max_length) == (77, 64, 64)
    for tower in (clip, siglip, naflex):
        assert not tower.model.training
        assert {p.dtype for p in tower.model.parameters()} == {torch.float32}
        assert tower.texts(["one", "a much longer text " * 40]).shape == (2, tower.max_length)
        assert list(tower.weights) == ["model.safetensors"]
    for tower in (siglip, naflex):
        assert torch.equal(tower.texts(["A Red DOG"]), tower.texts(["a red dog"]))
    assert set(naflex.images([Image.new("RGB", (30, 20))])) == {
        "pixel_values",
        "pixel_attention_mask",
        "spatial_shapes",
    }
    assert type(clip.image_processor).__name__ == "CLIPImageProcessorPil"


def test_images_are_resized_by_pillow_from_an_old_preprocessor_file_too(clip_dir, tmp_path):
    """OpenAI's own file, of 2021, names no image processor; torchvision's resize would differ by a grey level."""
    folder = shutil.copytree(clip_dir, tmp_path / "old")
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": 16, "do_center_crop": True, "do_normalize": True, "do_resize": True, "size": 16,
                "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": mean, "image_std": std, "resample": 3,
            }
        )
    )  # fmt: skip
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8))
    cropped = image.resize((24, 16), Image.Resampling.BICUBIC).crop((4, 0, 20, 16))
    pixels = torch.tensor(np.array(cropped)) / 255
    expected = ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)
    ours = load_tower(str(folder), "cpu").images([image])["pixel_values"][0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


class KnowsIds(torch.nn.Module):
    """Prefers the image whose id the statement names."""

    def forward(self, input_ids, pixel_values):
        logits = -10 * (input_ids.float() - pixel_values.float().T).abs()
        return type("Output", (), {"logits_per_text": logits})


@pytest.fixture(scope="module")
def numbered_set(make_benchmark, tmp_path_factory):
    """Every image carries its id in its colour, every statement in its words; PNG keeps the colour exact."""
    folder = tmp_path_factory.mktemp("numbered") / "set"
    colour = lambda n: Image.new("RGB", (2, 2), (n // 256, n % 256, 0))  # noqa: E731
    return make_benchmark(folder, colour, lambda n: f"number {n}", suffix=".png")


@pytest.fixture
def oracle_tower():
    def image_processor(images, return_tensors):
        ids = [[256 * image.getpixel((0, 0))[0] + image.getpixel((0, 0))[1]] for image in images]
        return {"pixel_values": torch.tensor(ids)}

    def tokenizer(texts, **options):
        assert all(t.startswith("a photo of ") for t in texts)
        return {"input_ids": torch.tensor([[int(t.split()[-1])] for t in texts])}

    return Tower("oracle", "clip", KnowsIds(), tokenizer, image_processor, 77, torch.device("cpu"))


@pytest.mark.parametrize(
    ("swapped", "right"), [((), 135), ((1, 2), 134), ((62,), 134), ((1, 31, 61), 132), (tuple(range(1, 271)), 0)]
)
def test_a_score_known_beforehand(tmp_path, numbered_set, with_own_questions, oracle_tower, swapped, right):
    folder = with_own_questions(numbered_set, tmp_path / "set")
    rows = (folder / "Questions.csv").read_text().splitlines()
    for number in swapped:  # its statement is true of the partner's image
        partner = number + 1 if number % 2 else number - 1
        rows[number] = rows[number].replace(f"number {number}", f"number {partner}")
    (folder / "Questions.csv").write_text("\n".join(rows))
    result = evaluate_tower(oracle_tower, load_benchmark(folder))
    assert result.average.right == right
    assert result.average.percent == pytest.approx(100 * right / 135)
    if swapped == (1, 2):
        assert result.pairs[0].correct == (False, False)
        assert [s.right for s in result.patterns] == [14] + [15] * 8
    if swapped == (62,):  # one wrong statement loses the pair
        assert result.pairs[30].correct == (True, False)
        assert [s.right for s in result.patterns] == [15, 15, 14] + [15] * 6


def test_a_tie_goes_to_the_second_image(tmp_path, make_benchmark, oracle_tower):
    same = make_benchmark(tmp_path / "set", lambda n: Image.new("RGB", (2, 2)), lambda n: f"no {n}", suffix=".png")
    result = evaluate_tower(oracle_tower, load_benchmark(same))
    assert {p.probability for p in result.pairs} == {(0.5, 0.5)}
    assert {p.correct for p in result.pairs} == {(False, True)}


def test_results_survive_json(clip_dir, siglip_dir, benchmark):
    a = evaluate_tower(str(clip_dir), benchmark)
    assert MmvpResult.from_dict(json.loads(json.dumps(a.to_dict()))) == a
    broken = a.to_dict()
    broken["pairs"] = broken["pairs"][:-1]
    with pytest.raises(InputError, match="134 pairs"):
        MmvpResult.from_dict(broken)
    with pytest.raises(InputError, match="KeyError"):
        MmvpResult.from_dict({"tower": "x"})


def test_comparison_counts_discordant_pairs(clip_dir, benchmark):
    a = evaluate_tower(str(clip_dir), benchmark)
    flip = {3, 4, 50}
    pairs = [
        dataclasses.replace(p, correct=(True, True) if i in flip else (False, True) if i == 70 else p.correct)
        for i, p in enumerate(a.pairs)
    ]
    start = [dataclasses.replace(p, correct=(False, False) if i in flip else (True, True) if i == 70 else p.correct)
             for i, p in enumerate(a.pairs)]  # fmt: skip
    c = compare(dataclasses.replace(a, pairs=tuple(start)), dataclasses.replace(a, pairs=tuple(pairs)))
    assert (c.gained, c.lost) == (3, 1)
    assert c.difference == pytest.approx(100 * 2 / 135)
    assert c.p == pytest.approx(2 * 5 / 16)
    assert c.low < c.difference < c.high


def test_run_prints_writes_and_draws(tmp_path, capsys, clip_dir, siglip_dir, siglip2_dir, benchmark_dir):
    output = tmp_path / "out" / "mmvp_vlm.json"
    measured = run([str(clip_dir), str(siglip_dir), str(siglip2_dir)], benchmark_dir.parent, output, device="cpu")
    printed = capsys.readouterr().out
    assert json.loads(output.read_text()) == measured
    for text in (*paper.PATTERNS, "tiny-clip", "tiny-siglip2", "McNemar", "95 %", "0.74 points", "25 %"):
        assert text in printed
    assert len(measured["comparisons"]) == 2
    assert measured["benchmark"]["pairs"] == 135
    assert {"torch", "transformers", "python"} <= set(measured["versions"])
    assert len(load_results(output)) == 3
    picture = Image.open(output.with_suffix(".png"))
    assert picture.width > 800
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    again = run([str(clip_dir)], benchmark_dir, device="cpu")
    assert again["towers"][0]["pairs"] == measured["towers"][0]["pairs"]


def test_the_table_is_aligned_and_shows_the_paper(clip_dir, benchmark):
    result = evaluate_tower(str(clip_dir), benchmark)
    original = dataclasses.replace(result, label="original", backbone="openai-l14-224")
    enhanced = dataclasses.replace(result, label="enhanced", backbone="openai-l14-224", recipe="openai-l14-224")
    lines = table([original, enhanced]).splitlines()
    assert len({len(line) for line in lines[:13]}) == 1
    average = next(line for line in lines if line.startswith("average"))
    assert "(19.3)" in average
    assert "(31.9)" in average
    assert "0 pairs gained, 0 lost, McNemar's exact p = 1.000" in table([original, enhanced])


def test_labels_tell_towers_apart():
    assert short_labels(["openai/clip", "b/siglip"]) == ["clip", "siglip"]
    assert short_labels(["runs/a/tower/", "runs/b/tower"]) == ["a/tower", "b/tower"]
    assert short_labels(["x/clip", "x/clip"]) == ["clip (1)", "clip (2)"]
    assert short_labels(["a/b/clip", "clip"]) == ["b/clip", "clip"]


def test_broken_weights_do_not_become_a_score(clip_dir, benchmark):
    tower = load_tower(str(clip_dir), "cpu")
    with torch.no_grad():
        tower.model.logit_scale.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        evaluate_tower(tower, benchmark)


def test_fp32_settings_are_put_back(clip_dir, benchmark):
    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark)
    with exact_fp32():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    after = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark)
    assert before == after


def test_patterns_go_by_position(benchmark, official_types):
    assert [p.type for p in benchmark.pairs[::15]] == list(official_types)
    assert [p.pattern for p in benchmark.pairs[::15]] == list(paper.PATTERNS)
