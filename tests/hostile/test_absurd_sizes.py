"""Sizes that no machine has are refused from counts: at once, before the VAE, and in one line."""

import time

import pytest

from llava_genhancer.enhance import size as sizes
from llava_genhancer.enhance import train
from llava_genhancer.enhance.size import check_size
from llava_genhancer.errors import InputError
from llava_genhancer.recipes import RECIPES, Recipe, get_recipe, override

MEMORY = "of main memory are free"


@pytest.mark.parametrize("name", ["tiny", "openai-l14-224"])
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("denoiser_layers", 10**9, MEMORY),
        ("denoiser_single_layers", 10**9, MEMORY),
        ("denoiser_heads", 10**12, MEMORY),
        ("vec_dim", 10**9, MEMORY),
        ("txt_dim", 10**12, MEMORY),
        ("lora_rank", 10**12, MEMORY),
        ("per_device_batch_size", 10**12, "per_device_batch_size=1000000000000"),
        ("sample_images", 10**12, "sample_images=1000000000000"),
        ("image_size", 112 * 10**8, MEMORY),
        ("image_size", 47, "image_size=47 is not a multiple of the backbone's patch"),
        ("target_size", 47, "target_size=47 is not a multiple of"),
    ],
)
def test_a_size_that_cannot_work(name: str, field: str, value: int, words: str) -> None:
    recipe = override(get_recipe(name), {field: value})
    started = time.process_time()
    with pytest.raises(InputError, match=words) as caught:
        check_size(recipe)
    assert time.process_time() - started < 10, "most of it imports"
    assert len(str(caught.value)) < 300


def test_every_recipe_passes_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "host_memory", lambda: 64.0 * 2**30)
    for name in RECIPES:
        check_size(get_recipe(name))


def test_room_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's 1.31 B denoiser beside CLIP's 0.3 B is 6.1 GiB in fp32."""
    recipe = get_recipe("openai-l14-224")
    monkeypatch.setattr(sizes, "host_memory", lambda: 7.0 * 2**30)
    check_size(recipe)
    monkeypatch.setattr(sizes, "host_memory", lambda: 5.0 * 2**30)
    with pytest.raises(InputError, match=r"1\.6.e\+09 parameters, 6\.\d+ GiB, and 5 GiB of main memory are free"):
        check_size(recipe)


def test_nothing_is_loaded_before(tiny_fields: dict, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("weights were loaded first")

    monkeypatch.setattr(train, "load_target", load)
    for change in ({"image_size": 34}, {"vec_dim": 10**9}):
        recipe = override(Recipe(), {**tiny_fields, **change})
        with pytest.raises(InputError):
            train.enhance(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
