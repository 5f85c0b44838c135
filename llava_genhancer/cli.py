"""The command ``llava-genhancer``. Every verb imports what it needs when it runs, so that ``--help`` is quick.

Exit status: 0 done; 1 doctor found something missing, or training met a bad step or lost a process; 2 bad input (one
line says what); 128 + signal: stopped with a checkpoint, the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llava_genhancer import __version__, recipes
from llava_genhancer.ablate.grids import NAMES
from llava_genhancer.errors import InputError, OneRankError, disk_failure, lost_rank, reason
from llava_genhancer.llava.commands import add_verbs as add_llava_verbs


class _Parser(argparse.ArgumentParser):
    """Errors as one line; long options must be written out, since any recipe field may follow."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and exit with its status."""
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        status = _fail(2, error, on_all_ranks=not isinstance(error, OneRankError))
    except KeyboardInterrupt:
        status = _fail(130, "interrupted before there was anything to save")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:
        known = _known_failure(error)
        if known is None:
            raise
        status = _fail(*known)
    sys.exit(status)


def _known_failure(error: Exception) -> tuple[int, Exception | str] | None:
    """Status and words for what can go wrong beyond bad input; None for bugs, which keep their traceback."""
    trainer = sys.modules.get("llava_genhancer.trainer")
    if trainer is not None and isinstance(error, trainer.TrainingStopped):
        return 128 + error.signum, error
    if trainer is not None and isinstance(error, trainer.BadStep):
        return 1, error
    if disk := disk_failure(error):
        return 2, f"{disk}: make room or choose another folder, then repeat the command"
    if lost := lost_rank(error):
        rank = os.environ.get("RANK", "0")
        advice = "what that one said tells why; the same command goes on from the last checkpoint"
        return 1, f"rank {rank} lost another rank ({lost}): {advice}"
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        advice = "out of memory, most often: lower --num_workers; the same command goes on from the last checkpoint"
        return 1, f"a data worker died ({reason(error)}): {advice}"
    if type(error).__name__ == "OutOfMemoryError":
        advice = "lower --per_device_batch_size, add --gradient_checkpointing true, or use configs/deepspeed/zero3.json"
        return 2, f"out of GPU memory: {advice}"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch raises a RuntimeError
        return 2, "out of memory: use a smaller model or batch (`llava-genhancer doctor RECIPE` says what is needed)"
    return None


