"""The computed order of a large set: a permutation that looks drawn, and that costs nothing to begin with."""

import itertools
import time

import pytest
import torch
from packing import encoded, picture

from llava_genhancer.data.images import IndexedSource, RawSample
from llava_genhancer.data.loader import build_loader
from llava_genhancer.data.order import TABLE, Computed, sample_seed, shuffled
from llava_genhancer.data.views import TrainView


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17, 256, 257, 1000])
@pytest.mark.parametrize("seed", [(0, 0), (0, 1), (7, 0)])
def test_every_item_has_one_place(count, seed) -> None:
    order = Computed(count, *seed)
    assert sorted(order[i] for i in range(count)) == list(range(count))


def test_it_depends_on_its_seed_alone() -> None:
    first = [Computed(10**6, 3, 4)[i] for i in range(50)]
    assert first == [Computed(10**6, 3, 4)[i] for i in range(50)]
    assert all([Computed(10**6, *seed)[i] for i in range(50)] != first for seed in ((3, 5), (4, 3), (34,)))


def test_it_looks_drawn() -> None:
    """Items of neighbouring places, and of one place under many seeds, fall into 16 equal parts as dice would."""
    count = 1_000_003
    along = [Computed(count, 1)[i] for i in range(8_000)]
    across = [Computed(count, seed)[5] for seed in range(8_000)]
    steps = [(b - a) % count for a, b in itertools.pairwise(along)]
    for values in (along, across, steps):
        counts = torch.bincount(torch.tensor(values) * 16 // count, minlength=16).double()
        chi_square = float(((counts - len(values) / 16) ** 2 / (len(values) / 16)).sum())
        assert 2 < chi_square < 45, "15 degrees of freedom"  # outside once in ten thousand


def never_ending(count: int) -> IndexedSource:
    image = encoded(picture(0))
    return IndexedSource(count, lambda index: RawSample(str(index), image))


def keys(loader, batches: int) -> list[str]:
    return [key for batch in itertools.islice(loader, batches) for key in batch["keys"]]


def test_a_set_without_end_begins_at_once() -> None:
    """A table of its order would take 8 TB."""
    started = time.process_time()
    first = build_loader(never_ending(10**12), TrainView(8), batch_size=4, seed=3, rank=5, world_size=8)
    seen = keys(first, 3)
    assert time.process_time() - started < 2
    assert seen == [str(Computed(10**12, 3, 0)[place]) for place in range(5, 5 + 12 * 8, 8)]
    second = build_loader(never_ending(10**12), TrainView(8), batch_size=4, seed=3, rank=5, world_size=8)
    second.load_state_dict(first.state_dict())
    assert keys(second, 1) == [str(Computed(10**12, 3, 0)[5 + 12 * 8 + 8 * i]) for i in range(4)]


def test_a_run_that_began_with_a_table_goes_on_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before orders were computed, a large set had a table too, and the state did not say."""
    count = 50
    table = shuffled(count, 3, 0).tolist()
    first = build_loader(never_ending(count), TrainView(8), batch_size=4, seed=3)
    assert keys(first, 2) == [str(i) for i in table[:8]]
    state = first.state_dict()
    reader = state["loader"]["dataset_state"]
    assert reader.pop("computed") == 0
    monkeypatch.setattr("llava_genhancer.data.loader.TABLE", 10)
    assert keys(build_loader(never_ending(count), TrainView(8), batch_size=4, seed=3), 2) != [str(i) for i in table[:8]]
    second = build_loader(never_ending(count), TrainView(8), batch_size=4, seed=3)
    second.load_state_dict(state)
    assert keys(second, 2) == [str(i) for i in table[8:16]]


def test_orders_of_ordinary_sets_are_what_they_were() -> None:
    """Runs from before go on in it: torch's permutation under the seed's hash."""
    assert TABLE == 1 << 20
    generator = torch.Generator().manual_seed(sample_seed(3, 1))
    assert torch.equal(shuffled(40, 3, 1), torch.randperm(40, generator=generator))
    assert sample_seed(3, 1) == 4539670453192421829
