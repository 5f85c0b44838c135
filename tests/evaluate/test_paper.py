"""Table 1 as printed: consistent with itself, and found by the names its backbones go by."""

import pytest

from llava_genhancer.evaluate.paper import BACKBONES, METHODS, PATTERNS, TABLE1, find_backbone, table1
from llava_genhancer.recipes import get_recipe


def test_every_row_is_a_whole_number_of_pairs_and_averages_to_what_is_printed():
    assert len(TABLE1) == 18
    assert len(PATTERNS) == 9
    for row in TABLE1:
        pairs = [round(p * 15 / 100) for p in row.patterns]
        assert row.patterns == tuple(round(100 * k / 15, 1) for k in pairs)
        assert row.average == pytest.approx(100 * sum(pairs) / 135, abs=0.051)


def test_backbones_are_the_recipes():
    for backbone in BACKBONES:
        assert get_recipe(backbone.recipe).backbone == backbone.hub_id


def test_lookup_by_recipe():
    assert table1("openai-l14-224", "genhancer").average == 31.9
    assert table1("siglip-so400m-384-flow", "diva").average == 38.5
    assert {table1(b.recipe, m).method for b in BACKBONES for m in METHODS} == set(METHODS)
    with pytest.raises(KeyError, match="openai-l14-224"):
        table1("tiny", "original")


@pytest.mark.parametrize(
    ("names", "recipe"),
    [
        (["openai/clip-vit-large-patch14"], "openai-l14-224"),
        (["openai/clip-vit-large-patch14-336"], "openai-l14-336"),
        (["/models/metaclip-h14-fullcc2.5b/"], "metaclip-h14-224"),
        (["/hub/models--google--siglip-so400m-patch14-384/snapshots/0123abcd"], "siglip-so400m-384"),
        (["RUN/tower", "metaclip-l14-224"], "metaclip-l14-224"),
        (["RUN/tower", "siglip-so400m-224-flow"], "siglip-so400m-224"),
        (["openai/clip-vit-large-patch14-336-mine"], None),
        (["clip-vit-large-patch14/finetuned"], None),
        (["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"], None),
        (["tiny", ""], None),
        ([], None),
    ],
)
def test_a_backbone_is_known_by_its_name_alone(names, recipe):
    found = find_backbone(names)
    assert (found.recipe if found else None) == recipe
