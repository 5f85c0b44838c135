"""The cache of frozen work: the loss of a training without it, its order, its keys, and what a crash leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from llava_genhancer import costs, machine, recipes, run
from llava_genhancer.data.images import open_source
from llava_genhancer.data.loader import build_loader
from llava_genhancer.data.order import sample_seed
from llava_genhancer.data.records import Layer, count_images
from llava_genhancer.data.views import TrainView
from llava_genhancer.enhance.cache_fill import open_cache
from llava_genhancer.enhance.stages import build_stage
from llava_genhancer.enhance.targets import load_target
from llava_genhancer.enhance.train import EnhanceTrainer, enhance, training_arguments
from llava_genhancer.errors import InputError

CPU = torch.device("cpu")


def opened(recipe: recipes.Recipe, folder: Path, stage: int = 1) -> Any:
    """A cache with what it was written by."""
    target = load_target(recipe)
    enhancer = build_stage(recipe, stage, target)
    return open_cache(recipe, stage, folder, open_source(recipe.data), target, enhancer, CPU), target, enhancer


def loader(source: Any, view: Any, **options: Any) -> Any:
    return build_loader(source, view, batch_size=4, seed=3, **options)


@pytest.fixture(scope="module")
def shards(images_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The forty images in three tars, one of them damaged."""
    import tarfile

    folder = tmp_path_factory.mktemp("shards")
    (bad := folder / "bad.jpg").write_bytes(b"\xff\xd8 no image")
    files = sorted(images_folder.glob("*.jpg"))
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for file in files[number::3]:
                tar.add(file, file.name)
            if number == 1:
                tar.add(bad, "bad.jpg")
    bad.unlink()
    return folder


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_loss_is_that_of_the_same_crop_and_noise_without_a_cache(
    recipe_of: Callable[..., recipes.Recipe], shards: Path, tmp_path: Path, kind: str, stage: int
) -> None:
    changes = {"data": str(shards)} if kind == "shards" else {}
    recipe = recipe_of(cache_crops=2, cache_dtype="float32", lora_dropout=0.0, **changes)
    cache, target, enhancer = opened(recipe, tmp_path, stage)
    batches = loader(cache.source, cache.view)
    args = training_arguments(recipe, stage, tmp_path / "stage", None)
    trainer = EnhanceTrainer(enhancer, args, batches, target=target, cache=cache, keep_checkpoints=2, facts={})
    view = TrainView(enhancer.backbone.image_size, recipe.crop_scale, recipe.crop_ratio)
    decoded = {s.key: s for s in all_samples(open_source(recipe.data))}
    seen: set[str] = set()
    for batch in batches:
        assert ("images" in batch["images"]) == (stage == 2), "stage 1 decodes no image"
        torch.manual_seed(5)
        cached = trainer.batch_loss(enhancer, batch, None)
        epoch = 0 if len(seen) < 40 else 1
        crops = [sample_seed(3, epoch, key) % 2 for key in batch["keys"]]
        seen.update(batch["keys"])
        if epoch == 1:  # a batch may lie on both sides of the epoch's end
            break
        images = torch.stack(
            [
                view(decoded[k].image(), sample_seed(recipe.seed, "crop", c, k))
                for k, c in zip(batch["keys"], crops, strict=True)
            ]
        )
        torch.manual_seed(5)
        plain = enhancer(enhancer.backbone.normalise(images), target.encode(images))
        assert torch.allclose(cached, plain, rtol=1e-6, atol=0)
    assert len(seen) == 40


def all_samples(source: Any) -> list[Any]:
    if hasattr(source, "shards"):
        return [s for i in range(len(source)) for s in source.read(i)]
    return [source.get(i) for i in range(len(source))]


