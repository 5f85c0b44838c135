"""The command ``llava-genhancer``. Every verb imports what it needs when it runs, so that ``--help`` is quick.

Exit status: 0 done; 1 doctor found something missing, or training met a bad step or lost a process; 2 bad input (one
line says what); 128 + signal: stopped with a checkpoint, the same command goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_genhancer import __version__, recipes
from llava_genhancer.ablate.grids import NAMES
from llava_genhancer.arguments import Parser, Verbs, add_fields, path, prepare_streams
from llava_genhancer.enhance import commands as enhancing
from llava_genhancer.errors import InputError, disk_failure, lost_rank, out_of_memory, print_error, reason
from llava_genhancer.evaluate import commands as measuring
from llava_genhancer.llava import commands as training


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and exit with its status."""
    prepare_streams()
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        status = _fail(2, error)
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
        advice = (
            "lower --per_device_batch_size (or --batch_size), add --gradient_checkpointing true, or use "
            "configs/deepspeed/zero3.json"
        )
        return 2, f"out of GPU memory: {advice}"
    if out_of_memory(error):
        return 2, "out of memory: use a smaller model or batch (`llava-genhancer doctor RECIPE` says what is needed)"
    return None


def _fail(status: int, message: object) -> int:
    """Print one line, once for all ranks with the same error, and return the status."""
    with contextlib.suppress(OSError):  # nobody reads
        print_error(message)
    return status


def _run(argv: list[str]) -> int:
    parser = _parser()
    # The deepspeed launcher puts --local_rank=N before everything else; the rank comes through the environment too.
    argv = [a for a in argv if not a.startswith("--local_rank=")]
    args, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(f"unknown argument {rest[0]}; see `llava-genhancer {args.verb} --help`")
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=sys.stderr)
    if not args.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # its errors come as exceptions too
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # accelerate imports DeepSpeed where it is installed, which then writes this to stdout, wanted or not.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    status = int(args.run(args) or 0)
    sys.stdout.flush()  # a reader that has gone shows here, not in the interpreter's last breath
    return status


def _parser() -> Parser:
    parser = Parser(prog="llava-genhancer", description="Better eyes for LLaVA (GenHancer, arXiv 2503.19480).")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = Verbs(parser, "verb")

    sub = verbs.add("doctor", _doctor, "Check this machine for a recipe, or what a LLaVA fork will do with a tower.")
    sub.add_argument("recipe", nargs="?", default="openai-l14-224")
    sub.add_argument("--deepspeed", type=path, metavar="JSON", help="predict memory under this ZeRO stage")
    sub.add_argument("--gpus", type=int, help="predict for this many GPUs (default: those found here)")
    sub.add_argument("--output_dir", type=path, metavar="RUN", default=".", help="where the run would go")
    sub.add_argument("--fork", type=path, metavar="DIR", help="instead: a LLaVA fork's checkout, with --tower")
    sub.add_argument("--tower", type=path, metavar="DIR", help="the tower folder that the fork is to take")
    add_fields(sub, recipes.Recipe())

    enhancing.add_verbs(verbs)
    training.add_verbs(verbs)
    measuring.add_verbs(verbs)

    sub = verbs.add(
        "ablate",
        _ablate,
        "Repeat an ablation of the paper: train every cell, print the table beside the paper's. The same command goes "
        "on.",
        epilog="Any recipe field is an option and goes to every cell, for example --stage2.max_steps 2000.",
    )
    sub.add_argument("ablation", choices=NAMES, metavar="ABLATION", help=", ".join(NAMES))
    sub.add_argument("--recipe", default="tiny", help="what cells start from (default: tiny)")
    sub.add_argument(
        "--output_dir", type=path, metavar="OUT", help="for OUT/CELL/seed-N and the page (default: runs/NAME-RECIPE)"
    )
    sub.add_argument("--seeds", type=int, default=1, help="repeat every cell with this many seeds")
    sub.add_argument("--mmvp", type=path, metavar="DIR", help="MMVP-VLM's folder (the toy world has its own)")
    sub.add_argument(
        "--zero_shot", type=path, metavar="DIR", help="folder of zero-shot data sets (the toy world has its own)"
    )
    sub.add_argument("--deepspeed", type=path, metavar="JSON", help="for trainings on GPUs (default: zero2)")
    sub.add_argument("--hostfile", type=path, help="DeepSpeed's, for several machines")
    sub.add_argument("--dry_run", action="store_true", help="print the plan and what it costs, do nothing")
    add_fields(sub, recipes.Recipe())

    sub = verbs.add(
        "demo",
        _demo,
        "The whole chain in the toy world: enhance, train LLaVA without and with it, measure, report. No download, "
        "minutes on a CPU.",
    )
    sub.add_argument("--output_dir", type=path, metavar="RUN", default="runs/tiny")
    sub.add_argument("--seeds", type=int, default=1, help="repeat with this many seeds and report over them")
    add_fields(sub, recipes.Recipe())
    return parser


def _doctor(args: Any) -> int:
    from llava_genhancer.doctor import examine, examine_fork

    if args.fork is not None or args.tower is not None:
        if args.fork is None or args.tower is None:
            raise InputError("--fork and --tower go together: doctor --fork DIR --tower DIR")
        return examine_fork(args.fork, args.tower)
    return examine(
        enhancing.chosen_recipe(args.recipe, None, args.fields),
        deepspeed=args.deepspeed,
        gpus=args.gpus,
        run_dir=args.output_dir,
    )


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
