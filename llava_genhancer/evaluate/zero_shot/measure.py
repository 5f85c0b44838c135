"""Zero-shot classification and retrieval of any tower: what vision-only tuning may cost (paper section 4.3, Table 3).

Legend: B images in a batch, N images, T captions, C classes, D width of the shared space.

As clip_benchmark measures: a class is the normalised mean of its prompts' normalised embeddings, an image gets the
class nearest to it; recall@5 is the share of captions (images) that have their image (one of their captions) among the
five nearest. All in fp32, where clip_benchmark's default is autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import comb
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mmvp.measure import output_path, short_labels
from llava_genhancer.evaluate.tower import Tower, exact_fp32
from llava_genhancer.evaluate.towers import choose_device, load_tower
from llava_genhancer.evaluate.zero_shot.data import Classification, Images, Retrieval, ZeroShotSet
from llava_genhancer.evaluate.zero_shot.layouts import load_sets
from llava_genhancer.evaluate.zero_shot.results import (
    IMAGE_RECALL,
    TEXT_RECALL,
    TOP1,
    Answers,
    Store,
    TowerAnswers,
    results_to_dict,
)
from llava_genhancer.evaluate.zero_shot.table3 import plain_table
from llava_genhancer.files import expand
from llava_genhancer.run import write_json

K = 5  # of recall@K
READERS = 8  # threads that decode


def run(
    towers: Sequence[str],
    data: Sequence[str | Path],
    output: str | Path | None = None,
    batch_size: int = 64,
    device: str | None = None,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The command ``zero-shot``: measure every tower on every data set, print the table, write JSON.

    Args:
        towers: folders or hub ids; the others are compared with the first.
        data: data sets' folders, or folders of such.
        output: JSON to write, or a folder for ``zero_shot.json``. Beside it, in a folder of the JSON's name, each
            tower's answers to each set are written as they come; what is there is not measured again.
        labels: names for the tables, one per tower; default: as much of each path as tells them apart.

    Returns:
        What the JSON holds.

    Raises:
        InputError: anything wrong with what was given; before a weight is loaded where that can be known.
    """
    if not towers:
        raise InputError("no tower given: name at least one folder or hub id")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    if labels is not None and len(labels) != len(towers):
        raise InputError(f"{len(labels)} labels for {len(towers)} towers: give one each")
    chosen = choose_device(device)
    target = output_path(Path(expand(output)), "zero_shot.json") if output is not None else None
    sets = load_sets(data)
    store = Store(target.with_suffix("") if target else None)
    found = []
    for name, label in zip(towers, labels or short_labels(towers), strict=True):
        tower = load_tower(name, chosen)
        found.append(evaluate_tower(tower, sets, label=label, store=store, batch_size=batch_size, progress=True))
    measured = results_to_dict(found, list(map(facts, sets)))
    print(f"Zero-shot, percent\n\n{plain_table(found)}")
    if target is not None:
        write_json(target, measured)
        print(f"\nresults: {target}")
    return measured


