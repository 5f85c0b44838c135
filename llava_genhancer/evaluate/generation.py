"""Generation quality over a training, beside MMVP-VLM (the paper's Fig. 1): does a better picture mean a better eye?

Every training rebuilds the same images from the same noise as it goes on (``stageN/samples``); those pictures are
scored here, so that any finished run has its curve. MMVP-VLM is measured on the snapshots of the stage that trains the
backbone.

Legend: n images, H = W their side, h = w the side that the denoiser's target tokenizer works at.
"""

from __future__ import annotations

import dataclasses
import os
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_genhancer.data.images import ShardSource, open_source
from llava_genhancer.enhance.export import export_tower
from llava_genhancer.enhance.stages import STAGES
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mmvp.data import Benchmark, load_benchmark
from llava_genhancer.evaluate.mmvp.measure import evaluate_tower
from llava_genhancer.evaluate.report.generation_section import FIGURE, RESULT, generation_figure
from llava_genhancer.evaluate.report.seeds import spread
from llava_genhancer.evaluate.tower import Tower
from llava_genhancer.evaluate.towers import load_tower
from llava_genhancer.files import expand
from llava_genhancer.recipes import Recipe
from llava_genhancer.run import recipe_of, write_json

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Quality:
    """How near rebuilt images come to their originals.

    Attributes:
        clip_score: cosine of the original model's global tokens of an image and of its reconstruction, mean over the
            images, -1..1.
        clip_interval: Student's 95 % interval of that mean; None for one image.
        caption_score: cosine with the caption's embedding instead, None without captions. CLIPScore (arXiv 2104.08718)
            is 2.5 times its positive part.
        mse: mean squared error over pixels in [0, 1].
        psnr: ``10 log10(1 / mse)`` in dB; None where nothing differs.
    """

    clip_score: float
    clip_interval: list[float] | None
    caption_score: float | None
    mse: float
    psnr: float | None


class Judge:
    """The original model's view of the originals, computed once.

    Args:
        tower: the model before any training.
        originals: uint8 (n, 3, H, W).
        captions: one per image, or None.
    """

    def __init__(self, tower: Tower, originals: Tensor, captions: Sequence[str] | None = None):
        self.tower, self.originals = tower, originals
        self._images = self._embed(originals)
        self._texts = None if captions is None else _unit(tower.text_features(list(captions)))

    def of(self, rebuilt: Tensor) -> Quality:
        """The quality of ``rebuilt``, uint8 (n, 3, h, w); pixels are compared at the originals' size.

        Raises:
            InputError: another number of images.
        """
        if len(rebuilt) != len(self.originals):
            raise InputError(f"{len(rebuilt)} rebuilt images for {len(self.originals)} originals: draw them again")
        embedded = self._embed(rebuilt)
        scores = spread((embedded * self._images).sum(-1).tolist())
        told = None if self._texts is None else float((embedded * self._texts).sum(-1).mean())
        mse = float((_pixels(self.originals) - _pixels(rebuilt, self.originals.shape[-1])).square().mean())
        return Quality(
            clip_score=scores["mean"],
            clip_interval=scores["interval"],
            caption_score=told,
            mse=mse,
            psnr=None if mse == 0 else -10 * float(np.log10(mse)),
        )

    def _embed(self, images: Tensor) -> Tensor:
        """Unit global tokens (n, D)."""
        pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
        batches = [pictures[i : i + BATCH] for i in range(0, len(pictures), BATCH)]
        return _unit(torch.cat([self.tower.image_features(batch) for batch in batches]))


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.float().cpu(), dim=-1)


def _pixels(images: Tensor, side: int | None = None) -> Tensor:
    """fp32 in [0, 1], of side ``side``."""
    pixels = images.float() / 255
    if side is None or images.shape[-1] == side:
        return pixels
    return torch.nn.functional.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)


# --- a run's pictures ---------------------------------------------------------------------------------------------


