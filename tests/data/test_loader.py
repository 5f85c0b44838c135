"""The stream: each sample to exactly one reader, another order each epoch, and resumes that nobody can tell."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing import encoded, picture, write_shards, write_tar
from PIL import Image
from torch import Tensor

from llava_genhancer.data.images import IndexedSource, RawSample, ShardSource, Source, open_source
from llava_genhancer.data.loader import ImageLoader, batches_of, build_loader, check_readers
from llava_genhancer.data.order import sample_seed
from llava_genhancer.data.views import TrainView
from llava_genhancer.errors import InputError

COUNTS = (5, 3, 4, 6, 2)  # images per shard
TOTAL = sum(COUNTS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSource:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, COUNTS)
    source = open_source(str(folder))
    assert isinstance(source, ShardSource)
    return source


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Source:
    root = tmp_path_factory.mktemp("folder")
    for i in range(TOTAL):
        (root / f"{i:06}.png").write_bytes(encoded(picture(i)))
    return open_source(str(root))


@pytest.fixture(params=["shards", "folder", "computed"])
def source(request, monkeypatch: pytest.MonkeyPatch) -> Source:
    """The last one is the folder in the order that large sets have."""
    if request.param == "computed":
        monkeypatch.setattr("llava_genhancer.data.loader.TABLE", 0)
    return request.getfixturevalue("folder" if request.param == "computed" else request.param)


def loader(source: Source, **options: Any) -> ImageLoader:
    return build_loader(source, TrainView(8), **{"batch_size": 2, "seed": 3, "shuffle_block": 4, **options})


def take(batches: Iterator[dict], count: int) -> list[tuple[list[str], Tensor]]:
    return [(b["keys"], b["images"]) for b in (next(batches) for _ in range(count))]


def equal(a: list[tuple[list[str], Tensor]], b: list[tuple[list[str], Tensor]]) -> bool:
    return [k for k, _ in a] == [k for k, _ in b] and all(
        torch.equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True)
    )


def all_keys(source: Source) -> list[str]:
    if isinstance(source, ShardSource):
        return [s.key for i in range(len(source)) for s in source.read(i)]
    return [source.get(i).key for i in range(len(source))]


def epochs(source: Source, reader: int, readers: int, count: int, **options: Any) -> list[list[str]]:
    """The keys that one reader sees in each of its first epochs, in order. (A rank with no workers is one reader.)"""
    stream = loader(source, rank=reader, world_size=readers, batch_size=1, **options)._loader.dataset
    seen: list[list[str]] = [[] for _ in range(count)]
    for sample in stream:
        if "problem" in sample:
            return seen
        if stream.epoch == count:
            return seen
        seen[stream.epoch].append(sample["key"])
    raise AssertionError("the stream ended")


# --- who reads what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readers", [1, 2, 3, 5, 7])  # up to a shard per reader, and more readers than shards
def test_each_sample_goes_to_exactly_one_reader_in_each_epoch(source, readers) -> None:
    shares = [epochs(source, reader, readers, 3) for reader in range(readers)]
    for epoch in range(3):
        together = Counter(key for share in shares for key in share[epoch])
        assert together == Counter(all_keys(source))


def test_ranks_and_their_workers_are_disjoint(source) -> None:
    """Two ranks with two workers each, in real processes: in one epoch's time nobody repeats another's sample."""
    per_worker: dict[tuple[int, int], list[str]] = {}
    for rank in range(2):
        batches = iter(loader(source, rank=rank, world_size=2, num_workers=2, batch_size=1))
        for number in range(2 * TOTAL):  # workers take turns
            ((key,), _) = take(batches, 1)[0]
            per_worker.setdefault((rank, number % 2), []).append(key)
    expected = {(r, w): epochs(source, 2 * r + w, 4, 1)[0] for r in range(2) for w in range(2)}
    for reader, first_epoch in expected.items():
        assert per_worker[reader][: len(first_epoch)] == first_epoch
    assert Counter(k for keys in expected.values() for k in keys) == Counter(all_keys(source))


def test_shards_of_one_image_reach_every_reader(tmp_path) -> None:
    write_shards(tmp_path, [1, 1, 1])
    source = open_source(str(tmp_path))
    shares = [epochs(source, reader, 4, 1)[0] for reader in range(4)]
    assert Counter(k for share in shares for k in share) == Counter(all_keys(source))
    write_shards(tmp_path, [2, 2, 2])
    shares = [epochs(source, reader, 4, 1)[0] for reader in range(4)]
    assert all(shares), "six images in three shards, four readers: none goes without"


def test_whole_shards_stay_with_one_reader(shards) -> None:
    """Sequential reading: with enough shards no shard is opened by two readers in one epoch."""
    owners: dict[str, set[int]] = {}
    for reader in range(3):
        for key in epochs(shards, reader, 3, 1)[0]:
            owners.setdefault(key.partition(":")[0], set()).add(reader)
    assert len(owners) == len(COUNTS)
    assert all(len(readers) == 1 for readers in owners.values())


def test_replicated_gives_every_rank_the_same_batches(source) -> None:
    ranks = [take(iter(loader(source, rank=r, world_size=4, sharding="replicated")), 2 * TOTAL) for r in (0, 3)]
    assert equal(*ranks)
    assert equal(ranks[0], take(iter(loader(source)), 2 * TOTAL))
    disjoint = [take(iter(loader(source, rank=r, world_size=4)), 2) for r in (0, 3)]
    assert not equal(*disjoint)


# --- order --------------------------------------------------------------------------------------------------------


def test_the_order_changes_by_epoch_and_seed_and_repeats_otherwise(source) -> None:
    first, second, third = epochs(source, 0, 1, 3)
    assert sorted(first) == sorted(second) == sorted(third) == sorted(all_keys(source))
    assert len({tuple(first), tuple(second), tuple(third), tuple(all_keys(source))}) == 4
    assert epochs(source, 0, 1, 3) == [first, second, third]
    assert epochs(source, 0, 1, 1, seed=4)[0] != first


def test_a_block_is_a_run_of_shards_shuffled(shards) -> None:
    """Blocks hold consecutive samples of the epoch's shard order, each once, mixed within the block alone."""
    order = epochs(shards, 0, 1, 1, shuffle_block=1)[0]  # nothing mixed: the reading order
    mixed = epochs(shards, 0, 1, 1, shuffle_block=6)[0]
    for start in range(0, TOTAL, 6):
        assert sorted(mixed[start : start + 6]) == sorted(order[start : start + 6])
    assert mixed != order
    assert sorted(epochs(shards, 0, 1, 1, shuffle_block=10_000)[0]) == sorted(order)


