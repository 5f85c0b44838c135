"""Cached features of the tower: a training on them is the one without; keys, crashes, damage, replaced images."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_genhancer import machine, recipes, run
from llava_genhancer.data import records
from llava_genhancer.data.decode import BadImage
from llava_genhancer.errors import InputError
from llava_genhancer.llava import features, train
from llava_genhancer.llava.batches import build_loader
from llava_genhancer.llava.features import Features, Images, open_features
from llava_genhancer.llava.model import Llava, build_llava
from llava_genhancer.llava.recipes import LlavaRecipe
from llava_genhancer.llava.samples import read_samples

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(llava_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images of one's own, one damaged and one missing; conversations with two images, shared ones, and none."""
    folder = tmp_path_factory.mktemp("features")
    shutil.copytree(llava_data["images"], folder / "images")
    (folder / "images" / "3.png").write_bytes(b"no image")
    (folder / "images" / "6.png").unlink()
    samples = json.loads(llava_data["finetune"].read_text())
    ask = "<image> <image> what is in the picture?"
    turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": "a ball"}]
    samples[7:7] = [{"id": f"two{i}", "image": [f"{i}.png", "11.png"], "conversations": turns} for i in (0, 5)]
    (folder / "finetune.json").write_text(json.dumps(samples))
    return {"data": folder / "finetune.json", "images": folder / "images"}


def recipe_from(fields: dict, data: dict[str, Path], **changes) -> LlavaRecipe:
    own = {
        "pretrain.max_steps": 0,
        "finetune.max_steps": 3,
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "max_bad_fraction": 0.5,
    }
    own |= {"finetune.data": str(data["data"]), "finetune.image_folder": str(data["images"])}
    return recipes.override(LlavaRecipe(name="test"), {**fields, **own, **changes})


def opened(recipe: LlavaRecipe, folder: Path) -> tuple[Features, Llava]:
    """A cache, and the model that it was written with."""
    table, model = recipe.finetune, build_llava(recipe, "finetune")
    loader = build_loader(recipe, table, read_samples(table.data, table.image_folder))
    cache = open_features(recipe, "finetune", folder, loader.dataset, model, CPU, autocast=recipe.precision == "bf16")
    return cache, model


def test_images_have_numbers(llava_fields, data) -> None:
    images = Images(read_samples(data["data"], data["images"]))
    names = {f"{i}.png" for i in range(20) if i % 5 != 4}
    assert len(images) == len(names)
    assert {images(number).key for number in range(len(images))} == names
    assert all(images(images.number(name)).key == name for name in names)
    assert images(images.number("5.png")).data == str(data["images"] / "5.png")


@pytest.mark.parametrize("changes", [{}, {"finetune.packing": True, "num_workers": 1}])
def test_a_training_on_the_cache_is_the_one_without(llava_fields, data, tmp_path, monkeypatch, changes) -> None:
    """Same samples, same skips, same weights to the bit; begun anew too, and without the tower."""
    results = {}
    for cached in (False, True):
        fields = {**changes, "finetune.cache_features": cached, "cache_folder": str(tmp_path / "cache")}
        recipe = recipe_from(llava_fields, data, **fields)
        results[cached] = run.read_json(train.finetune(recipe, tmp_path / f"{cached}") / "result.json")
    assert results[True]["weights_sha256"] == results[False]["weights_sha256"]
    assert results[True]["skipped"] == results[False]["skipped"]
    assert results[True]["skipped"]["by_reason"].keys() == {"not an image", "file not found"}
    assert "vision_tower" not in results[True]["parameters"]
    monkeypatch.setattr(Llava, "tower_features", lambda *args: pytest.fail("the tower ran though all was cached"))
    again = train.finetune(recipe, tmp_path / "again")
    assert run.read_json(again / "result.json")["weights_sha256"] == results[True]["weights_sha256"]


@pytest.mark.parametrize("deepspeed", [False, True])
def test_bf16_features_give_what_the_tower_gives(llava_fields, data, tmp_path, deepspeed) -> None:
    """Under autocast, and all in bf16 without it, where even the layout of the projector's input shows."""
    recipe = recipe_from(llava_fields, data, precision="bf16")
    loader = build_loader(recipe, recipe.finetune, read_samples(data["data"], data["images"]))
    model = build_llava(recipe, "finetune", bf16_everywhere=deepspeed)
    cache = open_features(recipe, "finetune", tmp_path, loader.dataset, model, CPU, autocast=not deepspeed)
    names = ["5.png", "17.png", "2.png"]
    views = [loader.dataset.view(Image.open(data["images"] / name).convert("RGB")) for name in names]
    features = torch.stack([cache(name) for name in names])
    assert features.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=not deepspeed):
        plain = model.image_features(torch.stack(views))
        model.vision_tower = None
        assert torch.equal(model.image_features(features), plain)


def test_a_batch_without_images_needs_no_tower(llava_fields, data) -> None:
    model = build_llava(recipe_from(llava_fields, data), "finetune")
    ids = torch.arange(3, 13)[None]
    expected = model(ids, ids, None)
    model.vision_tower = None
    loss = model.train()(ids, ids, None)
    loss.backward()
    assert torch.equal(loss, model.eval()(ids, ids, None))
    assert torch.allclose(loss, expected, atol=1e-6)
    assert not model.multi_modal_projector.linear_1.weight.grad.any()


