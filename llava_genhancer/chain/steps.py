"""From a vision tower to a measured LLaVA: the steps of a preset, as commands of ``llava-genhancer``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llava_genhancer import recipes
from llava_genhancer.chain import fork
from llava_genhancer.chain.needs import Data, llava_data, needs
from llava_genhancer.errors import InputError
from llava_genhancer.files import expand
from llava_genhancer.llava import recipes as llava_recipes

# Preset to the recipe that enhances LLaVA's tower; the LLaVA recipe is called like the preset.
PRESETS = {"tiny": "tiny", "vicuna-7b": "openai-l14-336", "vicuna-13b": "openai-l14-336"}
LLAVA = "llava."  # prefix of the fields meant for LLaVA's trainings


@dataclass(frozen=True)
class Step:
    """One step of the chain.

    Attributes:
        command: words after ``llava-genhancer``, or what a fork's trainer takes.
        zero: DeepSpeed JSON of a training on GPUs; None for what runs in one process.
        result, sources: the step is skipped while ``result`` is newer than all ``sources``; without a ``result`` it is
            run every time, since our trainings know by themselves what is done.
        needs: lines for the plan.
        fork: the folder of the fork whose trainer it is.
    """

    name: str
    command: tuple[str, ...]
    zero: str | None = None
    result: Path | None = None
    sources: tuple[Path, ...] = ()
    needs: tuple[str, ...] = ()
    fork: Path | None = None

    def done_before(self) -> bool:
        if self.result is None or not self.result.exists():
            return False
        return all(s.exists() and s.stat().st_mtime <= self.result.stat().st_mtime for s in self.sources)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a user chose; the defaults are the preset's."""

    preset: str
    run_dir: Path
    recipe: str | None = None
    tower: str | None = None
    baseline: bool = False
    fork: Path | None = None
    fork_python: str = "python"
    world: int = 1
    data: str | None = None
    mmvp: str | None = None
    zero_shot: str | None = None
    llava_data: Path | None = None
    lmms_data: Path | None = None
    hostfile: str | None = None
    deepspeed: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("run_dir", "fork", "llava_data", "lmms_data"):
            if (folder := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(expand(folder)))
        for name in ("tower", "fork_python", "data", "mmvp", "zero_shot", "hostfile", "deepspeed"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, expand(path))
        if os.sep in self.fork_python:  # it is started in the fork's folder
            object.__setattr__(self, "fork_python", os.path.abspath(self.fork_python))

    @property
    def recipe_name(self) -> str:
        return self.recipe or PRESETS[self.preset]

    @property
    def gpus(self) -> bool:
        return self.preset != "tiny"


def plan(choices: Choices) -> list[Step]:
    """The steps of a preset, first to last; nothing is read or written but recipes.

    Raises:
        InputError: no such preset, or a field or an option that does not fit.
    """
    if choices.preset not in PRESETS:
        raise InputError(f"no preset '{choices.preset}': there are {', '.join(PRESETS)}")
    enhance_fields, llava_fields = split_fields(choices.fields)
    recipe = recipes.override(recipes.get_recipe(choices.recipe_name), enhance_fields)
    llava = recipes.override(llava_recipes.get_recipe(choices.preset), llava_fields)
    run_dir, original = choices.run_dir, recipe.backbone
    own = run_dir / "tower"
    if choices.tower and "tower" in llava_fields:
        raise InputError(f"--tower {choices.tower} and --llava.tower {llava_fields['tower']}: give one of them")
    tower = choices.tower or str(own.absolute() if choices.fork else own)
    measured = () if choices.tower and not _is_folder(tower) else (Path(tower),)  # a hub id does not change
    steps = []
    if choices.tower is None:
        data = ["--data", choices.data] if choices.data else []
        command = [
            "enhance",
            choices.recipe_name,
            "--output_dir",
            str(run_dir),
            *data,
            *fork.options(enhance_fields),
        ]
        steps.append(Step("enhance", tuple(command), zero="zero2"))
    if (pairs := choices.mmvp or _toy("mmvp_test", choices)) is not None:
        steps.append(_measure("mmvp", ["mmvp-vlm", original, tower, "--data", pairs], run_dir, "mmvp_vlm", measured))
    if (sets := choices.zero_shot or _toy("zero_shot_test", choices)) is not None:
        command = ["zero-shot", original, tower, "--data", sets]
        steps.append(_measure("zero-shot", command, run_dir, "zero_shot", measured))
    if choices.preset == "tiny":
        steps.append(_measure("probes", ["probes", original, tower], run_dir, "probes", measured))
    if choices.tower is None and pictured(recipe):
        scored = ("generation", str(run_dir), *(("--data", pairs) if pairs else ()))
        result = run_dir / "eval" / "generation.json"
        steps.append(Step("generation", scored, result=result, sources=tuple(map(_config, measured))))
    data_of = chosen_data(choices, llava)
    # --llava.tower replaces the enhanced tower alone: the baseline is trained with the original one.
    trained = [(run_dir, llava.tower if "tower" in llava_fields else tower, "")]
    if choices.baseline or choices.preset == "tiny":
        trained.append((run_dir / "baseline", original, "baseline-"))
    for folder, eyes, prefix in trained:
        steps += _llava(choices, llava, llava_fields, data_of, folder, eyes, prefix)
    if choices.preset == "tiny":
        form = "." if choices.fork else "hf"
        folders = [str(folder / "llava-finetune" / form) for folder, _, _ in reversed(trained)]
        words = ["questions", *folders, "--labels", "original", "enhanced", "--data", _toy("questions_test", choices)]
        steps.append(_measure("questions", words, run_dir, "questions", list(map(Path, folders))))
        steps.append(_chat(folders[-1], choices))
    steps.append(_lmms(choices, [folder for folder, _, _ in reversed(trained)]))
    steps.append(Step("report", ("report", str(run_dir))))
    return [
        replace(step, needs=tuple(needs(step.name, choices.preset, llava, data_of, choices.lmms_data)))
        for step in steps
    ]


