"""The verbs below ``llava-genhancer llava``. Each imports what it needs when it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_genhancer import recipes
from llava_genhancer.arguments import Verbs, add_fields, path, print_fields, print_made
from llava_genhancer.errors import InputError
from llava_genhancer.llava.recipes import RECIPES, LlavaRecipe, get_recipe


def add_verbs(above: Verbs) -> None:
    """``llava`` and the verbs below it."""
    verbs = Verbs(
        above.group("llava", "Train LLaVA-1.5 with a tower, export it to both forms, talk to it."), "llava_verb"
    )

    sub = verbs.add("recipes", _recipes, "List LLaVA's recipes, or print every field of one.")
    sub.add_argument("recipe", nargs="?")
    sub.add_argument("--json", action="store_true", help="machine-readable")

    fields = "Any recipe field can be set, for example --llm DIR --finetune.global_batch_size 64."
    data = "Needs --{0}.data FILE.json and --{0}.image_folder DIR. The same command resumes."
    for step, what in (("pretrain", "the projector, on captions"), ("finetune", "language model and projector")):
        sub = verbs.add(step, _train, f"Train {what}. {data.format(step)}", epilog=fields)
        sub.add_argument("recipe", nargs="?", help=f"one of {', '.join(RECIPES)}")
        sub.add_argument(
            "--config", type=path, metavar="MANIFEST", help="take the recipe of an earlier manifest.json instead"
        )
        sub.add_argument(
            "--output_dir", type=path, metavar="RUN", required=True, help=f"run folder; its llava-{step}/ is written"
        )
        sub.add_argument("--deepspeed", type=path, metavar="JSON", help="e.g. configs/deepspeed/zero2.json")
        sub.set_defaults(step=step)
        add_fields(sub, LlavaRecipe())

    sub = verbs.add("export", _export, "Write a finished run's checkpoints again: HF's form and the original LLaVA's.")
    sub.add_argument("run_dir", type=path, metavar="RUN")
    sub.add_argument("--step", choices=("pretrain", "finetune"), default="finetune")
    sub.add_argument(
        "--output_dir", type=path, metavar="DIR", help="where hf/ and llava/ go (default: the step's own folder)"
    )

    sub = verbs.add("import", _import, "Bring a released LLaVA-1.5, or one trained with its code, into HF's form.")
    sub.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help="folder in the original form")
    sub.add_argument("--output_dir", type=path, metavar="DIR", required=True)
    sub.add_argument(
        "--tower", type=path, metavar="DIR", help="vision tower, instead of the one that the checkpoint names"
    )
    sub.add_argument("--conversation", help="template of its prompts (default: the one that we exported with, else v1)")

    sub = verbs.add("chat", _chat, "Ask a LLaVA about an image, in the terminal.")
    sub.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help="folder in HF's form or the original one")
    sub.add_argument("image", type=path, metavar="IMAGE")
    sub.add_argument("--question", action="append", default=[], help="may be repeated; without one, type them")
    sub.add_argument("--max_new_tokens", type=int, default=256)
    sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    sub.add_argument(
        "--tower", type=path, metavar="DIR", help="vision tower, instead of the one that the checkpoint names"
    )


def chosen_recipe(name: str | None, config: str | None, fields: Mapping[str, str]) -> LlavaRecipe:
    """The recipe that a command line asks for.

    Raises:
        InputError: neither or both of name and manifest, or a field that does not fit.
    """
    if (name is None) == (config is None):
        raise InputError(f"give a LLaVA recipe ({', '.join(RECIPES)}) or --config manifest.json (one of them)")
    if config is not None:
        from llava_genhancer.run import recipe_of

        return recipes.override(recipe_of(config, LlavaRecipe), fields)
    assert name is not None
    return recipes.override(get_recipe(name), fields)


def _with_toy_data(recipe: LlavaRecipe, step: str) -> LlavaRecipe:
    """`tiny` brings its own data."""
    if recipe.step(step).data is not None or not recipe.llm.startswith("toyworld:"):
        return recipe
    from llava_genhancer.toyworld.writers import prepare

    folder = prepare().llava
    data = {f"{step}.data": str(folder / f"{step}.json"), f"{step}.image_folder": str(folder / "images")}
    return recipes.override(recipe, data)


def _recipes(args: Any) -> None:
    if args.recipe is None:
        for name in RECIPES:
            r = get_recipe(name)
            print(f"{name:16} {r.llm:24} {r.tower:36} {'LoRA ' + str(r.lora_rank) if r.lora_rank else 'full'}")
        return
    print_fields(get_recipe(args.recipe), as_json=args.json)


def _train(args: Any) -> None:
    recipe = _with_toy_data(chosen_recipe(args.recipe, args.config, args.fields), args.step)
    from llava_genhancer.llava.train import train_step

    folder = train_step(recipe, args.step, args.output_dir, deepspeed=args.deepspeed)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if args.step == "finetune":
        print_made(folder, "mllm", folder, "--output_dir", f"{args.output_dir}/eval/lmms")
        return
    named = [args.recipe] if args.recipe else ["--config", args.config]
    given = [word for name, value in args.fields.items() for word in (f"--{name}", value)]
    for name, what in (("finetune.data", "FILE.json"), ("finetune.image_folder", "DIR")):
        if name not in args.fields and not recipe.llm.startswith("toyworld:"):
            given += [f"--{name}", what]
    rest = ["--deepspeed", args.deepspeed] if args.deepspeed else []
    print_made(folder, "llava", "finetune", *named, "--output_dir", args.output_dir, *rest, *given)


def _export(args: Any) -> None:
    from llava_genhancer.llava.export import export_step
    from llava_genhancer.llava.train import step_dir
    from llava_genhancer.run import recipe_of

    folder = step_dir(args.run_dir, args.step)
    output = folder if args.output_dir is None else Path(args.output_dir)
    written = export_step(recipe_of(folder, LlavaRecipe), args.step, folder, output)
    if args.step == "finetune":
        print_made(" and ".join(map(str, written)), "llava", "chat", written[0], "IMAGE")
    else:
        print(f"done: {' and '.join(map(str, written))}")


def _import(args: Any) -> None:
    from llava_genhancer.llava.export import import_llava

    folder = import_llava(args.checkpoint, args.output_dir, tower=args.tower, conversation=args.conversation)
    print_made(folder, "llava", "chat", folder, "IMAGE")


def _chat(args: Any) -> None:
    from llava_genhancer.llava.chat import chat

    chat(
        args.checkpoint,
        args.image,
        questions=args.question,
        max_new_tokens=args.max_new_tokens,
        device=args.device,
        tower=args.tower,
    )