def read_strip(path: Path) -> Tensor:
    """A strip of square images side by side as uint8 (n, 3, H, W).

    Raises:
        InputError: not a picture, or not such a strip.
    """
    try:
        with Image.open(path) as image:
            strip = torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read ({error}): remove its folder and train again for pictures") from None
    side, width = strip.shape[:2]
    if width % side:
        raise InputError(f"{path} is {width} pixels wide and {side} high: not a strip of square images")
    return strip.reshape(side, width // side, side, 3).permute(1, 3, 0, 2).contiguous()


def captions_of(recipe: Recipe, count: int) -> list[str] | None:
    """The captions of the data's first decodable images: those beside them in tar shards; None for other sources."""
    try:
        source = open_source(recipe.data or "", image_folder=recipe.image_folder)
        if not isinstance(source, ShardSource):
            return None
        keys = [key for key, _ in source.first(count)]
        found: dict[str, str] = {}
        for name, path in zip(source.names, source.shards, strict=True):
            wanted = {key for key in keys if key.startswith(f"{name}:")} - found.keys()
            if wanted:
                found |= _texts(path, name, wanted)
    except (InputError, OSError, tarfile.TarError):  # the data may have gone since the training
        return None
    return [found[key] for key in keys] if all(key in found for key in keys) else None


def _texts(path: str, name: str, wanted: set[str]) -> dict[str, str]:
    """The ``.txt`` members of a shard by their image's key, read until all are found."""
    found: dict[str, str] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            stem, suffix = os.path.splitext(member.name)
            key = f"{name}:{stem}"
            if suffix == ".txt" and key in wanted and member.isreg():
                content = archive.extractfile(member)
                assert content is not None
                found[key] = content.read().decode(errors="replace").strip()
                if len(found) == len(wanted):
                    break
    return found


def measure(run_dir: str | Path, data: str | Path | None = None, device: str | None = None) -> dict[str, Any]:
    """Score a run's pictures, measure MMVP-VLM on its snapshots, write ``eval/generation.json`` and the figure.

    Args:
        run_dir: a run of ``enhance`` that drew pictures.
        data: MMVP-VLM's folder; None leaves its curve out.

    Returns:
        What the JSON holds: ``stages`` to points ``{"step", "clip_score", ...}`` and ``mmvp_vlm``'s points
        ``{"step", "percent", "interval"}``, whose step 0 is the original.

    Raises:
        InputError: no run, no pictures, or nothing loadable.
    """
    run_dir = Path(expand(run_dir))
    recipe = recipe_of(run_dir)
    benchmark = None if data is None else load_benchmark(data)
    drawn = {stage: pictures for stage in STAGES if (pictures := _pictures(run_dir / f"stage{stage}" / "samples"))}
    if not drawn:
        raise InputError(f"{run_dir} has no pictures in stage1/samples or stage2/samples: set sample_steps above 0")
    tower = load_tower(recipe.backbone, device)
    originals = read_strip(run_dir / f"stage{min(drawn)}" / "samples" / "originals.png")
    captions = captions_of(recipe, len(originals))
    judge = Judge(tower, originals, captions)
    measured: dict[str, Any] = {
        "format": 1,
        "images": len(originals),
        "originals": dataclasses.asdict(judge.of(originals)),
        "stages": {
            str(stage): [{"step": step, **dataclasses.asdict(judge.of(read_strip(path)))} for step, path in pictures]
            for stage, pictures in drawn.items()
        },
        "mmvp_vlm": [] if benchmark is None else _mmvp(run_dir, recipe, tower, benchmark),
    }
    write_json(run_dir / RESULT, measured)
    generation_figure(measured, run_dir / "figures" / FIGURE)
    return measured


def _pictures(folder: Path) -> list[tuple[int, Path]]:
    """Steps and their strips, in order."""
    if not (folder / "originals.png").is_file():
        return []
    return sorted((int(p.stem[5:]), p) for p in folder.glob("step-*.png") if p.stem[5:].isdigit())


def _mmvp(run_dir: Path, recipe: Recipe, tower: Tower, benchmark: Benchmark) -> list[dict[str, Any]]:
    """MMVP-VLM of the original, of each snapshot and of the end, by the step of the last stage with the backbone."""
    tables = {stage: recipe.stage(stage) for stage in STAGES}
    stage = max((s for s, t in tables.items() if t.max_steps > 0 and "backbone" in t.trains), default=None)
    if stage is None:
        return [_point(0, tower, benchmark)]
    last = tables[stage].max_steps
    kept = sorted(int(p.stem[5:]) for p in (run_dir / f"stage{stage}" / "snapshots").glob("step-*.safetensors"))
    points = [_point(0, tower, benchmark)]
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".snapshot-") as scratch:
        for step in [s for s in kept if s < last]:
            snapshot = export_tower(run_dir, Path(scratch) / "tower", recipe, step=step, overwrite=True)
            points.append(_point(step, load_tower(str(snapshot), tower.device), benchmark))
    return [*points, _point(last, load_tower(str(run_dir / "tower"), tower.device), benchmark)]


def _point(step: int, tower: Tower, benchmark: Benchmark) -> dict[str, Any]:
    score = evaluate_tower(tower, benchmark).average
    return {"step": step, "percent": score.percent, "interval": [score.low, score.high]}
