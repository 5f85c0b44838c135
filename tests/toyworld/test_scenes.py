"""The toy world: one detail per pair, disjoint splits, the same pictures every time."""

from dataclasses import fields
from random import Random

import numpy as np
import pytest

from llava_genhancer.errors import InputError
from llava_genhancer.toyworld import scenes

NAMED = [field.name for field in fields(scenes.Scene) if field.name != "jitter"]


def test_the_world_has_mmvps_nine_patterns_and_every_detail_belongs_to_one():
    assert len(scenes.PATTERNS) == 9
    assert sorted(d for pattern in scenes.PATTERNS for d in pattern.details) == sorted(scenes.DETAILS)
    assert set(NAMED) == set(scenes.COARSE) | set(scenes.DETAILS)


def test_scenes_pictures_and_captions_follow_from_the_seed_alone():
    def draw(seed: int) -> list[tuple[scenes.Scene, str, bytes]]:
        rng = Random(seed)
        drawn = [scenes.sample_scene(rng) for _ in range(20)]
        return [(s, scenes.caption(s, rng, 0.3), scenes.render(s).tobytes()) for s in drawn]

    assert draw(4) == draw(4)
    assert draw(4) != draw(5)


def test_every_value_is_drawn_about_equally_often():
    rng = Random(0)
    drawn = [scenes.sample_scene(rng) for _ in range(4000)]
    for name, values in (scenes.COARSE | scenes.DETAILS).items():
        shares = [sum(getattr(scene, name) == value for scene in drawn) / len(drawn) for value in values]
        assert all(abs(share - 1 / len(values)) < 0.04 for share in shares), name


@pytest.mark.parametrize("pattern", scenes.PATTERNS, ids=lambda pattern: pattern.type)
def test_a_pair_differs_in_exactly_one_detail_in_scene_statement_and_picture(pattern):
    rng = Random(1)
    for _ in range(40):
        first, first_statement, second, second_statement = scenes.pair(pattern, rng, "dev")
        differing = [name for name in NAMED if getattr(first, name) != getattr(second, name)]
        assert len(differing) == 1
        assert differing[0] in pattern.details
        assert first.jitter == second.jitter
        assert first.split() == second.split() == "dev"
        assert first_statement != second_statement
        assert scenes.phrase(first, differing[0]) in first_statement
        pixels = [np.asarray(scenes.render(scene)).astype(int) for scene in (first, second)]
        changed = np.abs(pixels[0] - pixels[1]).max(axis=-1) > 40
        assert changed.sum() >= 8, f"{first_statement} / {second_statement}: a detail too small to see"


def test_a_detail_shows_wherever_it_is():
    """Every value of every detail changes the picture, whatever the rest of the scene."""
    rng = Random(2)
    for pattern in scenes.PATTERNS:
        for _ in range(60):
            first, _, second, _ = scenes.pair(pattern, rng)
            assert scenes.render(first).tobytes() != scenes.render(second).tobytes()


def test_splits_share_no_scene_and_ignore_the_jitter():
    rng = Random(3)
    keys = {split: {scenes.sample_scene(rng, split).key() for _ in range(1500)} for split in scenes.SPLITS}
    assert not keys["train"] & keys["dev"]
    assert not keys["train"] & keys["test"]
    assert not keys["dev"] & keys["test"]
    scene = scenes.sample_scene(rng)
    moved = scenes.Scene(**{name: getattr(scene, name) for name in NAMED}, jitter=(0.01, 0.01))
    assert moved.key() == scene.key()


def test_captions_are_true_and_name_details_as_rarely_as_asked():
    rng = Random(5)
    named = 0
    for _ in range(500):
        scene = scenes.sample_scene(rng)
        text = scenes.caption(scene, rng, 0.1)
        assert f"{scene.shape} critter" in text
        named += scenes.phrase(scene, "letter") in text
        everything = scenes.caption(scene, rng, 10.0)
        assert all(scenes.phrase(scene, detail) in everything for detail in scenes.DETAILS if detail != "colour")
    assert 25 <= named <= 80


def test_any_size_can_be_rendered():
    scene = scenes.sample_scene(Random(0))
    for size in (24, 48, 64, 224):
        image = scenes.render(scene, size)
        assert image.size == (size, size)
        assert image.mode == "RGB"


def test_an_unknown_split_is_a_clear_error():
    with pytest.raises(InputError, match="train, dev, test"):
        scenes.sample_scene(Random(0), "validation")