def test_order_and_skipped_images_are_those_without_a_cache(
    recipe_of: Callable[..., recipes.Recipe], shards: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(cache_crops=3, data=str(shards))
    cache, _, _ = opened(recipe, tmp_path)
    plain = loader(open_source(str(shards)), TrainView(32), shuffle_block=7)
    cached = loader(cache.source, cache.view, shuffle_block=7)
    ours, theirs = iter(cached), iter(plain)
    assert [next(ours)["keys"] for _ in range(25)] == [next(theirs)["keys"] for _ in range(25)]
    assert cached.report().to_dict() == plain.report().to_dict()
    assert plain.report().skipped > 1


def test_each_epoch_may_take_another_crop(recipe_of: Callable[..., recipes.Recipe], tmp_path: Path) -> None:
    cache, _, _ = opened(recipe_of(cache_crops=3), tmp_path)
    sample = cache.source.get(0)
    records = [cache.view(sample, seed)["targets"] for seed in range(6)]
    assert torch.equal(records[0], records[3])
    assert not torch.equal(records[0], records[1])
    assert not torch.equal(records[1], records[2])


def test_half_precision_is_near(recipe_of: Callable[..., recipes.Recipe], tmp_path: Path) -> None:
    exact, _, _ = opened(recipe_of(cache_crops=1, cache_dtype="float32"), tmp_path)
    half, _, _ = opened(recipe_of(cache_crops=1), tmp_path)
    names = ("targets", "tokens")
    for name in names:
        a, b = (c.numbers(default_collate([c.view(c.source.get(0), 0)]), name) for c in (exact, half))
        assert b.dtype == torch.float32
        assert torch.allclose(a, b, rtol=2**-11, atol=2**-24)
    assert half.view.layers["targets"].record_bytes * 2 == exact.view.layers["targets"].record_bytes
    # The log-variance is half of a record; a posterior's mean alone needs none of it.
    mean, _, _ = opened(recipe_of(cache_crops=1, vae_posterior="mean"), tmp_path)
    assert mean.view.layers["targets"].record_bytes * 2 == half.view.layers["targets"].record_bytes


def test_ids_of_the_discrete_denoiser_come_back(
    masked_recipe_of: Callable[..., recipes.Recipe], tmp_path: Path
) -> None:
    cache, target, _ = opened(masked_recipe_of(cache_crops=1), tmp_path)
    sample = cache.source.get(5)
    ids = cache.numbers(default_collate([cache.view(sample, 0)]), "targets")
    image = cache.view.crop(sample.pixels(), sample.key, 0)
    assert ids.dtype == torch.long
    assert torch.equal(ids, target.encode(image[None]))


def test_folders_are_shared_by_what_they_depend_on(
    recipe_of: Callable[..., recipes.Recipe], tmp_path: Path, tiny_siglip: Path
) -> None:
    def folders(**changes: Any) -> tuple[str, str]:
        layers = opened(recipe_of(cache_crops=1, **changes), tmp_path)[0].view.layers
        return layers["targets"].folder.name, layers["tokens"].folder.name

    targets, tokens = folders()
    assert folders(**{"stage1.learning_rate": 0.5, "denoiser_layers": 2}) == (targets, tokens)
    assert folders(seed=1)[0] != targets
    assert folders(crop_scale="0.5,1")[0] != targets
    assert folders(condition="locals")[0] == targets
    assert folders(condition="locals")[1] != tokens
    resized = folders(image_size=48)
    assert resized[0] != targets
    siglip = folders(backbone=str(tiny_siglip), image_size=48)  # another eye on the same crops
    assert siglip[0] == resized[0]
    assert siglip[1] != resized[1]


def test_only_units_that_are_missing_are_written(
    recipe_of: Callable[..., recipes.Recipe], shards: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(cache_crops=1, data=str(shards))
    folder = opened(recipe, tmp_path)[0].view.layers["targets"].folder
    whole = {p.name: p.read_bytes() for p in folder.glob("0*")}
    assert sorted(whole) == [f"0000{i}.{s}" for i in range(3) for s in ("bin", "json")]
    (folder / "00001.json").unlink()  # a crash between the two
    (folder / "00001.partial").write_bytes(b"half")
    (folder / "00002.bin").write_bytes(b"short")
    before = (folder / "00000.bin").stat().st_mtime_ns
    state = torch.get_rng_state()
    opened(recipe, tmp_path)
    assert {p.name: p.read_bytes() for p in folder.glob("0*")} == whole
    assert (folder / "00000.bin").stat().st_mtime_ns == before
    assert torch.equal(torch.get_rng_state(), state), "training draws from the global RNG"


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_crops": 2},
        {"cache_crops": 3, "cache_dtype": "float32", "vae_posterior": "mean", "condition": "locals"},
        {"cache_crops": 1, "image_size": 48, "condition": "pooled"},
        {"cache_crops": 1, "stage1.trains": "backbone,projector,denoiser"},
        {"cache_crops": 1, "backbone": "SIGLIP", "condition": "locals"},
        {"cache_crops": 2, "denoiser": "masked"},
    ],
)
def test_the_forecast_is_what_is_written(
    recipe_of: Callable[..., recipes.Recipe],
    masked_recipe_of: Callable[..., recipes.Recipe],
    tiny_siglip: Path,
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    """Counted from the recipe alone: the kinds, each record's bytes, and with the number of images the files' size."""
    make = masked_recipe_of if "denoiser" in changes else recipe_of
    recipe = make(**{name: str(tiny_siglip) if value == "SIGLIP" else value for name, value in changes.items()})
    cache, _, _ = opened(recipe, tmp_path)
    facts = costs.facts_of(recipe)
    assert facts is not None
    kinds = costs.cache_records(recipe, *facts)
    layers = cache.view.layers
    assert {n: r.record_bytes for n, r in kinds.items()} == {n: layer.record_bytes for n, layer in layers.items()}
    for name, records in kinds.items():
        written = sum(p.stat().st_size for p in layers[name].folder.glob("*.bin"))
        assert records.size(count_images(open_source(str(recipe.data)))) == written


def test_refusals(
    recipe_of: Callable[..., recipes.Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    recipe = recipe_of(cache_crops=2)
    monkeypatch.setattr(machine, "free_bytes", lambda path: 1000.0)
    with caplog.at_level("INFO"), pytest.raises(InputError, match="--cache_folder on another disk"):
        opened(recipe, tmp_path)
    assert "about 40 images x 2 crops x 2.0 KiB" in caplog.text  # 2 moments x 4 channels x 16 x 16 of two bytes
    with pytest.raises(InputError, match="fresh second view"):
        recipe_of(cache_crops=1, objective="contrast")
    with pytest.raises(InputError, match="must not be negative"):
        recipe_of(cache_crops=-1)


def test_a_backbone_that_learned_is_not_cached(recipe_of: Callable[..., recipes.Recipe]) -> None:
    assert [recipe_of().frozen_backbone(s) for s in (1, 2)] == [True, False]
    late = {"stage1.trains": "backbone", "stage2.trains": "projector"}
    assert [recipe_of(**late).frozen_backbone(s) for s in (1, 2)] == [False, False]
    assert recipe_of(**late, **{"stage1.max_steps": 0}).frozen_backbone(2)


class Crash(BaseException):
    """Stands for kill -9."""


def test_a_training_on_a_cache_resumes_exactly(
    recipe_of: Callable[..., recipes.Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"stage1.max_steps": 4, "stage1.save_steps": 2, "stage2.max_steps": 2, "stage2.snapshot_steps": ""}
    recipe = recipe_of(cache_crops=2, cache_folder=str(tmp_path / "shared"), sample_images=0, **short)
    enhance(recipe, tmp_path / "whole")
    read = Layer.numbers
    calls = 0

    def fails(self: Any, records: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 * 2 * 3:  # two layers, two micro-batches: in step 3 of stage 1
            raise Crash
        return read(self, records)

    monkeypatch.setattr(Layer, "numbers", fails)
    with pytest.raises(Crash):
        enhance(recipe, tmp_path / "resumed")
    enhance(recipe, tmp_path / "resumed")
    for name in ("stage1/weights.safetensors", "stage2/weights.safetensors", "tower/model.safetensors"):
        assert run.sha256(tmp_path / "whole" / name) == run.sha256(tmp_path / "resumed" / name)
