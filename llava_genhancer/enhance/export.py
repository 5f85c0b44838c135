"""From a run's trained weights to a tower folder: fp32 merge, interpolation, check by reloading, model card."""

from __future__ import annotations

import logging
import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_genhancer import costs, run
from llava_genhancer.convert.open_clip import is_open_clip
from llava_genhancer.engine import load_trained
from llava_genhancer.enhance.backbones import (
    VisionBackbone,
    add_lora,
    load_full_model,
    load_image_statistics,
    locate,
    merged_state,
    trainable_backbone_names,
    vision_half,
)
from llava_genhancer.enhance.eva import save_open_clip, verify_open_clip
from llava_genhancer.enhance.stages import STAGES, WEIGHTS
from llava_genhancer.errors import InputError
from llava_genhancer.files import expand
from llava_genhancer.method import method_name
from llava_genhancer.recipes import Recipe, to_dict
from llava_genhancer.tower.export import MARKER, check_export, read_marker, save_tower, verify_tower

log = logging.getLogger(__name__)
TOLERANCE = 1e-4  # largest allowed |merged - LoRA-wrapped| global token, relative to the largest token entry


def export_tower(
    run_dir: Path, output_dir: Path, recipe: Recipe, *, step: int | None = None, overwrite: bool = False
) -> Path:
    """Merge a run's update into the original model and write it as a tower folder.

    Args:
        run_dir: a run whose stages are finished, or that has the snapshot ``step``.
        output_dir: where the tower goes; one that is already there for the same weights and scale is left alone.
        recipe: gives ``lora_scale`` (0 = original, 1 = enhanced) and ``merge_dtype``.
        step: a snapshot of the last stage that trained the backbone, instead of its end.
        overwrite: replace a tower of other weights or scale; the run's own ``tower/`` always follows its run.

    Returns:
        ``output_dir``.

    Raises:
        InputError: stages unfinished, no such snapshot, another tower there, or the written folder fails its check.
    """
    run_dir, output_dir = Path(expand(run_dir)), Path(expand(output_dir))
    files = weight_files(run_dir, recipe, step)
    marker = {
        "recipe": to_dict(recipe),
        "source": recipe.backbone,
        "lora_scale": recipe.lora_scale,
        "merge_dtype": recipe.merge_dtype,
        "step": step,
        "trained": {f"{f.parent.name}/{f.name}": run.sha256(f) for f in files},
    }
    if _is_current(output_dir, marker):
        log.info("%s is up to date", output_dir)
        return output_dir
    if not overwrite and output_dir.resolve() != (run_dir / "tower").resolve() and (output_dir / MARKER).exists():
        _refuse_another(output_dir, marker)
    full = load_full_model(recipe.backbone)
    wrapped = _wrapped(full, recipe, files)
    log.info("%d weights changed", len(merge(wrapped, full, recipe)))
    if recipe.lora_scale == 1 and recipe.merge_dtype == "float32":
        _check_merge(wrapped, full)
    del wrapped
    save = save_tower if hasattr(full, "config") else save_open_clip
    save(full, output_dir, source=locate(recipe.backbone), marker=marker)
    _verify(output_dir)
    reloaded = load_full_model(str(output_dir)).state_dict()
    for name, value in full.state_dict().items():
        if not torch.equal(reloaded[name], value):
            raise InputError(f"{output_dir}: {name} did not survive writing and reading; check the disk and repeat")
    write_card(output_dir, run_dir)
    return output_dir


def check_run_export(recipe: Recipe, run_dir: Path) -> None:
    """Refuse at a run's start what would stop the export at its end; reads no weights.

    Raises:
        InputError: the backbone lacks its image processor or tokenizer, or the tower's folder or disk cannot take it.
    """
    load_image_statistics(recipe.backbone)
    source, facts = locate(recipe.backbone), costs.facts_of(recipe)
    size = 0.0 if facts is None else costs.disk_bytes(recipe, *facts)["tower"]
    check_export(None if is_open_clip(source) else source, run_dir / "tower", size)


