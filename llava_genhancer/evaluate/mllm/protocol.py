"""In what an evaluation differs from the paper's: the likeliest option to every question, the labels as published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llava_genhancer.evaluate.mllm.plugin import DEFAULT_MODEL, MODEL
from llava_genhancer.evaluate.mllm.results import Model, TaskRun

# Counted over the published HallusionBench.json; the second was computed on it with both groupings.
HALLUSIONBENCH = (
    'HallusionBench: 14 of its 951 questions ask "which ...", so that a rule for yes and no credits no right reply to '
    "them; it takes the word yes as right for 11 and no for 3",
    "HallusionBench: the subsets VD and VS each have one called ocr, which are kept apart here (346 figures, 455 "
    "questions). VLMEvalKit merges them by name (332, 429), which makes its average about 0.7 points lower",
)
NAMED = 5  # unanswered documents in a line; report.json has all of them
DATA = {
    "mmvp": "lmms-lab-eval/MMVP",
    "mmvp_original_labels": "lmms-lab-eval/MMVP",
    "cvbench": "nyu-visionx/CV-Bench",
    "naturalbench": "BaiqiL/NaturalBench-lmms-eval",
    "pope": "lmms-lab-encoder/POPE",
    "scienceqa_img": "lmms-lab-encoder/ScienceQA",
    "hallusionbench": "lmms-lab-encoder/HallusionBench",
}
QUESTIONS = {
    "mmvp": 300, "mmvp_original_labels": 300, "cvbench": 2638, "naturalbench": 7600, "pope": 9000,
    "scienceqa_img": 2017, "hallusionbench": 951,
}  # fmt: skip


def warnings(models: Sequence[Model], baseline: Model | None) -> list[str]:
    """One line per difference, each with the models and tasks that it concerns."""
    found: dict[str, dict[str, list[str]]] = {}
    for model in models:
        for task in model.tasks.values():
            for line in _differences(task):
                found.setdefault(line, {}).setdefault(model.label, []).append(task.name)
        if model.columns and "mmvp" in model.columns and model.columns["mmvp"].task.name == "mmvp":
            line = "MMVP's corrected labels; the paper's are those of mmvp_original_labels"
            found.setdefault(line, {}).setdefault(model.label, []).append("mmvp")
    lines = [f"{line} ({_where(where, models)})" for line, where in found.items()]
    if any(m.columns.keys() & {"pope_random", "pope_popular", "pope_adversarial"} for m in models):
        lines.append("POPE is F1: the paper does not name its measure, and its figures are LLaVA-1.5's F1")
    if any("hallusionbench" in m.columns for m in models):
        lines += HALLUSIONBENCH
    return lines + list(_unlike(models, baseline))


def by_likelihood(task: TaskRun) -> bool:
    """Whether the answers are the likeliest options."""
    arguments = str(task.settings.get("model_args", "")).replace(" ", "").split(",")
    return task.settings.get("model") in (MODEL, DEFAULT_MODEL) and "answer=generate" not in arguments


def _differences(task: TaskRun) -> Iterator[str]:
    if not by_likelihood(task):
        yield "answers were generated and parsed; the paper takes the option with the highest likelihood"
    elif "normalise=True" in str(task.settings.get("model_args", "")):
        yield "likelihoods were divided by the options' lengths; whether the paper's are is not stated"
    if limit := task.settings.get("limit"):
        yield f"only the first documents were asked (--limit {limit:g})"
    elif not str(task.config.get("dataset_path", "")).replace("\\", "/").endswith(DATA[task.name]):
        yield f"another data set than {DATA[task.name]}"
    elif (known := QUESTIONS.get(task.name)) and len(task.documents) != known:
        yield f"{len(task.documents):,} questions where the benchmark has {known:,}: another set of this name"
    lost = task.unanswered
    unparsed = sum(task.item(number)["answer"] is None for number in task.documents) - len(lost)
    if lost:
        share = 100 * len(lost) / len(task.documents)
        named = "; ".join(f"{number} ({why})" for number, why in list(lost.items())[:NAMED])
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        yield (
            f"{len(lost):,} of {len(task.documents):,} documents of {task.name} ({share:.1f} %) could not be answered "
            f"and count as wrong: {named}{more}"
        )
    if unparsed:
        share = 100 * unparsed / len(task.documents)
        yield f"{share:.0f} % of the replies held no answer, and count as wrong"
    if task.config.get("num_fewshot"):
        yield f"{task.config['num_fewshot']} examples were shown before each question"


def _where(where: dict[str, list[str]], models: Sequence[Model]) -> str:
    """The models, with their tasks where those are not all."""
    parts = []
    for model in models:
        names = where.get(model.label, [])
        if names:
            parts.append(model.label + ("" if len(names) == len(model.tasks) else f": {', '.join(names)}"))
    return "; ".join(parts)


def _unlike(models: Sequence[Model], baseline: Model | None) -> Iterator[str]:
    """Where a model was not asked as the baseline was, so that they are not compared or not alike."""
    for model in models:
        if baseline is None or model is baseline:
            continue
        for name, task in model.tasks.items():
            first = baseline.tasks.get(name)
            if first is None:
                continue
            if task.documents.keys() != first.documents.keys():
                yield f"{model.label} was asked other documents of {name} than {baseline.label}: not compared"
            elif by_likelihood(task) != by_likelihood(first) or task.prompt != first.prompt:
                yield f"{model.label} was asked in another way for {name} than {baseline.label}: no fair comparison"
            elif task.revision and first.revision and task.revision != first.revision:
                yield f"{model.label} was asked another revision of {name}'s data than {baseline.label}"
