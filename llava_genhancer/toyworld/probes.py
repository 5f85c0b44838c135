"""What a tower's image embedding (or its patch tokens) says about each detail of a scene, read by linear probes.

A probe is multinomial logistic regression on standardised features of fresh training scenes, evaluated on fresh test
scenes: it measures whether a detail is there at all, where MMVP-VLM asks whether it is there *in the words' terms*.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from llava_genhancer.errors import InputError
from llava_genhancer.files import expand
from llava_genhancer.toyworld import models, scenes, training

logger = logging.getLogger(__name__)

FEATURES = ("embedding", "patches")


@torch.no_grad()
def extract(tower: CLIPModel, images: Tensor, features: str = "embedding", batch_size: int = 256) -> Tensor:
    """Features (N, D) of ``images``, uint8 (N, 3, H, W).

    "embedding": the projected embedding, unnormalised (what the enhancer's condition is). "patches": the patch tokens
    of hidden layer -2 (what LLaVA reads), flattened in order.
    """
    if features not in FEATURES:
        raise InputError(f"unknown features {features!r}; choose one of {', '.join(FEATURES)}")
    parts = []
    for batch in images.split(batch_size):
        pixels = training.normalise(batch, models.CLIP_MEAN, models.CLIP_STD)
        outputs = tower.vision_model(pixel_values=pixels, output_hidden_states=features == "patches")
        if features == "embedding":
            parts.append(tower.visual_projection(outputs.pooler_output))
        else:
            parts.append(outputs.hidden_states[-2][:, 1:].flatten(1))
    return torch.cat(parts)


def fit_probe(inputs: Tensor, labels: Tensor, classes: int, penalty: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with an L2 penalty: weight (D, classes) and bias (classes,).

    ``inputs`` is float (N, D), standardised; ``labels`` is long (N,). The problem is convex and L-BFGS starts from
    zero, so the result is deterministic.
    """
    weight = torch.zeros(inputs.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, history_size=8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval for a proportion, in [0, 1]."""
    share, spread = correct / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / total / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def probe_accuracy(
    train: Tensor, train_labels: dict[str, Tensor], test: Tensor, test_labels: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Per detail: accuracy on ``test``, its 95 % interval, the number of scenes and the chance level."""
    mean, deviation = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    report = {}
    for detail, values in scenes.DETAILS.items():
        weight, bias = fit_probe(train, train_labels[detail], len(values))
        correct = int(((test @ weight + bias).argmax(1) == test_labels[detail]).sum())
        low, high = wilson(correct, len(test))
        report[detail] = {
            "accuracy": correct / len(test),
            "n": len(test),
            "interval": [low, high],
            "chance": 1 / len(values),
        }
    return report


def labelled_scenes(count: int, seed: int, split: str) -> tuple[Tensor, dict[str, Tensor]]:
    """``count`` fresh scenes of ``split``: images, uint8 (N, 3, H, W), and for each detail its labels (N,)."""
    pool = training.render_pool(count, seed, split)
    rows = [scene.labels() for scene in pool.scenes]
    return pool.images, {detail: torch.tensor([row[detail] for row in rows]) for detail in scenes.DETAILS}


def run_probes(
    towers: Sequence[str | Path],
    *,
    train_scenes: int = 3000,
    test_scenes: int = 1500,
    features: str = "embedding",
    seed: int = 11,
) -> dict[str, Any]:
    """Probe one or two towers (original, then enhanced) on the same scenes; fractions, ready for JSON.

    ``towers`` are folders of CLIPModels for images of the toy world's size, or ``"toyworld:clip"``. Returns
    ``{"details": [...], "original": {detail: {"accuracy", "n", "interval": [low, high], "chance"}}, "enhanced": ...}``.

    Raises:
        InputError: more or fewer than one or two towers, or one that is not such a folder.
    """
    if not 1 <= len(towers) <= 2:
        raise InputError(f"probes compare one or two towers (original, enhanced), not {len(towers)}")
    train_images, train_labels = labelled_scenes(train_scenes, seed, "train")
    test_images, test_labels = labelled_scenes(test_scenes, seed + 1, "test")
    report: dict[str, Any] = {"details": list(scenes.DETAILS), "features": features}
    for name, folder in zip(("original", "enhanced"), towers, strict=False):
        tower = _load_tower(str(folder))
        train, test = (extract(tower, images, features) for images in (train_images, test_images))
        report[name] = probe_accuracy(train, train_labels, test, test_labels)
        logger.info("probed %s", folder)
    return report


def _load_tower(name: str) -> CLIPModel:
    folder = expand(models.resolve(name))
    try:
        tower, _ = models.load_clip(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{name} is not a folder of a CLIPModel ({str(error).splitlines()[0]})") from error
    side = tower.config.vision_config.image_size
    if side != scenes.IMAGE_SIZE:
        raise InputError(f"{name} sees images of {side} pixels; the toy world's have {scenes.IMAGE_SIZE}")
    return tower