def test_only_the_open_shard_is_read(tmp_path) -> None:
    paths = write_shards(tmp_path, [4] * 5)
    read: list[int] = []

    class Watched(ShardSource):
        def read(self, shard: int) -> Iterator[RawSample]:
            read.append(shard)
            return super().read(shard)

    batches = iter(loader(Watched(list(map(str, paths))), shuffle_block=4, batch_size=1))
    take(batches, 4)
    assert len(set(read)) == 1
    take(batches, 1)
    assert len(set(read)) == 2


def test_crops_change_by_epoch_and_do_not_touch_the_global_generator(source) -> None:
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    seen: dict[str, list[Tensor]] = {}
    for keys, images in take(iter(loader(source, batch_size=1)), 2 * TOTAL):
        seen.setdefault(keys[0], []).append(images[0])
    assert all(len(pair) == 2 for pair in seen.values())
    assert any(not torch.equal(*pair) for pair in seen.values())
    take(iter(loader(source, num_workers=2)), 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_a_batch_is_the_views_of_its_keys(folder) -> None:
    """Recomputed from what is documented: crop seed = (seed, epoch, key)."""
    view = TrainView(8)
    for keys, images in take(iter(loader(folder)), TOTAL // 2):
        for key, image in zip(keys, images, strict=True):
            original = picture(int(Path(key).stem))
            assert torch.equal(image, view(original, sample_seed(3, 0, key)))


def test_seeds_differ_in_every_part_and_fit_63_bits() -> None:
    seeds = {sample_seed(a, b, c) for a in (0, 1, 11) for b in (0, 1, 10) for c in ("", "0", "01")}
    assert len(seeds) == 27
    assert all(0 <= s < 2**63 for s in seeds)
    assert sample_seed(1, "2") == sample_seed("1", 2) != sample_seed("12")


# --- going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "stops"), [(0, (1, 2, 3, 5, 8, 9, 10, 11, 20)), (2, (1, 4, 9, 10, 11, 17))])
def test_resume_is_exact_wherever_it_stopped(source, workers, stops) -> None:
    """Inside blocks, at their edges, inside shards, and over the epoch's edge (batches of 2, epochs of 20 samples)."""
    whole = take(iter(loader(source, num_workers=workers)), 30)
    for stop in stops:
        first = loader(source, num_workers=workers)
        before = take(iter(first), stop)
        state = first.state_dict()
        del first
        torch.manual_seed(stop)  # whatever the next process's generator is
        second = loader(source, num_workers=workers)
        second.load_state_dict(state)
        assert equal(before + take(iter(second), 30 - stop), whole), f"stopped after batch {stop}"


def test_resume_is_exact_with_fewer_shards_than_readers(shards) -> None:
    options = {"rank": 4, "world_size": 7, "batch_size": 1}
    whole = take(iter(loader(shards, **options)), 12)
    for stop in range(1, 12):
        first = loader(shards, **options)
        take(iter(first), stop)
        second = loader(shards, **options)
        second.load_state_dict(first.state_dict())
        assert equal(take(iter(second), 12 - stop), whole[stop:])


def test_a_resume_of_a_resume(shards) -> None:
    whole = take(iter(loader(shards)), 24)
    state, seen = None, []
    for _ in range(8):
        part = loader(shards)
        if state is not None:
            part.load_state_dict(state)
        seen += take(iter(part), 3)
        state = part.state_dict()
    assert equal(seen, whole)


def test_the_state_is_small(shards) -> None:
    """A handful of integers per reader: no samples, no listing."""
    import pickle

    first = loader(shards, shuffle_block=100)
    take(iter(first), 3)
    assert len(pickle.dumps(first.state_dict())) < 2_000


def test_resume_opens_no_shard_before_its_own(tmp_path) -> None:
    paths = write_shards(tmp_path, [4] * 6)
    first = loader(ShardSource(list(map(str, paths))), batch_size=1)
    take(iter(first), 17)  # four shards are through, the fifth is open
    state = first.state_dict()
    read: list[int] = []

    class Watched(ShardSource):
        def read(self, shard: int) -> Iterator[RawSample]:
            read.append(shard)
            return super().read(shard)

    second = loader(Watched(list(map(str, paths))), batch_size=1)
    second.load_state_dict(state)
    take(iter(second), 1)
    assert len(set(read)) <= 2, "the shard that was open, and the one that fills the block"


# --- what is bad --------------------------------------------------------------------------------------------------


def mixed_folder(root: Path, good: int, bad: int) -> Source:
    root.mkdir()
    for i in range(good):
        (root / f"good-{i:03}.png").write_bytes(encoded(picture(i)))
    for i in range(bad):
        (root / f"zbad-{i:03}.jpg").write_bytes(b"no image" if i % 2 else encoded(Image.new("RGB", (1, 1))))
    return open_source(str(root))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_counted_and_named(tmp_path, workers) -> None:
    source = mixed_folder(tmp_path / "mixed", 12, 3)
    images = loader(source, num_workers=workers, max_bad_fraction=0.5, batch_size=1)
    batches = take(iter(images), 200)
    assert not any(key.startswith("zbad") for keys, _ in batches for key in keys)
    report = images.report()
    assert report.read == 200 + report.skipped
    assert set(report.by_reason) == {"not an image", "smaller than 8 pixels"}
    assert set(report.keys) == {
        ("zbad-000.jpg", "smaller than 8 pixels"),
        ("zbad-001.jpg", "not an image"),
        ("zbad-002.jpg", "smaller than 8 pixels"),
    }
    assert sum(report.by_reason.values()) == report.skipped >= 3 * 12
    assert len(report.keys) <= 100


def test_the_report_goes_on_over_a_resume(tmp_path) -> None:
    source = mixed_folder(tmp_path / "mixed", 12, 3)
    whole = loader(source, max_bad_fraction=0.5)
    take(iter(whole), 40)
    first = loader(source, max_bad_fraction=0.5)
    take(iter(first), 13)
    second = loader(source, max_bad_fraction=0.5)
    second.load_state_dict(first.state_dict())
    take(iter(second), 27)
    assert second.report().to_dict() == whole.report().to_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_are_one_error(tmp_path, workers) -> None:
    source = mixed_folder(tmp_path / "mixed", 20, 10)
    with pytest.raises(
        InputError, match=r"^data: \d+ of the first \d+ images cannot be used \(.*zbad-.*max_bad_fracti"
    ):
        take(iter(loader(source, num_workers=workers)), 500)
    take(iter(loader(source, num_workers=workers, max_bad_fraction=0.9)), 200)


def test_a_share_without_any_image_is_an_error_not_a_silent_loop() -> None:
    nothing = IndexedSource(3, lambda i: RawSample(f"row {i}", None, "empty"))
    with pytest.raises(InputError, match=r"the data found no usable image in a whole pass \(.*row \d: empty"):
        take(iter(loader(nothing)), 1)
    with pytest.raises(InputError, match="reader 5 of 5 found no usable image"):
        take(iter(loader(IndexedSource(4, lambda i: RawSample(str(i), encoded(picture(i)))), rank=4, world_size=5)), 1)


def test_damaged_shards_in_the_middle_of_a_run(tmp_path) -> None:
    paths = write_shards(tmp_path, [6] * 5)
    source = open_source(str(tmp_path))
    paths[1].write_bytes(b"\xab" * 3000)
    whole = paths[3].read_bytes()
    paths[3].write_bytes(whole[: whole.index(b"000020.png") + 600])
    paths[4].unlink()
    images = loader(source, batch_size=1, max_bad_fraction=0.5)
    seen = Counter(key for keys, _ in take(iter(images), 3 * 14) for key in keys)
    expected = [*(f"00000.tar:{i:06}" for i in range(6)), *(f"00002.tar:{i:06}" for i in range(12, 18))]
    assert seen == Counter(dict.fromkeys([*expected, "00003.tar:000018", "00003.tar:000019"], 3))
    assert {key for key, _ in images.report().keys} == {"00001.tar:", "00003.tar:", "00004.tar:"}


def test_every_shard_but_none_of_its_images(tmp_path) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", encoded(picture(0)))])
    source = open_source(str(tmp_path))
    write_tar(tmp_path / "0.tar", [("a.txt", b"")])
    with pytest.raises(InputError, match="found no usable image in a whole pass"):
        take(iter(loader(source)), 1)


def test_more_readers_than_images_are_refused(folder, shards) -> None:
    for workers, world in ((TOTAL + 1, 1), (11, 2), (0, TOTAL + 1)):
        with pytest.raises(InputError, match=f"{TOTAL} images cannot be shared among"):
            check_readers(folder, num_workers=workers, world_size=world, sharding="disjoint")
    check_readers(folder, num_workers=TOTAL, world_size=1, sharding="disjoint")
    check_readers(folder, num_workers=TOTAL, world_size=8, sharding="replicated")
    check_readers(shards, num_workers=TOTAL, world_size=8, sharding="disjoint")  # found out on reading


@pytest.mark.parametrize("broken", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "socket")])
def test_a_worker_lost_while_it_hands_over_is_told_as_torch_tells_it(broken: Exception) -> None:
    """Killed in the right microsecond, a worker leaves a broken socket and no word of torch's."""

    def batches():
        yield {"keys": ["a"]}
        raise broken

    given = batches_of(batches())
    assert next(given) == {"keys": ["a"]}
    with pytest.raises(RuntimeError, match=f"DataLoader worker is gone: {type(broken).__name__}"):
        next(given)
    assert list(batches_of(iter([{"keys": []}]))) == [{"keys": []}]


