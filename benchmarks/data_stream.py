"""The data stream beside plain webdataset + torchvision: images per second of one worker, memory, start-up.

Tar shards of JPEGs go through decode, RandomResizedCrop and both normalisations (the backbone's and the VAE's) in one
process without workers, as one data worker does it. The two take turns, some batches each, so that other work on the
machine meets both. Then our stream reads 1, 10, 100 and 1 000 shards of the same images, and lists of up to a hundred
million samples begin: memory and start-up must not grow with them. Last, what opening a source of each kind takes in
CPU time, which is little but for those that must be listed (a folder) or read through (a JSON).

    python benchmarks/data_stream.py                       # about a minute
"""

# ruff: noqa: E402 - the path is set before the imports that need it
from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch
from enhance_step import write_shards
from measure import copy_rate, machine, peak_bytes, timed
from torch import Tensor

from llava_genhancer.data.images import IndexedSource, RawSample, ShardSource, open_source
from llava_genhancer.data.loader import build_loader
from llava_genhancer.data.views import TrainView

BATCH = 16
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
CPU = torch.device("cpu")


def normalised(images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 crops for the backbone and for the VAE, as training computes them on the device."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std), images.float().div_(127.5).sub_(1)


def ours(folder: Path, size: int) -> Iterator[Any]:
    """Our stream."""
    loader = build_loader(open_source(str(folder)), TrainView(size), batch_size=BATCH, shuffle_block=64)
    for batch in loader:
        yield normalised(batch["images"])


def plain(folder: Path, size: int) -> Iterator[Any]:
    """webdataset + torchvision as a training script has it: one crop, two normalisations per image."""
    import webdataset
    from torchvision.transforms import InterpolationMode, Normalize, RandomResizedCrop, ToTensor

    crop = RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=InterpolationMode.BICUBIC)
    tensor, eye, vae = ToTensor(), Normalize(MEAN, STD), Normalize((0.5,) * 3, (0.5,) * 3)

    def both(image: Any) -> tuple[Tensor, Tensor]:
        pixels = tensor(crop(image))
        return eye(pixels), vae(pixels)

    shards = sorted(map(str, folder.glob("*.tar")))
    stream = webdataset.WebDataset(shards, shardshuffle=False, resampled=True)
    yield from stream.shuffle(64).decode("pil").to_tuple("jpg").map_tuple(both).map(lambda x: x[0]).batched(BATCH)


