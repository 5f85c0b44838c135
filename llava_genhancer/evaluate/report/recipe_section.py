"""The report's sections on how a run was made, and how to make it again."""

from __future__ import annotations

from pathlib import Path

from llava_genhancer.evaluate.markdown import block, code, text
from llava_genhancer.evaluate.report import llava_section
from llava_genhancer.evaluate.report.gathered import Report
from llava_genhancer.evaluate.words import fields, shell_line
from llava_genhancer.method import read_fields
from llava_genhancer.run import read_json

WITH_LOCALS = "(with locals)"  # as mmvp-vlm --locals labels its towers
# Recipe fields worth a reader's first look; the others follow folded away.
FIRST_FIELDS = (
    "backbone", "denoiser", "objective", "vae", "vq", "data", "condition", "t_sampling", "t_scale", "mask_ratio",
    "global_batch_size", "precision", "lora_rank", "lora_scale", "seed",
)  # fmt: skip


def recipe(report: Report) -> str:
    """The recipe's fields, the first ones in sight; versions and revision."""
    versions = report.manifest.get("versions")
    report.facts |= {"recipe": report.values or None, "versions": versions, "git": report.manifest.get("git")}
    if not report.values:
        return ""
    read = read_fields(report.values)
    first = [f for f in FIRST_FIELDS if f in read]
    rest = [f for f in read if f not in first and f != "name"]
    parts = ["## Recipe", fields(report.values, first)]
    if rest:
        parts += [
            f"<details><summary>all other fields ({len(rest)})</summary>",
            fields(report.values, rest),
            "</details>",
        ]
    if unread := [f for f in report.values if f not in read]:
        parts.append(f"Not read by denoiser={text(report.values['denoiser'])}: {', '.join(map(code, unread))}.")
    if isinstance(versions, dict):
        listed = ", ".join(f"{text(k)} {text(v)}" for k, v in versions.items())
        git = report.manifest.get("git")
        parts.append(f"Made with {listed}" + (f"; revision {code(git)}." if git else "."))
    return "\n\n".join(parts)


def commands(report: Report, baseline: Path | None) -> str:
    """The commands that made the run and measured it."""
    lines = []
    command = report.manifest.get("command")
    if isinstance(command, list) and len(command) > 1:
        world = report.manifest.get("world_size", 1)
        start = ["llava-genhancer"]
        if isinstance(world, int) and world > 1:
            start = ["torchrun", f"--nproc_per_node={world}", "-m", "llava_genhancer"]
        lines.append(shell_line([*start, *command[1:]], report.manifest.get("folder")))
    run_dir = report.run_dir.resolve()  # the folder in which this command was given is not that of the others
    measured = run_dir / "eval" / "mmvp_vlm.json"
    if measured.is_file():
        values = read_json(measured)
        towers = [str(t["tower"]) for t in values["towers"]]
        where = ["--data", str(values["benchmark"]["path"]), "--output", str(measured)]
        if all(str(t["label"]).endswith(WITH_LOCALS) for t in values["towers"]):
            where.append("--locals")
        lines.append(shell_line(["llava-genhancer", "mmvp-vlm", *towers, *where], values.get("folder")))
    lines += llava_section.commands(run_dir)
    compared = ["--baseline", baseline.resolve()] if baseline else []
    others = [other.resolve() for other in report.others]
    lines.append(shell_line(["llava-genhancer", "report", run_dir, *others, *compared]))
    said = f"Recipes, versions and seeds: {links}." if (links := llava_section.manifests(report.run_dir)) else ""
    again = block([" ".join(line.split("\n")) for line in lines])
    return "\n\n".join(["## To repeat this", *([said] if said else []), again])