def _fail(status: int, message: object, *, on_all_ranks: bool = False) -> int:
    """Print one line; what all ranks say alike is said once."""
    if not on_all_ranks or int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(f"llava-genhancer: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    return status


def _run(argv: list[str]) -> int:
    parser = _parser()
    # The deepspeed launcher puts --local_rank=N before everything else; the rank comes through the environment too.
    argv = [a for a in argv if not a.startswith("--local_rank=")]
    args, rest = parser.parse_known_args(argv)
    if rest:
        name = rest[0].partition("=")[0]
        if hasattr(args, "fields") and name.startswith("--"):
            recipes.override(args.any_recipe, {name[2:]: ""})  # raises, with the nearest name
        parser.error(f"unknown argument {name}; see `llava-genhancer {args.verb} --help`")
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=sys.stderr)
    if not args.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # its errors come as exceptions too
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    status = int(args.run(args) or 0)
    sys.stdout.flush()  # a reader that has gone shows here, not in the interpreter's last breath
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="llava-genhancer", description="Better eyes for LLaVA (GenHancer, arXiv 2503.19480).")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    def verb(name: str, run: Callable[[Any], int | None], help: str, **kwargs: Any) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help, **kwargs)
        sub.add_argument("--verbose", action="store_true", help="say what is being done")
        sub.set_defaults(run=run)
        return sub

    sub = verb("doctor", _doctor, "Check this machine for a recipe, or what a LLaVA fork will do with a tower.")
    sub.add_argument("recipe", nargs="?", default="openai-l14-224")
    sub.add_argument("--deepspeed", metavar="JSON", help="predict memory under this ZeRO stage")
    sub.add_argument("--gpus", type=int, help="predict for this many GPUs (default: those found here)")
    sub.add_argument("--output_dir", metavar="RUN", default=".", help="where the run would go")
    sub.add_argument("--fork", metavar="DIR", help="instead: a LLaVA fork's checkout, with --tower")
    sub.add_argument("--tower", metavar="DIR", help="the tower folder that the fork is to take")
    _add_fields(sub)

    sub = verb("recipes", _recipes, "List the recipes, or print every field of one.")
    sub.add_argument("recipe", nargs="?")
    sub.add_argument("--json", action="store_true", help="machine-readable")

    sub = verb(
        "enhance",
        _enhance,
        "Enhance a vision tower: stage 1, stage 2, merge, export. The same command resumes.",
        epilog="Any recipe field can be set, for example --global_batch_size 64 --stage2.max_steps 2000 "
        "--lora_rank 8. `llava-genhancer recipes RECIPE` prints them all.",
    )
    sub.add_argument("recipe", nargs="?", help="a recipe's name; `llava-genhancer recipes` lists them")
    sub.add_argument("--config", metavar="MANIFEST", help="take the recipe of an earlier run's manifest.json instead")
    sub.add_argument("--output_dir", metavar="RUN", required=True, help="run folder, new or to go on with")
    sub.add_argument("--deepspeed", metavar="JSON", help="e.g. configs/deepspeed/zero2.json")
    sub.add_argument("--stage", type=int, choices=(1, 2), help="only this stage (default: both, then export)")
    _add_fields(sub)

    sub = verb("export", _export, "Export a tower from a run, at another strength or from a snapshot.")
    sub.add_argument("run_dir", metavar="RUN")
    sub.add_argument("--output_dir", required=True, metavar="TOWER")
    sub.add_argument("--lora_scale", type=float, help="0 = original ... 1 = enhanced (default: the recipe's)")
    sub.add_argument("--step", type=int, help="a stage-2 snapshot instead of the end")
    sub.add_argument("--overwrite", action="store_true", help="replace another tower in TOWER")

    sub = verb("convert", _convert, "Convert a CLIP or SigLIP between transformers', open_clip's and OpenAI's formats.")
    sub.add_argument(
        "source", metavar="SOURCE", help=".pt, .pth, .bin or .safetensors file, folder, hub id or hf://..."
    )
    sub.add_argument("--output_dir", required=True, metavar="DIR")
    sub.add_argument("--to", default="hf", help="hf (default), open_clip or openai")
    sub.add_argument(
        "--like", metavar="MODEL", help="a model of its kind that has what it lacks: folder, hub id, or name"
    )
    sub.add_argument("--activation", help="quick_gelu or gelu, where neither the weights nor --like say")
    sub.add_argument("--head_width", type=int, help="of the vision tower's attention heads, where it is unusual")
    sub.add_argument("--dtype", default="float32", help="float32 (default, exact), float16 or bfloat16")

    sub = verb("mmvp-vlm", _mmvp_vlm, "Measure towers on MMVP-VLM; the first is the one others are compared with.")
    sub.add_argument("towers", nargs="+", metavar="TOWER", help="folder or hub id of a CLIPModel or SiglipModel")
    sub.add_argument("--data", required=True, metavar="DIR", help="folder with Questions.csv and 'MLLM_VLM Images'")
    sub.add_argument("--output", metavar="JSON", help="write the results here, and the picture beside it")
    sub.add_argument("--batch_size", type=int, default=64)
    sub.add_argument("--locals", action="store_true", help="score the mean of the local tokens too, as DIVA does")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")

    sub = verb(
        "zero-shot",
        _zero_shot,
        "Measure towers' zero-shot classification and retrieval (Table 3); what was measured is not measured again.",
        epilog="A data set is a folder called like clip_benchmark's (imagenet1k, cifar100, sun397, cars, flickr30k, "
        "mscoco_captions): its webdataset export, parquet, Karpathy's dataset_*.json or captions.jsonl beside the "
        "images, or a folder of images per class.",
    )
    sub.add_argument("towers", nargs="+", metavar="TOWER", help="folder or hub id; others are compared with the first")
    _add_zero_shot_options(sub)
    sub.add_argument("--output", metavar="JSON", help="write the results here, and each set's answers beside it")

    sub = verb(
        "curve",
        _curve,
        "MMVP-VLM against zero-shot retention at strengths between the original tower and the enhanced one, to choose "
        "one for `export --lora_scale`.",
    )
    sub.add_argument("towers", nargs="+", metavar="RUN", help="a run; or two towers, ORIGINAL and ENHANCED")
    _add_zero_shot_options(sub)
    sub.add_argument("--mmvp", required=True, metavar="DIR", help="MMVP-VLM's folder")
    sub.add_argument("--lora_scale", metavar="S,...", default="0,0.25,0.5,0.75,1", help="strengths from 0 to 1")
    sub.add_argument("--output", metavar="JSON", help="default: RUN/eval/curve.json; the picture goes beside it")

    sub = verb("generation", _generation, "Score a run's rebuilt images, and MMVP-VLM on its snapshots (Fig. 1).")
    sub.add_argument("run_dir", metavar="RUN")
    sub.add_argument("--data", metavar="DIR", help="MMVP-VLM's folder (default: no MMVP-VLM)")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")

    sub = verb("probes", _probes, "Probe one or two towers of the toy world for each detail of its scenes.")
    sub.add_argument("towers", nargs="+", metavar="TOWER", help="the original, then the enhanced one")
    sub.add_argument("--output", required=True, metavar="JSON")

    sub = verb(
        "questions", _questions, "Ask LLaVAs questions with known options; the first is what others are compared with."
    )
    sub.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folder in HF's form or the original one")
    sub.add_argument("--data", required=True, metavar="DIR", help="folder with questions.json and images/")
    sub.add_argument("--output", required=True, metavar="JSON")
    sub.add_argument("--labels", nargs="+", help="a name for each (default: as much of each path as tells them apart)")
    sub.add_argument("--conversation", default="v1", help="template that they were trained with (default: v1)")
    sub.add_argument("--batch_size", type=int, default=64)
    sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")

    sub = verb("mllm", _mllm, "Evaluate LLaVAs on the paper's Table 2 with lmms-eval; the same command goes on.")
    sub.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="a finetuning's folder, or a checkpoint")
    sub.add_argument("--output_dir", required=True, metavar="DIR", help="a run's eval/lmms, where the report looks")
    sub.add_argument("--labels", nargs="+", help="a name for each; the report compares with the one called original")
    sub.add_argument("--tasks", default="genhancer", help="lmms-eval's, comma-separated (default: all of Table 2)")
    sub.add_argument("--data", metavar="DIR", help="local copies of the data sets: DIR/<organisation>/<name>")
    sub.add_argument("--batch_size", type=int, default=1)
    sub.add_argument("--processes", type=int, help="GPUs to spread the questions over (default: all that are here)")
    sub.add_argument("--limit", type=int, help="only the first so many questions of each task")
    sub.add_argument("--model_args", default="", help="more for our lmms-eval model, for example answer=generate")

    llava = "Train LLaVA-1.5 with a tower, export it to both forms, talk to it."
    add_llava_verbs(verbs.add_parser("llava", help=llava, description=llava), _add_fields)

    sub = verb("report", _report, "Write report.md, report.html, report.json, tables/ and figures/ for a run.")
    sub.add_argument("run_dirs", nargs="+", metavar="RUN", help="the run, then others whose rows stand beside its own")
    sub.add_argument("--baseline", metavar="RUN", help="compare with this run's model (default: the run's original)")

    sub = verb(
        "ablate",
        _ablate,
        "Repeat an ablation of the paper: train every cell, print the table beside the paper's. The same command goes "
        "on.",
        epilog="Any recipe field is an option and goes to every cell, for example --stage2.max_steps 2000.",
    )
    sub.add_argument("ablation", choices=NAMES, metavar="ABLATION", help=", ".join(NAMES))
    sub.add_argument("--recipe", default="tiny", help="what cells start from (default: tiny)")
    sub.add_argument("--output_dir", metavar="OUT", help="for OUT/CELL/seed-N and the page (default: runs/NAME-RECIPE)")
    sub.add_argument("--seeds", type=int, default=1, help="repeat every cell with this many seeds")
    sub.add_argument("--mmvp", metavar="DIR", help="MMVP-VLM's folder (the toy world has its own)")
    sub.add_argument("--zero_shot", metavar="DIR", help="folder of zero-shot data sets (the toy world has its own)")
    sub.add_argument("--deepspeed", metavar="JSON", help="for trainings on GPUs (default: zero2)")
    sub.add_argument("--hostfile", help="DeepSpeed's, for several machines")
    sub.add_argument("--dry_run", action="store_true", help="print the plan and what it costs, do nothing")
    _add_fields(sub)

    sub = verb(
        "demo",
        _demo,
        "The whole chain in the toy world: enhance, train LLaVA without and with it, measure, report. No download, "
        "minutes on a CPU.",
    )
    sub.add_argument("--output_dir", metavar="RUN", default="runs/tiny")
    sub.add_argument("--seeds", type=int, default=1, help="repeat with this many seeds and report over them")
    _add_fields(sub)
    return parser