def images_per_second(folder: Path, size: int, rounds: int) -> dict[str, Any]:
    """Both streams in turn, four batches each time."""
    makers: dict[str, Callable[[Path, int], Iterator[Any]]] = {"ours": ours, "webdataset + torchvision": plain}
    streams = {name: make(folder, size) for name, make in makers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    for number in range(-1, rounds):
        for name, stream in streams.items():
            started = time.perf_counter()
            for _ in range(4):
                next(stream)
            if number >= 0:
                seconds[name].append((time.perf_counter() - started) / (4 * BATCH))
    pairs = zip(seconds["webdataset + torchvision"], seconds["ours"], strict=True)
    return {
        "per_worker": {name: 1 / statistics.median(times) for name, times in seconds.items()},
        "ratio": statistics.median(theirs / mine for theirs, mine in pairs),
    }


def decode_floor(folder: Path, size: int) -> float:
    """Images per second if nothing but PIL's decoder ran, and copying the pixels there and back at the copy rate."""
    import io

    from PIL import Image

    samples = [s.data for s in ShardSource(sorted(map(str, folder.glob("*.tar")))).read(0)]
    files = [data for data in samples if isinstance(data, bytes)]
    decode = statistics.median(
        timed(lambda: [Image.open(io.BytesIO(f)).load() for f in files], CPU, repeats=3, warmup=1)
    )
    return 1 / (decode / len(files) + 3 * size * size * (1 + 2 * 4) / copy_rate(CPU))


def memory_by_shards(folder: Path, size: int, counts: tuple[int, ...]) -> dict[str, int]:
    """Resident bytes after 30 batches of streams over so many shards (links to the same files)."""
    shards = sorted(folder.glob("*.tar"))
    found = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            for i in range(count):
                os.symlink(shards[i % len(shards)], Path(place) / f"{i:05}.tar")
            stream = ours(Path(place), size)
            for _ in range(30):
                next(stream)
            found[str(count)] = resident_bytes()
            stream.close()  # type: ignore[attr-defined]
    return found


def resident_bytes() -> int:
    """What the process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(work: Callable[[], object]) -> float:
    """Median CPU time of three calls after a first: nothing waits here, and other work does not show."""
    work()
    seconds = []
    for _ in range(3):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def start_up(folder: Path, size: int, counts: tuple[int, ...]) -> dict[str, float]:
    """CPU seconds from a source of so many samples to its first batch."""
    first = next(iter(ShardSource(sorted(map(str, folder.glob("*.tar")))).read(0)))

    def get(index: int) -> RawSample:
        return RawSample(str(index), first.data)

    def begin(count: int) -> None:
        next(iter(build_loader(IndexedSource(count, get), TrainView(size), batch_size=BATCH)))

    return {str(n): cpu_seconds(lambda n=n: begin(n)) for n in counts}  # type: ignore[misc]


def opening(folder: Path, counts: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """CPU seconds to open a source of so many samples (of tar shards: so many shards), by kind."""
    import datasets

    shard = next(folder.glob("*.tar"))
    image = next(iter(ShardSource([str(shard)]).read(0))).data
    assert isinstance(image, bytes)
    datasets.disable_progress_bars()
    found: dict[str, dict[str, float]] = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            names = [f"{i // 1000:04}/{i:08}.jpg" for i in range(count)]
            for part in ("tar", "saved", *sorted({f"images/{name[:4]}" for name in names})):
                (root / part).mkdir(parents=True)
            (root / "one.jpg").write_bytes(image)
            for i, name in enumerate(names):
                os.symlink(shard, root / "tar" / f"{i:08}.tar")
                os.link(root / "one.jpg", root / "images" / name)
            talk = [{"from": "human", "value": "<image>\n" + "word " * 20}, {"from": "gpt", "value": "word " * 60}]
            entries = [{"id": name, "image": name, "conversations": talk * 2} for name in names]
            (root / "llava.json").write_text(json.dumps(entries))
            rows = [{"bytes": content, "path": None} for content in (image, *[b"x"] * (count - 1))]  # one is decoded
            features = datasets.Features({"image": datasets.Image()})
            datasets.Dataset.from_dict({"image": rows}, features).save_to_disk(str(root / "saved"))
            sources = {
                "tar shards": ("tar", None),
                "saved dataset": ("saved", None),
                "folder": ("images", None),
                "LLaVA JSON": ("llava.json", str(root / "images")),
            }
            for kind, (name, images) in sources.items():
                seconds = cpu_seconds(lambda path=str(root / name), images=images: open_source(path, images))  # type: ignore[misc]
                found.setdefault(kind, {})[str(count)] = seconds
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000, 1_000_000, 100_000_000])
    parser.add_argument("--opened", type=int, nargs="+", default=[1_000, 20_000])
    parser.add_argument("--output", metavar="JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_shards(folder, 256, args.size * 3 // 2)
        result: dict[str, Any] = images_per_second(folder, args.size, args.rounds)
        result["floor"] = decode_floor(folder, args.size)
        result["resident_bytes_by_shards"] = memory_by_shards(folder, args.size, tuple(args.shards))
        result["start_up_s_by_samples"] = start_up(folder, args.size, tuple(args.samples))
        result["open_s_by_kind"] = opening(folder, tuple(args.opened))
    result |= {"image_size": args.size, "machine": machine(CPU), "peak_bytes": peak_bytes(CPU)}
    for name, rate in result["per_worker"].items():
        print(f"{name:28}{rate:8.1f} images/s a worker, {rate / result['floor']:.0%} of what decoding alone allows")
    print(f"ours to theirs, median of pairs: {result['ratio']:.2f}")
    for name, size in result["resident_bytes_by_shards"].items():
        print(f"{name:>5} shards: {size / 2**20:.0f} MiB resident")
    for name, seconds in result["start_up_s_by_samples"].items():
        print(f"{name:>9} samples: first batch after {seconds * 1e3:.0f} ms of CPU time")
    for kind, counts in result["open_s_by_kind"].items():
        print(f"{kind}: open after " + ", ".join(f"{s * 1e3:.0f} ms ({n})" for n, s in counts.items()))
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