# --- shards that lost images, and disks that fail -----------------------------------------------------------------


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(os.path.getsize(path) * share))


def counted(path: Path, successes: int) -> None:
    """As img2dataset leaves it beside a shard."""
    text = json.dumps({"count": successes + 3, "successes": successes, "failed_to_download": 3})
    path.with_name(f"{path.stem}_stats.json").write_text(text)


@pytest.mark.parametrize("workers", [0, 3])  # with three, each reads a part of the one shard
def test_images_lost_with_half_a_shard_count_each(tmp_path: Path, workers: int) -> None:
    (path,) = write_shards(tmp_path, [600])
    counted(path, 600)
    cut(path, 0.5)
    source = open_source(str(tmp_path))
    with pytest.raises(InputError, match=r"images cannot be used .*00000.tar:lost: unreadable shard.*max_bad_fraction"):
        take(iter(loader(source, num_workers=workers)), 600)
    images = loader(source, num_workers=workers, max_bad_fraction=0.9, batch_size=1)
    left = sum(sample.data is not None for sample in source.read(0))
    assert 280 < left < 320
    if not workers:
        take(iter(images), left + 1)
        report = images.report()
        assert (report.read, report.skipped) == (600 + 1 + report.skipped - (600 - left), report.skipped)
        assert report.by_reason["unreadable shard, or the rest of one"] >= 600 - left
        assert report.keys == [("00000.tar:lost", "unreadable shard, or the rest of one")]


