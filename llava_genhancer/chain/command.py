"""The arguments of ``scripts/enhance_then_llava.sh``, and the chain they ask for."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_genhancer.arguments import path, prepare_streams
from llava_genhancer.chain.running import run, show
from llava_genhancer.chain.steps import LLAVA, PRESETS, Choices, chosen_data, plan, split_fields
from llava_genhancer.errors import InputError
from llava_genhancer.fields import field_types, override, suggest_field
from llava_genhancer.llava.recipes import LlavaRecipe, get_recipe
from llava_genhancer.recipes import Recipe

PROG = "enhance_then_llava"
_PACKAGE = Path(__file__).resolve().parent.parent


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message}; --help says more\n")


def parser() -> argparse.ArgumentParser:
    """Long options must be written out, since any recipe field may follow."""
    p = _Parser(
        prog=PROG,
        allow_abbrev=False,
        description="Enhance a vision tower, train LLaVA-1.5 with it, measure both, report. Run it again to go on: "
        "what is finished is not done twice.",
        epilog="Any recipe field may follow: --stage2.max_steps 100 is the enhancement's, --llava.finetune.epochs 2 "
        "LLaVA's, --seed 1 both's. Several machines: --hostfile FILE (DeepSpeed's), or sbatch "
        "scripts/slurm_enhance_then_llava.sh. tiny takes minutes on a CPU and downloads nothing.",
    )
    p.add_argument("preset", metavar="PRESET", help=", ".join(PRESETS))
    p.add_argument("--output_dir", type=path, metavar="RUN", help="run folder (default: runs/PRESET)")
    p.add_argument("--recipe", metavar="NAME", help="how to enhance: another backbone or method, e.g. tiny-masked")
    p.add_argument("--tower", type=path, metavar="DIR", help="use this tower: nothing is enhanced")
    p.add_argument("--baseline", action="store_true", help="train with the original tower too (tiny always does)")
    p.add_argument(
        "--data", type=path, metavar="PATH", help="images to enhance with: tar shards, folder, dataset or LLaVA's JSON"
    )
    p.add_argument("--mmvp", type=path, metavar="DIR", help="MMVP-VLM's folder; without it that step is left out")
    p.add_argument(
        "--zero_shot", type=path, metavar="DIR", help="folder of zero-shot data sets; without it that step is left out"
    )
    p.add_argument("--llava_data", type=path, metavar="DIR", help="LLaVA's data (default: playground/data)")
    p.add_argument("--lmms_data", type=path, metavar="DIR", help="local copies of the benchmarks (default: the hub's)")
    p.add_argument("--fork", type=path, metavar="DIR", help="train LLaVA with the code of this fork's checkout")
    p.add_argument(
        "--fork_python", type=path, metavar="EXE", default="python", help="interpreter of the fork's environment"
    )
    p.add_argument("--hostfile", type=path, metavar="FILE", help="DeepSpeed's list of machines")
    p.add_argument(
        "--deepspeed", type=path, metavar="JSON", help="for every training (default: ZeRO-2, ZeRO-3 for finetuning)"
    )
    p.add_argument("--from", dest="start", metavar="STEP", help="start here; what comes before is taken as it is")
    p.add_argument("--dry_run", action="store_true", help="print the plan and stop")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan, run it, exit with the status of the step that failed or 0."""
    prepare_streams()
    try:
        status = _main(list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 0
    sys.exit(status)


def _main(argv: list[str]) -> int:
    options = parser()
    args, rest = options.parse_known_args(argv)
    _check_names(fields(rest), [option for option in options._option_string_actions if option.startswith("--")])
    choices = Choices(
        preset=args.preset,
        run_dir=Path(args.output_dir or f"runs/{args.preset}"),
        recipe=args.recipe,
        tower=args.tower,
        baseline=args.baseline,
        fork=args.fork,
        fork_python=args.fork_python,
        data=args.data,
        mmvp=args.mmvp,
        zero_shot=args.zero_shot,
        llava_data=args.llava_data,
        lmms_data=args.lmms_data,
        # A fork runs in its own folder.
        hostfile=str(Path(args.hostfile).absolute()) if args.hostfile else None,
        deepspeed=str(Path(args.deepspeed).absolute()) if args.deepspeed else None,
        world=_world(args.hostfile) if args.fork and args.preset != "tiny" else 1,
        fields=fields(rest),
    )
    steps = plan(choices)
    print(show(steps, choices, args.start), flush=True)
    if args.dry_run:
        return 0
    check(choices)
    return run(steps, choices, args.start)


def _check_names(given: Iterable[str], options: Sequence[str]) -> None:
    """Refuse a field that no recipe has, with the nearest of all names that could stand here.

    Raises:
        InputError: with the first such field.
    """
    theirs = field_types(LlavaRecipe)
    known = [*options, *field_types(Recipe), *(LLAVA + name for name in theirs)]
    for name in given:
        if name not in known and name not in theirs:  # the plan tells of a prefix that is left out
            raise InputError(f"unknown argument --{name}{suggest_field(name, known)}; --help lists all")


def fields(words: Sequence[str]) -> dict[str, str]:
    """``--name value`` and ``--name=value`` pairs.

    Raises:
        InputError: something else, or a name without a value.
    """
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise InputError(f"unexpected argument '{name}'; recipe fields are given as --name value")
        if not equals:
            if not rest:
                raise InputError(f"{name} needs a value")
            value = rest.pop(0)
        found[name.removeprefix("--")] = value
    return found


def check(choices: Choices) -> None:
    """What would stop the first step or a later one anyway, said before hours are spent.

    Raises:
        InputError: no lmms-eval, GPU, images or LLaVA data, no such tower, hostfile or fork, or a fork without us.
    """
    from llava_genhancer.chain.needs import check_lmms_eval

    for name, given in (
        ("--zero_shot", choices.zero_shot),
        ("--lmms_data", choices.lmms_data),
        ("--fork", choices.fork),
        ("--hostfile", choices.hostfile),
        ("--deepspeed", choices.deepspeed),
    ):
        if given is not None and not Path(given).exists():
            raise InputError(f"{name} {given} does not exist")
    tower = Path(choices.tower or ".")
    if not tower.is_dir() and (str(choices.tower).startswith((".", "/")) or tower.parent.is_dir()):  # else a hub id
        raise InputError(f"--tower {choices.tower} is not a folder")
    if choices.mmvp is not None and not (Path(choices.mmvp) / "Questions.csv").is_file():
        raise InputError(
            f"--mmvp {choices.mmvp} holds no Questions.csv: hf download MMVP/MMVP_VLM --repo-type dataset "
            f"--local-dir {choices.mmvp}"
        )
    if choices.fork is not None:
        _check_fork(choices.fork, choices.fork_python)
    check_lmms_eval()
    if not choices.gpus:
        return
    if choices.tower is None and choices.data is None:
        raise InputError(
            f"{choices.preset} needs images to enhance with: add --data PATH (tar shards, an image folder, a dataset "
            "or LLaVA's JSON), or --tower DIR to use a tower as it is"
        )
    llava = override(get_recipe(choices.preset), split_fields(choices.fields)[1])
    for name, data in chosen_data(choices, llava).items():
        if missing := data.missing():
            raise InputError(f"{missing[0]} is missing: the plan's step {name} shows the commands to get it")
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"torch finds no GPU here and {choices.preset} needs one: use the preset tiny")


def _check_fork(folder: Path, python: str) -> None:
    """The fork's environment has to know the fork and us."""
    for module, advice in (
        ("llava_genhancer.launch", f"install the adapter there: {python} -m pip install --no-deps {_PACKAGE.parent}"),
        ("llava.train.train", "give the fork's checkout, and with --fork_python the interpreter it was installed for"),
    ):
        find = f"import sys, importlib.util as u; sys.exit(u.find_spec({module!r}) is None)"
        try:
            found = subprocess.run([python, "-c", find], cwd=folder, capture_output=True).returncode == 0
        except OSError as error:
            raise InputError(f"--fork_python {python} cannot be started ({error.strerror})") from None
        if not found:
            raise InputError(f"{python} finds no {module} in {folder}: {advice}")


def _world(hostfile: str | None) -> int:
    """GPUs in all: those of this machine, or the hostfile's slots."""
    if hostfile is not None and Path(hostfile).is_file():
        lines = [line.partition("#")[0] for line in Path(hostfile).read_text().splitlines()]
        return max(1, sum(int(line.partition("slots=")[2] or 1) for line in lines if line.strip()))
    import torch

    return max(1, torch.cuda.device_count())