def evaluate_tower(
    tower: Tower,
    sets: Sequence[ZeroShotSet],
    *,
    label: str | None = None,
    store: Store | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> TowerAnswers:
    """Measure one tower on every data set; what ``store`` has of it is taken from there.

    Raises:
        InputError: an image cannot be decoded, embeddings are not finite, or a set has fewer than five images.
    """
    store = store or Store(None)
    answers: list[Answers] = []
    for data in sets:
        found = store.get(tower.weights, data.name, data.sha256)
        if found is None:
            if isinstance(data, Classification):
                found = classify(tower, data, batch_size, progress)
            else:
                found = retrieve(tower, data, batch_size, progress)
            store.put(tower.weights, found)
        answers += found
    backbone = tower.backbone.recipe if tower.backbone else None
    made = tower.recipe, backbone, tower.weights, tower.method, tower.source
    return TowerAnswers(tower.name, label or tower.name, tuple(answers), *made)


def facts(data: ZeroShotSet) -> dict[str, Any]:
    """What the results say of a data set."""
    known = {"name": data.name, "path": str(data.path), "sha256": data.sha256, "images": len(data.images)}
    if isinstance(data, Classification):
        return {**known, "classes": len(data.classes), "classes_from": data.named, "templates": list(data.templates)}
    return {**known, "captions": sum(map(len, data.captions))}


def classify(tower: Tower, data: Classification, batch_size: int = 64, progress: bool = False) -> list[Answers]:
    """Top-1 accuracy."""
    classes = classifier(tower, data, batch_size, progress)
    truth = torch.tensor(data.labels)
    with exact_fp32():
        given = torch.cat([(x @ classes.T).argmax(1).cpu() for x in embed(tower, data, batch_size, progress)])
    units = tuple((x,) for x in (given == truth).tolist())
    return [Answers(data.name, TOP1, data.sha256, units, 100 / len(data.classes))]


def classifier(tower: Tower, data: Classification, batch_size: int = 64, progress: bool = False) -> Tensor:
    """One unit vector per class (C, D) on the tower's device: the mean of its prompts' unit vectors, normalised."""
    prompts = [p for i in range(len(data.classes)) for p in data.prompts(i)]
    each = _text_vectors(tower, prompts, data.name, batch_size, progress)
    return F.normalize(each.view(len(data.classes), len(data.templates), -1).mean(1), dim=-1)


def retrieve(tower: Tower, data: Retrieval, batch_size: int = 64, progress: bool = False) -> list[Answers]:
    """Recall@5 both ways by clip_benchmark's own function, kept per image.

    Raises:
        InputError: fewer than five images, or clip_benchmark is not installed.
    """
    try:
        from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
    except ImportError:
        raise InputError(
            "clip_benchmark is not installed: pip install -e '.[eval]' in a clone of llava_genhancer"
        ) from None
    if len(data.images) < K:
        raise InputError(f"{data.path} has {len(data.images)} images: recall@{K} needs {K}")
    captions = [text for texts in data.captions for text in texts]
    sizes = [len(texts) for texts in data.captions]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    texts = _text_vectors(tower, captions, data.name, batch_size, progress).cpu()
    images = torch.cat([x.cpu() for x in embed(tower, data, batch_size, progress)])
    with exact_fp32():
        scores = texts @ images.T  # (T, N)
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(owner)), owner] = True
    of_image = (batchify(recall_at_k, scores, positive, batch_size, tower.device, k=K) > 0).tolist()
    of_text = (batchify(recall_at_k, scores.T, positive.T, batch_size, tower.device, k=K) > 0).tolist()
    hits = iter(of_image)
    by_image = tuple(tuple(next(hits) for _ in range(n)) for n in sizes)
    guess = [1 - comb(len(owner) - n, K) / comb(len(owner), K) for n in sizes]
    return [
        Answers(data.name, IMAGE_RECALL, data.sha256, by_image, 100 * K / len(sizes)),
        Answers(data.name, TEXT_RECALL, data.sha256, tuple((x,) for x in of_text), 100 * sum(guess) / len(guess)),
    ]


def embed(tower: Tower, data: ZeroShotSet, batch_size: int, progress: bool = False) -> Iterator[Tensor]:
    """Unit vectors (B, D) of a data set's images on the tower's device, batch by batch, in order."""
    from tqdm import tqdm

    total, label = len(data.images), f"{Path(tower.name).name}: {data.name}"
    with tqdm(total=total, desc=label, unit="image", disable=None if progress else True, leave=False) as bar:
        for images in _decoded(data.images, batch_size):
            yield _unit(tower.image_features(images), tower)
            bar.update(len(images))


def _decoded(images: Images, batch_size: int) -> Iterator[list[Image.Image]]:
    """The images in batches, the next one being decoded while one is in use."""
    with ThreadPoolExecutor(READERS) as pool:
        ahead = None
        for start in range(0, len(images), batch_size):
            batch = [pool.submit(images.open, i) for i in range(start, min(start + batch_size, len(images)))]
            if ahead is not None:
                yield [future.result() for future in ahead]
            ahead = batch
        if ahead is not None:
            yield [future.result() for future in ahead]


def _text_vectors(tower: Tower, texts: list[str], name: str, batch_size: int, progress: bool) -> Tensor:
    """Unit vectors (len(texts), D) on the tower's device."""
    from tqdm import tqdm

    starts = range(0, len(texts), batch_size)
    label = f"{Path(tower.name).name}: {name}'s texts"
    bar = tqdm(starts, desc=label, unit="batch", disable=None if progress else True, leave=False)
    return torch.cat([_unit(tower.text_features(texts[i : i + batch_size]), tower) for i in bar])


def _unit(features: Tensor, tower: Tower) -> Tensor:
    if not torch.isfinite(features).all():
        raise InputError(f"tower {tower.name}: its embeddings are not finite, so its weights are broken")
    return F.normalize(features, dim=-1)
