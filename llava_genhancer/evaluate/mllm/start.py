"""How our lmms-eval model starts, or refuses to: lmms-eval itself reports an error and then exits with status 0."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

from llava_genhancer.errors import InputError, print_error, reason
from llava_genhancer.files import expand

RUN_VARIABLE = "LLAVA_GENHANCER_RUN"
# Where a checkpoint lies below what a user names: a checkpoint, a finetuning, a whole run.
_BELOW = (".", "hf", "llava-finetune/hf", "llava-finetune")


def checkpoint_folder(pretrained: str | None) -> Path:
    """The checkpoint of ``pretrained=``, or else of the run in ``$LLAVA_GENHANCER_RUN``.

    Raises:
        InputError: neither was given, or there is no checkpoint.
    """
    asked = pretrained or os.environ.get(RUN_VARIABLE)
    if not asked:
        raise InputError(
            "no model was named: give --model llava_genhancer --model_args pretrained=RUN/llava-finetune, "
            f"or set {RUN_VARIABLE} to a run's folder"
        )
    for place in _BELOW:
        folder = Path(expand(asked)) / place
        if (folder / "config.json").is_file():
            return folder
    origin = "pretrained" if pretrained else RUN_VARIABLE
    raise InputError(f"{origin}={asked} holds no LLaVA: no config.json there, nor in {', '.join(_BELOW[1:])} below it")


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Around a model's work: what goes wrong ends the process, past lmms-eval's net.

    An InputError becomes one line on stderr and status 2; anything else keeps its traceback, with status 1.
    """
    try:
        yield
    except InputError as error:
        print_error(error, "llava_genhancer")
        raise SystemExit(2) from None
    except Exception as error:
        traceback.print_exc()
        print_error(reason(error), "llava_genhancer")
        raise SystemExit(1) from None