def chosen_data(choices: Choices, llava: llava_recipes.LlavaRecipe) -> dict[str, Data]:
    """The data of both trainings: LLaVA's own, where no ``--llava.pretrain.data`` or ``image_folder`` names others."""
    data = llava_data(choices.preset, choices.llava_data)
    for name, usual in data.items():
        table = llava.step(name)
        if table.data or table.image_folder:
            json, images = Path(table.data or usual.json), Path(table.image_folder or usual.images)
            data[name] = Data(json, images, usual.folders if table.image_folder is None else (".",))
    return data


def pictured(recipe: recipes.Recipe) -> bool:
    """Whether a run draws pictures that can be scored."""
    drawn = any(stage.max_steps > 0 and stage.sample_steps > 0 for stage in (recipe.stage1, recipe.stage2))
    return drawn and recipe.sample_images > 0


def split_fields(fields: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Fields of the enhancement, and those of LLaVA's trainings (``llava.NAME``); ``seed`` goes to both."""
    llava = {name.removeprefix(LLAVA): value for name, value in fields.items() if name.startswith(LLAVA)}
    ours = {name: value for name, value in fields.items() if not name.startswith(LLAVA)}
    known, theirs = recipes.field_types(recipes.Recipe), recipes.field_types(llava_recipes.LlavaRecipe)
    for name in ours:
        if name not in known and name in theirs:
            raise InputError(f"--{name} is a field of LLaVA's trainings: write --{LLAVA}{name}")
    return ours, ({"seed": ours["seed"]} if "seed" in ours else {}) | llava


def _llava(
    choices: Choices,
    llava: llava_recipes.LlavaRecipe,
    fields: Mapping[str, str],
    data: Mapping[str, Data],
    folder: Path,
    tower: str,
    prefix: str,
) -> list[Step]:
    """Pretraining and finetuning with one tower, by this package or by a fork."""
    steps = []
    for name, zero in (("pretrain", "zero2"), ("finetune", "zero3")):
        if choices.fork is not None:
            fork.check_fields(fields)
            if llava.step(name).max_steps == 0:
                continue  # their trainer would take 0 for "as the epochs say"
            words = fork.arguments(llava, name, data[name], tower, folder, world=choices.world, cpu=not choices.gpus)
            made, sources = fork.result(name, folder), fork.sources(name, folder, tower)
            if name == "finetune" and llava.pretrain.max_steps == 0:
                sources = ()
            steps.append(Step(prefix + name, tuple(words), zero, made, sources, fork=choices.fork))
            continue
        given = {"tower": tower, f"{name}.data": str(data[name].json), f"{name}.image_folder": str(data[name].images)}
        given |= {field: value for field, value in fields.items() if field not in given}
        words = ["llava", name, choices.preset, "--output_dir", str(folder), *fork.options(given)]
        steps.append(Step(prefix + name, tuple(words), zero=zero))
    return steps


def _is_folder(tower: str) -> bool:
    """Whether a tower is a path; else the name is a hub id."""
    return Path(tower).is_absolute() or Path(tower).exists()


def _config(model: Path) -> Path:
    """The file whose date is that of a model's folder, in transformers' format or open_clip's."""
    return next(
        (f for f in (model / "config.json", model / "open_clip_config.json") if f.exists()), model / "config.json"
    )


def _measure(name: str, command: Sequence[str | None], run_dir: Path, file: str, sources: Sequence[Path]) -> Step:
    result = run_dir / "eval" / f"{file}.json"
    words = (*(word for word in command if word is not None), "--output", str(result))
    return Step(name, words, result=result, sources=tuple(map(_config, sources)))


def _lmms(choices: Choices, folders: Sequence[Path]) -> Step:
    """The paper's benchmarks by lmms-eval, in one call per model; of the toy world its own small sets."""
    form = "." if choices.fork else "hf"
    models = [str(folder / "llava-finetune" / form) for folder in folders]
    labels = ["original", "enhanced"] if len(models) == 2 else ["enhanced"]
    output = choices.run_dir / "eval" / "lmms"
    data = _toy("benchmarks", choices) or choices.lmms_data
    words = ["mllm", *models, "--labels", *labels, "--output_dir", str(output), "--batch_size", "16"]
    words += ["--data", str(data)] if data else []
    sources = tuple(Path(model) / "config.json" for model in models)
    return Step("lmms", tuple(words), result=output / labels[-1] / "provenance.json", sources=sources)


def _chat(checkpoint: str, choices: Choices) -> Step:
    """One question about one image that no training saw."""
    from llava_genhancer.toyworld.questions import QUESTIONS, SHORT_SUFFIX

    question = f"{QUESTIONS['colour'][0]}\n{SHORT_SUFFIX}"
    image = f"{_toy('questions_test', choices)}/images/000000.jpg"
    return Step("chat", ("llava", "chat", checkpoint, image, "--question", question, "--max_new_tokens", "8"))


def _toy(name: str, choices: Choices) -> str | None:
    """A folder of the rendered toy world; None for the big presets."""
    if choices.preset != "tiny":
        return None
    from llava_genhancer.toyworld.paths import cache_folder

    return str(cache_folder() / name)
