"""Run a LLaVA fork's trainer, or its evaluation, with llava_genhancer.tower.register() called first.

    python -m llava_genhancer.launch llava.train.train_mem --vision_tower TOWER ...
    deepspeed --module llava_genhancer.launch llava.train.train_mem --deepspeed zero3.json ...
    python -m llava_genhancer.launch llava.eval.model_vqa --model-path CHECKPOINT ...

Start in the fork's folder. The first argument names a module of the fork, or its file; all others go to that module.
A checkpoint stores the tower's path and loads the tower from there, so what was trained with register() must be
evaluated with register() too: start the fork's evaluation in the same way, or call register() before the checkpoint is
loaded. `llava-genhancer doctor --fork DIR --tower DIR` prints the lines for a fork and a tower.
"""

# The module is imported under its own name, so that the classes it pickles can be unpickled without this launcher. Then
# its `if __name__ == "__main__":` block runs (LLaVA's train_mem asks for flash-attention there), or else its train().
# This file needs what the tower needs, and runs on Python 3.10.

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from llava_genhancer.errors import InputError, print_error


def main(argv: Sequence[str] | None = None) -> None:
    """Run :func:`launch`; print bad input as one line and exit with status 2. Other errors are the trainer's own."""
    try:
        launch(list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        print_error(error, "llava_genhancer.launch")
        sys.exit(2)


def launch(argv: list[str]) -> None:
    """Register, import the fork's module and run it; print what evaluating needs if a training built our tower.

    Raises:
        InputError: no module named, none there, or it imports no tower builder that register() can replace.
    """
    # The deepspeed launcher puts --local_rank=N first; the trainer expects it among its own arguments.
    position = next((i for i, a in enumerate(argv) if not a.startswith("--local_rank=")), len(argv))
    if argv[position : position + 1] in (["--help"], ["-h"]):
        print(str(__doc__).strip())
        return

    from llava_genhancer.tower.forks import describe_layouts, register

    if position == len(argv) or argv[position].startswith("-"):
        raise InputError(
            "name the fork's trainer first: python -m llava_genhancer.launch llava.train.train_mem ... (or --help)"
        )
    name = _module_name(argv[position])
    arguments = argv[:position] + argv[position + 1 :]

    register()
    module = _import(name)
    builders = register()
    if not builders:
        raise InputError(
            f"{name} loaded no tower builder that register() can replace: looked for {describe_layouts()}. A CLIP "
            "tower may do without: start the fork's own script; see `llava-genhancer doctor --fork DIR --tower DIR`"
        )
    sys.argv = [str(module.__file__), *arguments]
    run_main(module)
    if ".train" in f".{name}" and os.environ.get("RANK", "0") == "0":
        report(module, builders)


def report(module: ModuleType, builders: Sequence[str]) -> None:
    """Print how to evaluate what a trainer trained on towers of this package's class; nothing if it used its own."""
    from llava_genhancer.tower.choice import find_module

    choosers = [value for name in builders for value in vars(sys.modules[name]).values()]
    towers = sorted({tower for chooser in choosers for tower in getattr(chooser, "needed_later", ())})
    if not towers:
        return
    found = find_module(Path(str(module.__file__)).parents[1], "eval")
    package = module.__name__.rsplit(".", 2)[0]
    evaluation = f"{package}.eval.{found}" if found else "EVALUATION_MODULE"
    print(
        f"llava_genhancer.launch: {', '.join(towers)} was built by llava_genhancer's class, so loading the checkpoint "
        f"needs register() too: evaluate with `python -m llava_genhancer.launch {evaluation} --model-path CHECKPOINT "
        "...`, or call llava_genhancer.tower.register() first; keep the tower at this path",
        flush=True,
    )


def _module_name(trainer: str) -> str:
    """``llava/train/train_mem.py``, as forks' scripts write it, is ``llava.train.train_mem``."""
    if not trainer.endswith(".py"):
        return trainer
    path = Path(trainer)
    path = path.resolve().relative_to(Path.cwd()) if path.is_absolute() and Path.cwd() in path.parents else path
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{trainer} is outside this folder: start in the fork's own folder, or name the module")
    return ".".join(path.with_suffix("").parts)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if name == missing or name.startswith(f"{missing}."):
            raise InputError(f"no module {name} here: start in the fork's folder, or install the fork") from None
        raise


def run_main(module: ModuleType) -> None:
    """Run a module's main block under the module's own name, or else its ``train()``.

    Raises:
        InputError: the module has neither.
    """
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If) and _is_main_test(node.test)]
    namespace: dict[str, Any] = vars(module)
    if blocks:
        body = ast.Module([statement for block in blocks for statement in block.body], type_ignores=[])
        exec(compile(body, str(module.__file__), "exec"), namespace)
    elif callable(namespace.get("train")):
        namespace["train"]()
    else:
        raise InputError(f"{module.__name__} has neither a main block nor a train(): it is not a fork's trainer")


def _is_main_test(test: ast.expr) -> bool:
    return ast.unparse(test).replace('"', "'") in ("__name__ == '__main__'", "'__main__' == __name__")


if __name__ == "__main__":
    main()
