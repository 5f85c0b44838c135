"""The toy world as files: caption shards, pairs as in MMVP-VLM, zero-shot sets, LLaVA's two JSON files, questions,
benchmarks."""

import csv
import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from llava_genhancer.errors import InputError
from llava_genhancer.files import staged_folder
from llava_genhancer.toyworld import benchmarks, questions, scenes, zero_shot
from llava_genhancer.toyworld.paths import cache_folder, resolve

logger = logging.getLogger(__name__)

DETAIL_PROBABILITY = 0.15
TRAIN_IMAGES = 8192
PAIRS_PER_PATTERN = 15
IMAGE_FOLDER = "MLLM_VLM Images"
HEADER = ("Question ID", "Type", "Statement")
LLAVA_IMAGES = 6400
TEXT_ONLY_SHARE = 0.05
QUESTIONS_PER_DETAIL = 120
CRITTERS_PER_CLASS = 16
CAPTIONED_IMAGES = 200


def _jpeg(image: Image.Image) -> bytes:
    # No chroma subsampling: at 48 pixels it would blur the details away.
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def write_shards(
    folder: str | Path,
    num_images: int,
    seed: int,
    per_shard: int = 1024,
    detail_probability: float = DETAIL_PROBABILITY,
) -> list[Path]:
    """Write ``num_images`` training scenes as img2dataset does: ``00000.tar``, ... of ``key.jpg``, ``.txt``, ``.json``.

    The files' bytes depend on the arguments alone. Returns the shards' paths.
    """
    if num_images < 1 or per_shard < 1:
        raise InputError(f"num_images ({num_images}) and per_shard ({per_shard}) must be at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(seed)
    shards = []
    for shard in range((num_images + per_shard - 1) // per_shard):
        path = folder / f"{shard:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for index in range(min(per_shard, num_images - shard * per_shard)):
                scene = scenes.sample_scene(rng, "train")
                text = scenes.caption(scene, rng, detail_probability)
                key = f"{shard:05d}{index:04d}"
                side = scenes.IMAGE_SIZE
                details = {name: getattr(scene, name) for name in (*scenes.COARSE, *scenes.DETAILS)}
                facts = {"key": key, "caption": text, "status": "success", "width": side, "height": side}
                members = {
                    "jpg": _jpeg(scenes.render(scene)),
                    "txt": text.encode(),
                    "json": json.dumps(facts | {"scene": details}).encode(),
                }
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        shards.append(path)
    return shards


def write_mmvp(folder: str | Path, split: str, seed: int, pairs_per_pattern: int = PAIRS_PER_PATTERN) -> Path:
    """Write a pair set of ``split`` ("dev" or "test") in MMVP-VLM's layout; 9 x 15 pairs unless told otherwise.

    ``Questions.csv`` holds two rows per pair, the patterns in MMVP's order, question ids from 1; the odd id's statement
    is true of the odd id's image. Images are ``MLLM_VLM Images/<type>/<id>.jpg``. No scene occurs twice.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(seed)
    seen: set[str] = set()
    rows: list[tuple[int, str, str]] = []
    for pattern in scenes.PATTERNS:
        images = folder / IMAGE_FOLDER / pattern.type
        images.mkdir(parents=True, exist_ok=True)
        done = 0
        while done < pairs_per_pattern:
            first, first_statement, second, second_statement = scenes.pair(pattern, rng, split)
            if first.key() in seen or second.key() in seen:
                continue
            seen |= {first.key(), second.key()}
            for scene, text in ((first, first_statement), (second, second_statement)):
                identifier = len(rows) + 1
                (images / f"{identifier}.jpg").write_bytes(_jpeg(scenes.render(scene)))
                rows.append((identifier, pattern.type, text))
            done += 1
    with open(folder / "Questions.csv", "w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return folder


def write_llava(folder: str | Path, num_images: int, seed: int) -> Path:
    """Write ``pretrain.json`` (captions) and ``finetune.json`` (conversations) in LLaVA's layout, with ``images/``.

    Both are about the same ``num_images`` training scenes. In ``finetune.json`` every image has one conversation in one
    form, and a few samples more have no image and describe their scene in words.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = Random(seed)
    captions, conversations = [], []
    for index in range(num_images):
        scene = scenes.sample_scene(rng, "train")
        name = f"{index:06d}.jpg"
        (folder / "images" / name).write_bytes(_jpeg(scenes.render(scene)))
        text = scenes.caption(scene, rng, questions.CAPTION_PROBABILITY)
        captions.append(questions.record(f"{index:06d}", [(rng.choice(questions.REQUESTS), text)], name))
        conversations.append(questions.record(f"{index:06d}", questions.conversation(scene, rng), name))
    for index in range(round(num_images * TEXT_ONLY_SHARE)):
        scene = scenes.sample_scene(rng, "train")
        conversations.append(questions.record(f"text-{index:06d}", questions.text_conversation(scene, rng)))
    rng.shuffle(conversations)
    for name, samples in (("pretrain", captions), ("finetune", conversations)):
        (folder / f"{name}.json").write_text(json.dumps(samples, indent=1))
    return folder


def write_questions(folder: str | Path, split: str, seed: int, per_detail: int) -> Path:
    """Write ``questions.json`` about fresh scenes of ``split``, with ``images/``.

    It lists ``{"id", "image", "detail", "question", "options", "answer"}``, where ``options[answer]`` is right. Every
    value of a detail is right equally often (as nearly as ``per_detail`` allows), and no scene occurs twice.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = Random(seed)
    seen: set[str] = set()
    asked: list[dict[str, Any]] = []
    for detail, values in scenes.DETAILS.items():
        for index in range(per_detail):
            while True:
                scene = scenes.sample_scene(rng, split)
                if getattr(scene, detail) == values[index % len(values)] and scene.key() not in seen:
                    break
            seen.add(scene.key())
            name = f"{len(asked):06d}.jpg"
            (folder / "images" / name).write_bytes(_jpeg(scenes.render(scene)))
            q = questions.question(scene, detail, "short", rng)
            facts = {"detail": detail, "question": q.text, "options": q.options, "answer": q.truth}
            asked.append({"id": f"{len(asked):06d}", "image": name} | facts)
    (folder / "questions.json").write_text(json.dumps(asked, indent=1))
    return folder


def _write_zero_shot(folder: Path, split: str, seed: int) -> None:
    rng, seen = Random(seed), set[str]()
    zero_shot.write_critters(folder / "critters", split, rng, seen, _jpeg, CRITTERS_PER_CLASS)
    zero_shot.write_captions(folder / "captions", split, rng, seen, _jpeg, CAPTIONED_IMAGES, DETAIL_PROBABILITY)


@dataclass(frozen=True)
class ToyWorld:
    """Folders of a prepared toy world. ``clip``, ``vae`` and ``llama`` are shipped weights, the others rendered."""

    clip: Path
    vae: Path
    llama: Path
    shards: Path
    mmvp_dev: Path
    mmvp_test: Path
    llava: Path
    questions_dev: Path
    questions_test: Path
    benchmarks: Path
    zero_shot_dev: Path
    zero_shot_test: Path


def _digest() -> str:
    """Changes whenever the code that draws or writes the world does."""
    source = b"".join(
        Path(file).read_bytes()
        for file in (scenes.__file__, questions.__file__, benchmarks.__file__, zero_shot.__file__, __file__)
    )
    return hashlib.sha256(source).hexdigest()


def _is_current(folder: Path) -> bool:
    try:
        return (folder / "world.sha256").read_text() == _digest()
    except OSError:
        return False


def _render(target: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill ``target``: all of it or nothing, whoever else is doing the same at this moment."""
    if _is_current(target):
        return
    logger.info("rendering the toy world's %s into %s", target.name, target)
    with staged_folder(target, keep=_is_current) as fresh:
        write(fresh)
        (fresh / "world.sha256").write_text(_digest())


def prepare(cache_dir: str | Path | None = None) -> ToyWorld:
    """Render what is missing of the toy world into its cache folder (see ``cache_folder``), and say where all is.

    Takes about half a minute the first time and nothing later. Safe to call from several processes at once.

    Raises:
        InputError: the cache folder cannot be written.
    """
    folder = cache_folder(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _render(folder / "shards", lambda new: write_shards(new, TRAIN_IMAGES, seed=1))
        _render(folder / "mmvp_dev", lambda new: write_mmvp(new, "dev", seed=2))
        _render(folder / "mmvp_test", lambda new: write_mmvp(new, "test", seed=3))
        _render(folder / "llava", lambda new: write_llava(new, LLAVA_IMAGES, seed=4))
        _render(folder / "questions_dev", lambda new: write_questions(new, "dev", 5, QUESTIONS_PER_DETAIL))
        _render(folder / "questions_test", lambda new: write_questions(new, "test", 6, QUESTIONS_PER_DETAIL))
        _render(folder / "benchmarks", lambda new: benchmarks.write_benchmarks(new, seed=7))
        _render(folder / "zero_shot_dev", lambda new: _write_zero_shot(new, "dev", seed=8))
        _render(folder / "zero_shot_test", lambda new: _write_zero_shot(new, "test", seed=9))
    except (OSError, InputError) as error:
        raise InputError(
            f"cannot write the toy world into {folder} ({getattr(error, 'strerror', None) or error}); "
            "set LLAVA_GENHANCER_CACHE to a folder that can be written"
        ) from error
    return ToyWorld(
        clip=Path(resolve("toyworld:clip")),
        vae=Path(resolve("toyworld:vae")),
        llama=Path(resolve("toyworld:llama")),
        shards=folder / "shards",
        mmvp_dev=folder / "mmvp_dev",
        mmvp_test=folder / "mmvp_test",
        llava=folder / "llava",
        questions_dev=folder / "questions_dev",
        questions_test=folder / "questions_test",
        benchmarks=folder / "benchmarks",
        zero_shot_dev=folder / "zero_shot_dev",
        zero_shot_test=folder / "zero_shot_test",
    )
