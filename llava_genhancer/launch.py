"""Start a fork's own trainer with our towers registered.

    python -m llava_genhancer.launch llava.train.train_mem --vision_tower TOWER ...
    deepspeed --module llava_genhancer.launch llava.train.train_mem --deepspeed zero3.json ...

The trainer is imported under its own name, so that the classes it saves can be unpickled, and then does what its
``if __name__ == "__main__":`` says (LLaVA's train_mem asks for flash-attention there), or else calls its ``train()``.
Needs what the tower needs, and runs on Python 3.10.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from llava_genhancer.errors import InputError


def main(argv: Sequence[str] | None = None) -> None:
    """Register, import the trainer, run it. Bad input is one line and exit status 2; all else is the trainer's own."""
    try:
        launch(list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        print(f"llava_genhancer.launch: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)


def launch(argv: list[str]) -> None:
    """:func:`main` without its exit.

    Raises:
        InputError: no trainer named, none there, or no tower builder that we know came with it.
    """
    from llava_genhancer.tower.forks import describe_layouts, register

    # The deepspeed launcher puts --local_rank=N first; the trainer expects it among its own arguments.
    position = next((i for i, a in enumerate(argv) if not a.startswith("--local_rank=")), len(argv))
    if position == len(argv) or argv[position].startswith("-"):
        raise InputError("name the fork's trainer first: python -m llava_genhancer.launch llava.train.train_mem ...")
    name = _module_name(argv[position])
    arguments = argv[:position] + argv[position + 1 :]

    register()
    module = _import(name)
    builders = register()
    if not builders:
        raise InputError(f"{name} loaded no tower builder that is known here: looked for {describe_layouts()}")
    sys.argv = [str(module.__file__), *arguments]
    run_main(module)


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
    """Do what a module would do as a script, under its own name.

    Raises:
        InputError: it has neither a main block nor a ``train()``.
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
