"""The verbs that make a tower. Each imports what it needs when it runs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_genhancer import recipes
from llava_genhancer.arguments import Verbs, add_fields, path, print_fields, print_made
from llava_genhancer.errors import InputError


def add_verbs(verbs: Verbs) -> None:
    """``recipes``, ``enhance``, ``export`` and ``convert``."""
    sub = verbs.add("recipes", _recipes, "List the recipes, or print every field of one.")
    sub.add_argument("recipe", nargs="?")
    sub.add_argument("--json", action="store_true", help="machine-readable")

    sub = verbs.add(
        "enhance",
        _enhance,
        "Enhance a vision tower: stage 1, stage 2, merge, export. The same command resumes.",
        epilog="Any recipe field can be set, for example --global_batch_size 64 --stage2.max_steps 2000 "
        "--lora_rank 8. `llava-genhancer recipes RECIPE` prints them all.",
    )
    sub.add_argument("recipe", nargs="?", help="a recipe's name; `llava-genhancer recipes` lists them")
    sub.add_argument(
        "--config", type=path, metavar="MANIFEST", help="take the recipe of an earlier run's manifest.json instead"
    )
    sub.add_argument("--output_dir", type=path, metavar="RUN", required=True, help="run folder, new or to go on with")
    sub.add_argument("--deepspeed", type=path, metavar="JSON", help="e.g. configs/deepspeed/zero2.json")
    sub.add_argument("--stage", type=int, choices=(1, 2), help="only this stage (default: both, then export)")
    add_fields(sub, recipes.Recipe())

    sub = verbs.add("export", _export, "Export a tower from a run, at another strength or from a snapshot.")
    sub.add_argument("run_dir", type=path, metavar="RUN")
    sub.add_argument("--output_dir", type=path, required=True, metavar="TOWER")
    sub.add_argument("--lora_scale", type=float, help="0 = original ... 1 = enhanced (default: the recipe's)")
    sub.add_argument("--step", type=int, help="a stage-2 snapshot instead of the end")
    sub.add_argument("--overwrite", action="store_true", help="replace another tower in TOWER")

    sub = verbs.add(
        "convert", _convert, "Convert a CLIP or SigLIP between transformers', open_clip's and OpenAI's formats."
    )
    sub.add_argument(
        "source", type=path, metavar="SOURCE", help=".pt, .pth, .bin or .safetensors file, folder, hub id or hf://..."
    )
    sub.add_argument("--output_dir", type=path, required=True, metavar="DIR")
    sub.add_argument("--to", default="hf", help="hf (default), open_clip or openai")
    sub.add_argument(
        "--like", type=path, metavar="MODEL", help="a model of its kind that has what it lacks: folder, hub id, or name"
    )
    sub.add_argument("--activation", help="quick_gelu or gelu, where neither the weights nor --like say")
    sub.add_argument("--head_width", type=int, help="of the vision tower's attention heads, where it is unusual")
    sub.add_argument("--dtype", default="float32", help="float32 (default, exact), float16 or bfloat16")
    sub.add_argument("--overwrite", action="store_true", help="replace another tower in DIR")


def chosen_recipe(name: str | None, config: str | None, fields: Mapping[str, str]) -> recipes.Recipe:
    """The recipe that a command line asks for.

    Raises:
        InputError: neither or both of name and manifest, or a field that does not fit.
    """
    if (name is None) == (config is None):
        raise InputError(
            "give a recipe's name or --config manifest.json (one of them); `llava-genhancer recipes` lists"
        )
    if config is not None:
        from llava_genhancer.run import recipe_of

        return recipes.override(recipe_of(config), fields)
    assert name is not None
    return recipes.override(recipes.get_recipe(name), fields)


def _with_toy_data(recipe: recipes.Recipe) -> recipes.Recipe:
    """`tiny` brings its own images."""
    if recipe.data is None and recipe.backbone.startswith("toyworld:"):
        from llava_genhancer.toyworld.writers import prepare

        return dataclasses.replace(recipe, data=str(prepare().shards))
    return recipe


def _recipes(args: Any) -> None:
    if args.recipe is not None:
        recipe = recipes.get_recipe(args.recipe)
        unread = recipe.unread()
        print_fields(recipe, as_json=args.json, unread=unread)
        if unread and not args.json:
            print(f"not read with --denoiser {recipe.denoiser}: {', '.join(unread)}")
        return
    if args.json:
        print(json.dumps({n: recipes.to_dict(recipes.get_recipe(n)) for n in recipes.RECIPES}, indent=2))
        return
    for name in recipes.RECIPES:
        r = recipes.get_recipe(name)
        print(f"{name:20} {r.backbone:42} stage 1 {r.stage1.max_steps:>6} steps, stage 2 {r.stage2.max_steps:>5}")
    print(f"each with a method: {', '.join(f'NAME-{p}' for p in recipes.PARADIGMS)} (the default: flow)")


def _enhance(args: Any) -> None:
    recipe = _with_toy_data(chosen_recipe(args.recipe, args.config, args.fields))
    from llava_genhancer.enhance.train import enhance

    stages = (1, 2) if args.stage is None else (args.stage,)
    result = enhance(recipe, args.output_dir, deepspeed=args.deepspeed, stages=stages)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if 2 in stages:
        _print_tower(result, recipe.backbone, f"{args.output_dir}/eval")
    else:
        named = [args.recipe] if args.recipe else ["--config", args.config]
        rest = ["--deepspeed", args.deepspeed] if args.deepspeed else []
        given = [word for name, value in args.fields.items() for word in (f"--{name}", value)]
        print_made(result, "enhance", *named, "--output_dir", args.output_dir, *rest, *given)


def _print_tower(tower: object, original: str, output: object) -> None:
    """What was made, and how to measure it beside its original."""
    print_made(tower, "mmvp-vlm", original, tower, "--data", "MMVP_VLM", "--output", output)


def _export(args: Any) -> None:
    from llava_genhancer.enhance.export import export_tower
    from llava_genhancer.run import recipe_of

    recipe = recipe_of(args.run_dir)
    if args.lora_scale is not None:
        recipe = recipes.override(recipe, {"lora_scale": args.lora_scale})
    where = Path(args.output_dir)
    tower = export_tower(Path(args.run_dir), where, recipe, step=args.step, overwrite=args.overwrite)
    _print_tower(tower, recipe.backbone, f"{args.output_dir}/mmvp_vlm.json")


def _convert(args: Any) -> None:
    from llava_genhancer.convert.convert import convert

    folder = convert(
        args.source,
        args.output_dir,
        to=args.to,
        like=args.like,
        activation=args.activation,
        head_width=args.head_width,
        dtype=args.dtype,
        overwrite=args.overwrite,
    )
    _print_tower(folder, args.source, f"{args.output_dir}/mmvp_vlm.json")