def test_folders_are_shared_by_what_the_features_depend_on(llava_fields, data, tmp_path) -> None:
    def folder(**changes) -> str:
        return opened(recipe_from(llava_fields, data, **changes), tmp_path / "cache")[0].layer.folder.name

    first = folder()
    assert folder(**{"finetune.learning_rate": 0.5, "seed": 3, "max_length": 90}) == first
    captions = tmp_path / "other.json"  # other words about the same images
    captions.write_text(data["data"].read_text().replace("colour", "color"))
    assert folder(**{"finetune.data": str(captions)}) == first
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(json.loads(captions.read_text())[:9]))
    tower = tmp_path / "tower"
    shutil.copytree(llava_fields["tower"], tower)
    state = load_file(tower / "model.safetensors")
    state["vision_model.encoder.layers.1.mlp.fc2.bias"][-1] += 1
    save_file(state, tower / "model.safetensors", metadata={"format": "pt"})
    others = [
        folder(**{"finetune.data": str(fewer)}),
        folder(vision_feature_layer=-1),
        folder(precision="bf16"),
        folder(**{"finetune.image_mode": "square"}),
        folder(tower=str(tower)),
    ]
    config = json.loads((tower / "preprocessor_config.json").read_text())
    (tower / "preprocessor_config.json").write_text(json.dumps({**config, "image_mean": [0.1, 0.2, 0.3]}))
    others.append(folder(tower=str(tower)))
    assert len({first, *others}) == 7


def test_only_units_that_are_missing_are_written(llava_fields, data, tmp_path, monkeypatch) -> None:
    for module in (records, features):
        monkeypatch.setattr(module, "CHUNK", 5)
    recipe = recipe_from(llava_fields, data)
    folder = opened(recipe, tmp_path)[0].layer.folder
    whole = {p.name: p.read_bytes() for p in folder.glob("0*")}
    assert sorted(whole) == [f"0000{i}.{s}" for i in range(4) for s in ("bin", "json")]
    (folder / "00001.json").unlink()  # a crash between the two
    (folder / "00003.partial").write_bytes(b"half")
    (folder / "00002.bin").write_bytes(whole["00002.bin"][:-1])
    before = (folder / "00000.bin").stat().st_mtime_ns
    cache, model = opened(recipe, tmp_path)
    assert {p.name: p.read_bytes() for p in folder.glob("0*.[bj]*")} == whole
    assert (folder / "00000.bin").stat().st_mtime_ns == before
    image = Image.open(data["images"] / "17.png").convert("RGB")
    pixels = build_loader(recipe, recipe.finetune, cache.images.samples).dataset.view(image)
    assert torch.equal(cache("17.png"), model.tower_features(pixels[None])[0])


def test_damage_and_replaced_images_are_refused(llava_fields, data, tmp_path) -> None:
    shutil.copytree(data["images"], tmp_path / "images")
    recipe = recipe_from(llava_fields, {**data, "images": tmp_path / "images"}, **{"finetune.cache_features": True})
    folder = tmp_path / "run" / "cache"
    cache, _ = opened(recipe, folder)
    cache("1.png")
    with pytest.raises(BadImage, match="not an image"):
        cache("3.png")
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(BadImage, match="file not found"):
        cache("1.png")
    Image.new("RGB", (90, 90)).save(tmp_path / "images" / "1.png")
    with pytest.raises(InputError, match=r"00000\.bin: record \d+ is damaged, or its image was replaced: remove"):
        cache("1.png")
    path = cache.layer.file(0, ".bin")
    stored = bytearray(path.read_bytes())
    at = cache.images.number("2.png") * cache.layer.stored_bytes + 100
    stored[at] ^= 4
    path.write_bytes(stored)
    with pytest.raises(InputError, match="is damaged"):
        cache("2.png")
    with pytest.raises(InputError, match=r"finetune\.json: .*00000\.bin: record .* remove the file"):
        train.finetune(recipe, tmp_path / "run")
    path.unlink()
    train.finetune(recipe, tmp_path / "run")


def test_a_disk_too_small_is_refused_with_the_need(llava_fields, data, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda path: 1000.0)
    words = r"the cache needs 0\.0 GiB and .* choose --cache_folder on another disk, or --finetune.cache_features false"
    with caplog.at_level("INFO"), pytest.raises(InputError, match=words):
        opened(recipe_from(llava_fields, data), tmp_path)
    assert "16 images x 2.1 KiB" in caplog.text


def test_two_ranks_write_a_share_each(llava_fields, data, tmp_path, monkeypatch) -> None:
    for module in (records, features):
        monkeypatch.setattr(module, "CHUNK", 5)
    recipe = recipe_from(llava_fields, data)
    alone, _ = opened(recipe, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        ranks.append(multiprocessing.get_context("fork").Process(target=opened, args=(recipe, tmp_path / "two")))
        ranks[-1].start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    folder = tmp_path / "two" / alone.layer.folder.name
    files = sorted(p.name for p in alone.layer.folder.glob("0*"))
    assert len(files) == 8
    assert all((folder / name).read_bytes() == (alone.layer.folder / name).read_bytes() for name in files)