def weight_files(run_dir: Path, recipe: Recipe, step: int | None = None) -> list[Path]:
    """The trained-weight files that make up the run's backbone, in order; none if no stage trains it.

    Raises:
        InputError: a stage is unfinished, or the snapshot does not exist.
    """
    tables = {stage: recipe.stage(stage) for stage in STAGES}
    folders = [
        run_dir / f"stage{s}" for s, table in tables.items() if table.max_steps > 0 and "backbone" in table.trains
    ]
    files = [folder / WEIGHTS for folder in folders]
    if step is not None:
        snapshots = folders[-1] / "snapshots" if folders else run_dir
        kept = sorted(int(p.stem.split("-")[1]) for p in snapshots.glob("step-*.safetensors"))
        if step not in kept:
            raise InputError(
                f"{run_dir} has no snapshot of step {step}; kept are: {', '.join(map(str, kept)) or 'none'}"
            )
        files[-1] = snapshots / f"step-{step}.safetensors"
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} does not exist: {file.parent.name} is not finished, run `enhance` again")
    return files


def _wrapped(full: nn.Module, recipe: Recipe, files: list[Path]) -> VisionBackbone:
    """A copy of the original's vision half that carries the trained adapters."""
    backbone = deepcopy(vision_half(full, recipe))
    if files and recipe.lora_rank > 0:
        add_lora(backbone, recipe)
    learned = {f"backbone.{name}" for name in trainable_backbone_names(backbone, recipe)}
    for file in files:
        load_trained(nn.ModuleDict({"backbone": backbone}), file, learned, part="backbone.")
    return backbone.eval().requires_grad_(False)


@torch.no_grad()
def merge(wrapped: VisionBackbone, full: nn.Module, recipe: Recipe) -> set[str]:
    """Put ``original + lora_scale * (enhanced - original)`` into ``full``, in place, in the recipe's arithmetic.

    Returns:
        Names of the weights that changed; all others are bit-identical.

    Raises:
        InputError: a merged weight is NaN or infinite.
    """
    dtype = getattr(torch, recipe.merge_dtype)
    enhanced = merged_state(wrapped.to(dtype) if dtype != torch.float32 else wrapped)
    original = full.state_dict()
    changed = set()
    for name, value in enhanced.items():
        target = original[name]
        value = value.to(torch.float32)
        if not value.isfinite().all():
            raise InputError(f"{name} is not finite after the merge in {recipe.merge_dtype}: the tower was not written")
        if torch.equal(value, target.to(dtype).float()):
            continue  # untouched by training; the original's own bits stay
        mixed = value if recipe.lora_scale == 1 else torch.lerp(target, value, recipe.lora_scale)
        target.copy_(mixed)
        changed.add(name)
    return changed