def test_what_a_shard_without_statistics_lost_is_guessed_from_the_others(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [200, 200, 200])
    cut(paths[1], 0.5)
    source = ShardSource(list(map(str, paths)))
    lost = [sample for sample in source.read(1) if sample.data is None]
    assert 85 <= len(lost) <= 115
    assert lost[0].key == "00001.tar:"
    with pytest.raises(InputError, match="images cannot be used"):
        take(iter(loader(source)), 600)


@pytest.mark.parametrize("side", [200, 20])  # 2.4 MB of zeros, and 45 kB
def test_a_shard_whose_end_was_never_filled_is_not_whole(tmp_path: Path, side: int) -> None:
    """A download that reserves its room first: zeros look like a tar's end."""
    members = [(f"{i:03}.bmp", encoded(picture(i, (side, side)), "BMP")) for i in range(40)]
    path = write_tar(tmp_path / "0.tar", members)
    size = path.stat().st_size
    cut(path, 0.5)
    os.truncate(path, size)
    found = list(ShardSource([str(path)]).read(0))
    assert sum(sample.data is None for sample in found) >= 18


def test_fewer_images_than_counted_are_lost_ones_in_a_whole_shard_too(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [5])
    for successes, lost in ((5, 0), (8, 3), (2, 0), (-1, 0), (10**12, 0)):
        counted(path, successes)
        found = list(ShardSource([str(path)]).read(0))
        assert [s.problem for s in found if s.data is None] == lost * ["fewer images than 00000_stats.json counts"]
    path.with_name("00000_stats.json").write_text('["successes"]')
    assert len(list(ShardSource([str(path)]).read(0))) == 5