def _add_zero_shot_options(parser: argparse.ArgumentParser) -> None:
    data = "data sets' folders, or folders of such"
    parser.add_argument("--data", required=True, nargs="+", metavar="DIR", help=data)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")


class _Field(argparse.Action):
    """Collects ``--name value`` in the dict ``fields``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.fields = {**namespace.fields, self.metavar: values}


def _add_fields(parser: argparse.ArgumentParser, recipe: Any = None) -> None:
    """Make every field of ``recipe``'s class (default: Recipe) an option.

    As unknown arguments, their values would be taken for the RECIPE.
    """
    recipe = recipe or recipes.Recipe()
    parser.set_defaults(fields={}, any_recipe=recipe)
    for name in recipes.field_types(type(recipe)):
        parser.add_argument(
            f"--{name}", metavar=name, dest="fields", action=_Field, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def _recipe(name: str | None, config: str | None, fields: Mapping[str, str]) -> recipes.Recipe:
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


def _doctor(args: Any) -> int:
    from llava_genhancer.doctor import examine, examine_fork

    if args.fork is not None or args.tower is not None:
        if args.fork is None or args.tower is None:
            raise InputError("--fork and --tower go together: doctor --fork DIR --tower DIR")
        return examine_fork(args.fork, args.tower)
    return examine(
        _recipe(args.recipe, None, args.fields), deepspeed=args.deepspeed, gpus=args.gpus, run_dir=args.output_dir
    )


def _recipes(args: Any) -> None:
    if args.recipe is None:
        if args.json:
            print(json.dumps({n: recipes.to_dict(recipes.get_recipe(n)) for n in recipes.RECIPES}, indent=2))
            return
        for name in recipes.RECIPES:
            r = recipes.get_recipe(name)
            print(f"{name:20} {r.backbone:42} stage 1 {r.stage1.max_steps:>6} steps, stage 2 {r.stage2.max_steps:>5}")
        print(f"each with a method: {', '.join(f'NAME-{p}' for p in recipes.PARADIGMS)} (the default: flow)")
        return
    recipe = recipes.get_recipe(args.recipe)
    values, helps = recipes.to_dict(recipe), recipes.field_help(recipes.Recipe)
    if args.json:
        print(json.dumps(values, indent=2))
        return
    for name, value in values.items():
        shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        print(f"--{name} {shown}\n      {helps[name]}")


def _enhance(args: Any) -> None:
    recipe = _with_toy_data(_recipe(args.recipe, args.config, args.fields))
    from llava_genhancer.enhance.train import enhance

    stages = (1, 2) if args.stage is None else (args.stage,)
    result = enhance(recipe, args.output_dir, deepspeed=args.deepspeed, stages=stages)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"done: {result}")


def _export(args: Any) -> None:
    from llava_genhancer.enhance.export import export_tower
    from llava_genhancer.run import recipe_of

    recipe = recipe_of(args.run_dir)
    if args.lora_scale is not None:
        recipe = recipes.override(recipe, {"lora_scale": args.lora_scale})
    where = Path(args.output_dir)
    tower = export_tower(Path(args.run_dir), where, recipe, step=args.step, overwrite=args.overwrite)
    print(f"done: {tower}")


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
    )
    print(f"done: {folder}")


def _mmvp_vlm(args: Any) -> None:
    from llava_genhancer.evaluate.mmvp_vlm import run

    batch, device = args.batch_size, args.device
    run(args.towers, args.data, output=args.output, batch_size=batch, device=device, locals_too=args.locals)


def _zero_shot(args: Any) -> None:
    from llava_genhancer.evaluate.zero_shot import run

    run(args.towers, args.data, output=args.output, batch_size=args.batch_size, device=args.device)


def _curve(args: Any) -> None:
    from llava_genhancer.evaluate.curve import run

    run(
        args.towers,
        args.data,
        args.mmvp,
        scales=args.lora_scale,
        output=args.output,
        batch_size=args.batch_size,
        device=args.device,
    )


def _generation(args: Any) -> None:
    from llava_genhancer.evaluate.generation import measure
    from llava_genhancer.evaluate.generation_report import FIGURE, RESULT

    measure(args.run_dir, args.data, args.device)
    print(f"results: {Path(args.run_dir) / RESULT}\nfigure:  {Path(args.run_dir) / 'figures' / FIGURE}")


def _probes(args: Any) -> None:
    from llava_genhancer.run import write_json
    from llava_genhancer.toyworld.probes import run_probes

    write_json(args.output, run_probes(args.towers))
    print(f"results: {args.output}")


def _questions(args: Any) -> None:
    from llava_genhancer.evaluate.questions import run

    run(
        args.checkpoints,
        args.data,
        args.output,
        labels=args.labels,
        template=args.conversation,
        batch_size=args.batch_size,
        device=args.device,
    )


def _mllm(args: Any) -> None:
    from llava_genhancer.evaluate.mllm import evaluate

    evaluate(
        args.checkpoints,
        args.output_dir,
        labels=args.labels,
        tasks=args.tasks,
        data=args.data,
        batch_size=args.batch_size,
        processes=args.processes,
        limit=args.limit,
        model_args=args.model_args,
    )


def _report(args: Any) -> None:
    from llava_genhancer.evaluate.report import write_report

    run_dir, *others = map(Path, args.run_dirs)
    if (run_dir / "tower").is_dir() and (run_dir / "manifest.json").is_file():
        from llava_genhancer.enhance.export import write_card

        write_card(run_dir / "tower", run_dir)  # it says what was measured
    report = write_report(run_dir, others, baseline=args.baseline)
    print(f"report:   {report}, and as one page {report.with_suffix('.html')}\npictures: {report.parent / 'figures'}")


def _ablate(args: Any) -> int:
    from llava_genhancer.ablate.command import ablate

    return ablate(
        args.ablation,
        args.output_dir,
        args.fields,
        recipe=args.recipe,
        seeds=args.seeds,
        mmvp=args.mmvp,
        zero_shot=args.zero_shot,
        deepspeed=args.deepspeed,
        hostfile=args.hostfile,
        dry_run=args.dry_run,
    )


def _demo(args: Any) -> int:
    from llava_genhancer.demo import demo

    return demo(args.fields, Path(args.output_dir), seeds=args.seeds)