@torch.no_grad()
def _check_merge(wrapped: VisionBackbone, full: nn.Module) -> None:
    """The merged weights must give what the LoRA-wrapped model gives."""
    merged = type(wrapped)(full, list(wrapped.image_mean), list(wrapped.image_std), wrapped.image_size).eval()
    pixels = torch.randn(2, 3, wrapped.image_size, wrapped.image_size, generator=torch.Generator().manual_seed(0))
    expected, got = wrapped(pixels), merged(pixels)
    error = float((expected - got).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:  # so that NaN fails
        raise InputError(f"the merged tower differs from the LoRA-wrapped one by {error:.1e} (allowed {TOLERANCE:.0e})")


def _verify(output_dir: Path) -> dict[str, Any]:
    """The marker of a tower in either format, its files checked."""
    return (verify_open_clip if is_open_clip(str(output_dir)) else verify_tower)(output_dir)


def _is_current(output_dir: Path, marker: dict[str, Any]) -> bool:
    if not (output_dir / MARKER).exists():
        return False
    try:
        there = _verify(output_dir)
    except InputError:
        return False
    return _same(there, marker)


def _same(there: dict[str, Any], marker: dict[str, Any]) -> bool:
    return all(there.get(k) == marker[k] for k in ("source", "lora_scale", "merge_dtype", "step", "trained"))


def _refuse_another(output_dir: Path, marker: dict[str, Any]) -> None:
    there = read_marker(output_dir)
    if not _same(there, marker):  # else it is only damaged
        raise InputError(
            f"{output_dir} holds another tower ({there.get('source')}, lora_scale {there.get('lora_scale')}, step "
            f"{there.get('step')}): choose another --output_dir, or add --overwrite"
        )


def write_card(tower_dir: Path, run_dir: Path) -> None:
    """The tower's ``README.md``: what it is, what was done, what was measured, how to use it."""
    manifest, marker = run.read_json(run_dir / run.MANIFEST), read_marker(tower_dir)
    recipe, step = marker["recipe"], marker["step"]
    stages = []
    for stage in STAGES:
        path = run_dir / f"stage{stage}" / "result.json"
        if path.exists():
            r = run.read_json(path)
            stages.append(
                f"| {stage} | {', '.join(recipe[f'stage{stage}.trains'])} | {recipe[f'stage{stage}.learning_rate']:g} "
                f"| {r['steps']} | {r['images_seen']} | {r['trainable_parameters']:,} |"
            )
    base = recipe["backbone"]
    tags = "" if base.startswith(("toyworld:", "/", ".")) else f"base_model: {base}\n"
    measured = _measured(run_dir, marker)
    library = "transformers"
    use = '`--vision_tower <this folder>` in LLaVA and its forks, or `AutoModel.from_pretrained("<this folder>")`.'
    if is_open_clip(str(tower_dir)):
        library, use = "open_clip", '`open_clip.create_model_from_pretrained("local-dir:<this folder>")`.'
    method = method_name(recipe)
    method_tags = [method.key] if method.key else []
    snapshot = "" if step is None else f" from the snapshot of step {step}"
    text = f"""---
library_name: {library}
pipeline_tag: zero-shot-image-classification
{tags}tags: [{", ".join(["clip", *method_tags, "llava"])}]
---

# {recipe["name"]}: a vision tower enhanced by post-training

`{base}` after post-training with {method.title}, by llava_genhancer {manifest["versions"]["llava_genhancer"]}.
Data: {data_line(manifest)}. Seed {recipe["seed"]}. Exported with lora_scale {marker["lora_scale"]:g}{snapshot}.

Command: `{shlex.join(["llava-genhancer", *manifest["command"][1:]])}`

| stage | learns | learning rate | steps | images | trained parameters |
|---|---|---|---|---|---|
{chr(10).join(stages)}

## MMVP-VLM

{measured}

Vision-only tuning moves the image side of a two-tower model: measure zero-shot retention before using it for retrieval.

## Use

{use}
The weights' SHA-256 are in `{MARKER}`, with the whole recipe.
"""
    run.write_text(tower_dir / "README.md", text)


def data_line(manifest: dict[str, Any]) -> str:
    """Each stage's data with its fingerprint, once if all stages trained on the same."""
    entries = manifest.get("data") or {"": {"path": manifest["recipe"]["data"]}}
    lines = {
        name: f"`{entry['path']}`" + (f" (fingerprint `{entry['fingerprint']}`)" if "fingerprint" in entry else "")
        for name, entry in sorted(entries.items())
    }
    if len(set(lines.values())) == 1:
        return next(iter(lines.values()))
    return ", ".join(f"{line} in {name.replace('stage', 'stage ')}" for name, line in lines.items())


def _measured(run_dir: Path, marker: dict[str, Any]) -> str:
    """Returns the scores in ``eval/mmvp_vlm.json``, or how to measure if the tower with this marker is not among them.

    A run's folder has the scores of its own tower; towers of another lora_scale or step are exported from it too.
    """
    command = f"llava-genhancer mmvp-vlm ORIGINAL TOWER --data DIR --output {run_dir.name}/eval/mmvp_vlm.json"
    path = run_dir / "eval" / "mmvp_vlm.json"
    results = run.read_json(path) if path.exists() else {"towers": []}
    if all(tower.get("weights") != marker.get("weights") for tower in results["towers"]):
        return f"Not measured yet: `{command}`."
    lines = ["| tower | right | score (%) | 95 % interval |", "|---|---|---|---|"]
    for tower in results["towers"]:
        score = tower["average"]
        low, high = score["interval"]
        lines.append(f"| {tower['label']} | {score['right']}/{score['n']} | {score['percent']} | {low} to {high} |")
    lines += [
        f"\n{c['tower']} against {c['against']}: {c['difference']:+} points, exact McNemar p = {c['mcnemar_p']:.2g}."
        for c in results["comparisons"]
    ]
    return "\n".join([*lines, "", f"Measured with `{command}`; guessing gives {results['guess']:g} %."])