@pytest.mark.parametrize("block", [10 << 10, 64 << 10, 1 << 20])
def test_an_archivers_padding_is_no_loss(tmp_path: Path, block: int) -> None:
    (path,) = write_shards(tmp_path, [5])
    os.truncate(path, -(-path.stat().st_size // block) * block)
    assert all(sample.data is not None for sample in ShardSource([str(path)]).read(0))


@pytest.mark.parametrize("successes", [0, 20])
def test_statistics_below_what_a_damaged_shard_still_holds_do_not_hide_its_loss(tmp_path: Path, successes: int) -> None:
    (path,) = write_shards(tmp_path, [200])
    counted(path, successes)
    cut(path, 0.5)
    found = list(ShardSource([str(path)]).read(0))
    assert [sample.key for sample in found if sample.data is None] == ["00000.tar:"]


def test_many_damaged_shards_of_unknown_loss_are_an_error(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [3] * 12)
    source = open_source(str(tmp_path))
    for path in paths[:3]:
        path.write_bytes(b"")
    take(iter(loader(source, max_bad_fraction=0.25)), 40)
    paths[3].write_bytes(b"")
    with pytest.raises(InputError, match="4 of 12 shards are damaged, with an unknown number of images"):
        take(iter(loader(source, max_bad_fraction=0.25)), 40)
    take(iter(loader(source, max_bad_fraction=0.4)), 40)


def test_damage_is_resumed_exactly(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [40, 40, 40])
    cut(paths[1], 0.6)
    counted(paths[2], 60)
    source = ShardSource(list(map(str, paths)))
    whole = loader(source, max_bad_fraction=0.9)
    batches = take(iter(whole), 120)
    for stop in (1, 17, 40, 70, 99):
        first = loader(source, max_bad_fraction=0.9)
        take(iter(first), stop)
        second = loader(source, max_bad_fraction=0.9)
        second.load_state_dict(first.state_dict())
        assert equal(take(iter(second), 120 - stop), batches[stop:])
        assert second.report().to_dict() == whole.report().to_dict()


def faulty(kind: str, root: Path) -> Source:
    """A source in which one file answers reads with EIO, as /proc/self/mem does at its begin."""
    root.mkdir()
    if kind == "shards":
        (root / "1.tar").symlink_to("/proc/self/mem")
        write_tar(root / "0.tar", [("a.png", encoded(picture(0)))])
    else:
        (root / "b.png").symlink_to("/proc/self/mem")
        (root / "a.png").write_bytes(encoded(picture(0)))
    return open_source(str(root))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_a_failing_disk_ends_the_run_in_one_line(tmp_path: Path, kind: str, workers: int) -> None:
    source = faulty(kind, tmp_path / "data")
    with pytest.raises(
        InputError, match=r"^data .* cannot be read: Input/output error \(EIO\); check the disk"
    ) as caught:
        take(iter(loader(source, num_workers=workers, batch_size=1, max_bad_fraction=1.0)), 5)
    assert "Traceback" not in str(caught.value)


def every_descriptor() -> list[int]:
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    return held


@pytest.mark.parametrize("kind", ["shards", "folder", "parquet"])
def test_too_many_open_files_are_no_damage(tmp_path: Path, kind: str) -> None:
    if kind == "shards":
        write_shards(tmp_path, [3])
    elif kind == "folder":
        (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    else:
        import pyarrow
        from pyarrow.parquet import write_table

        write_table(pyarrow.table({"image": [encoded(picture(0))]}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path))
    batches = iter(loader(source, batch_size=1, shuffle_block=1))
    take(batches, 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 256), limits[1]))
    held = every_descriptor()
    try:
        with pytest.raises(InputError, match=r"\(EMFILE\); raise the limit on open files"):
            take(batches, 5)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_host_program_s_own_children_are_left_alone(tmp_path: Path) -> None:
    """A program that imports the loader may have children, which end as they would without it."""
    program = f"""
import multiprocessing, signal, sys, time, pathlib
import llava_genhancer.data.loader
def child():
    def end(*_):
        pathlib.Path({str(tmp_path / "ended")!r}).write_text("in order")
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    pathlib.Path({str(tmp_path / "begun")!r}).write_text("")
    time.sleep(60)
process = multiprocessing.Process(target=child, daemon=True)
process.start()
while not pathlib.Path({str(tmp_path / "begun")!r}).exists():
    time.sleep(0.01)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert (tmp_path / "ended").read_text() == "in order"


def test_a_worker_hears_its_own_process_alone(shards: ShardSource) -> None:
    """A launcher's SIGTERM goes to all processes of a job; the rank still has to save."""
    batches = loader(shards, num_workers=1)
    given = iter(batches)
    take(given, 1)
    (worker,) = batches._batches._workers
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    time.sleep(0.3)
    assert worker.is_alive()
    take(given, 30)
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
