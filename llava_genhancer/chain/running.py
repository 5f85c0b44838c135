"""The chain's plan in words, and its steps run in order up to the first that fails."""

from __future__ import annotations

import contextlib
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_genhancer.chain import fork
from llava_genhancer.chain.needs import TINY_NEEDS
from llava_genhancer.chain.steps import Choices, Step
from llava_genhancer.errors import InputError
from llava_genhancer.resources import resource_dir
from llava_genhancer.run import read_json, write_json
from llava_genhancer.toyworld.paths import cache_folder

COMMANDS = Path("eval") / "commands.json"  # in the run folder


def words_of(step: Step, choices: Choices) -> list[str]:
    """The whole command of a step, as a shell would run it."""
    zero = choices.deepspeed or (str(resource_dir("configs") / "deepspeed" / f"{step.zero}.json") if step.zero else "")
    if step.fork is not None:
        return fork.launched(choices.fork_python, step.command, zero if choices.gpus else None, choices.hostfile)
    if step.zero is None or not choices.gpus:
        return [sys.executable, "-m", "llava_genhancer", *step.command]
    hosts = ["--hostfile", choices.hostfile] if choices.hostfile else []
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *hosts, "--module", "llava_genhancer"]
    return [*launcher, *step.command, "--deepspeed", zero]


def first(steps: Sequence[Step], start: str | None) -> int:
    """The number of the step called ``start``; 0 without one.

    Raises:
        InputError: no step is called so.
    """
    names = [step.name for step in steps]
    if start is not None and start not in names:
        raise InputError(f"--from {start}: this plan has the steps {', '.join(names)}")
    return names.index(start) if start else 0


def done_before(step: Step, choices: Choices) -> bool:
    """Whether a step has a result that is newer than its sources and that no other command has made.

    A result without a recorded command, as of a call by hand, counts.
    """
    return step.done_before() and _commands(choices).get(step.name) in (None, list(step.command))


def _commands(choices: Choices) -> dict[str, list[str]]:
    """The command that made each step's result, by the step's name."""
    path = choices.run_dir / COMMANDS
    commands: dict[str, list[str]] = read_json(path) if path.exists() else {}
    return commands


def show(steps: Sequence[Step], choices: Choices, start: str | None = None) -> str:
    """The plan in words: each step's needs and command, and which steps ``start`` leaves out."""
    left_out = steps[: first(steps, start)]
    lines = [f"{choices.preset}: {', '.join(step.name for step in steps)} -> {choices.run_dir}"]
    if choices.preset == "tiny":
        lines.append(f"needs {TINY_NEEDS} ({cache_folder()})")
    for step in steps:
        why = "  (left out)" if step in left_out else "  (done before)" if done_before(step, choices) else ""
        lines.append(f"\n{step.name}{why}")
        lines += [f"  {need}" for need in step.needs]
        place = f"cd {shlex.quote(str(step.fork))} && " if step.fork else ""
        lines.append(f"  $ {place}{shlex.join(words_of(step, choices))}")
    return "\n".join(lines)


def run(steps: Sequence[Step], choices: Choices, start: str | None = None) -> int:
    """Run the steps, from ``start`` on; ends at the first that fails.

    Returns:
        The failed step's exit status, or 0.

    Raises:
        InputError: no step is called ``start``.
    """
    asked = steps[first(steps, start) :]
    if choices.preset == "tiny":
        from llava_genhancer.toyworld.writers import prepare

        prepare()
    for step in asked:
        if done_before(step, choices):
            print(f"== {step.name}: done before ({step.result})", flush=True)
            continue
        if step.fork is not None and step.done_before():  # LLaVA would go on from the other training's checkpoints
            raise InputError(
                f"{step.result} is of another command ({choices.run_dir / COMMANDS}, {step.name}): choose another "
                "--output_dir, or repeat the options of before"
            )
        print(f"== {step.name}", flush=True)
        began = time.monotonic()
        status = run_step(step, choices)
        if status:
            print(
                f"enhance_then_llava: {step.name} ended with status {status}: the lines above say why; repeat the "
                "command to go on",
                file=sys.stderr,
            )
            return status
        if step.result is not None:
            write_json(choices.run_dir / COMMANDS, {**_commands(choices), step.name: list(step.command)})
        print(f"== {step.name}: {time.monotonic() - began:.0f} s", flush=True)
    return 0


def run_step(step: Step, choices: Choices) -> int:
    """One step's exit status: in this process, or by the launcher that a training on GPUs needs."""
    if step.fork is None and (step.zero is None or not choices.gpus):
        before, sys.argv = sys.argv, ["llava-genhancer", *step.command]  # manifests tell what was called
        try:
            # `python -m llava_genhancer` in this process: the libraries are loaded once
            runpy.run_module("llava_genhancer", run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            sys.argv = before
        return 0
    # DeepSpeed looks for ninja on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return _call(words_of(step, choices), step.fork, {**os.environ, "PATH": path})


def _call(words: Sequence[str], folder: Path | None, environment: Mapping[str, str]) -> int:
    """A command's exit status. Signals that ask it to stop are its to answer: it saves, and we wait for that."""
    with subprocess.Popen(words, cwd=folder, env=environment) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            while True:
                with contextlib.suppress(KeyboardInterrupt):  # the terminal sent it to the child as well
                    status = child.wait()
                    return status if status >= 0 else 128 - status
        finally:
            signal.signal(signal.SIGTERM, before)
