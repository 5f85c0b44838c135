"""What every training here shares around its Trainer: arguments, DeepSpeed's order of events, results, weights.

:mod:`llava_genhancer.trainer` holds the Trainer itself; a training's own file says what is trained and on what.
"""

from __future__ import annotations

import difflib
import gc
import logging
import math
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

from llava_genhancer import run
from llava_genhancer.errors import InputError, plain, reason
from llava_genhancer.fields import Guards
from llava_genhancer.files import expand
from llava_genhancer.resources import resource_dir
from llava_genhancer.trainer import FINAL_FILE, ExactTrainer

log = logging.getLogger(__name__)
WRITE_AGAIN = "remove it and repeat the run's command, which then writes it anew from the last checkpoint"
# What a misspelt key is compared with; DeepSpeed knows many more.
DEEPSPEED_KEYS = (
    "bf16", "fp16", "gradient_accumulation_steps", "gradient_clipping", "optimizer", "scheduler", "train_batch_size",
    "train_micro_batch_size_per_gpu", "zero_optimization",
)  # fmt: skip


# Read by accelerate 1.15 and transformers 5.23 in place of arguments; `accelerate launch` sets them.
_LAUNCHER_SETTINGS = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# They choose where and how loudly, never what is computed.
_HARMLESS_SETTINGS = (
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_LOG_LEVEL",
    "ACCELERATE_TORCH_DEVICE",
)
_SWITCHED_OFF = ("", "0", "1", "false", "no", "none")

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_STARTED_TOGETHER = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_LAUNCH = "start with torchrun or deepspeed"


def _complete_launch(deepspeed: str | None) -> None:
    """Set what a single process lacks to be rank 0 of 1, if DeepSpeed (which else asks for MPI) or accelerate look."""
    missing = [name for name in _RENDEZVOUS if not os.environ.get(name)]
    if missing and (deepspeed is not None or "LOCAL_RANK" not in missing):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = dict(zip(_RENDEZVOUS, ("0", "1", "0", "127.0.0.1", port), strict=True))
        os.environ.update({name: alone[name] for name in missing})


def drop_launcher_settings() -> dict[str, str]:
    """Remove the environment variables by which accelerate changes precision, accumulation, plugins or compilation.

    The recipe and ``--deepspeed`` alone decide these. Call before any weights are loaded: under
    ``FSDP_CPU_RAM_EFFICIENT_LOADING`` transformers leaves the weights of all ranks but one unread.

    Returns:
        The variables that were removed, without those that switch nothing on.
    """
    found = [n for n in os.environ if n.startswith(_LAUNCHER_SETTINGS) and n not in _HARMLESS_SETTINGS]
    values = {name: os.environ.pop(name) for name in sorted(found)}
    return {name: value for name, value in values.items() if value.lower() not in _SWITCHED_OFF}


def check_launch() -> None:
    """Check the variables by which ranks find each other; call first, before any of them is read.

    One process needs none of them. Variables of accelerate's are dropped, and those that would have changed the run
    are named on rank 0.

    Raises:
        InputError: several processes that no launcher has joined, or variables that contradict each other.
    """
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if name in os.environ:
            if not os.environ[name].isdecimal():
                raise InputError(f"{name}={os.environ[name]} is no number: {_LAUNCH}, or unset it")
            numbers[name] = int(os.environ[name])
    missing = [name for name in _RENDEZVOUS if not os.environ.get(name)]
    for name in _STARTED_TOGETHER if missing else ():
        if os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1:
            raise InputError(
                f"{name}={os.environ[name]}: these processes would each train alone, since {', '.join(missing)} are "
                f"not set: {_LAUNCH} in place of mpirun or srun"
            )
    rank, world = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
    if missing and (world > 1 or rank > 0 or numbers.get("LOCAL_RANK", 0) > 0):
        given = ", ".join(f"{name}={os.environ[name]}" for name in _RENDEZVOUS if name not in missing)
        raise InputError(f"{given}, but {', '.join(missing)} are not set: {_LAUNCH}, or unset them all")
    if not rank < world:
        raise InputError(f"RANK={rank} must be below WORLD_SIZE={world}: {_LAUNCH}, or unset both")
    ignored = drop_launcher_settings()
    if ignored and os.environ.get("RANK", "0") == "0":
        log.warning(
            "ignored: %s; the recipe decides (--precision, --global_batch_size), and --deepspeed JSON",
            ", ".join(f"{name}={value}" for name, value in ignored.items()),
        )


def check_deepspeed(path: str | None, guards: Guards | None = None) -> None:
    """Refuse a DeepSpeed JSON that cannot be used, before anything is loaded.

    Args:
        guards: of the recipe that it will train.

    Raises:
        InputError: no such file, not JSON, a misspelt key (DeepSpeed would pass over it), a ZeRO section it refuses,
            or one under which it cannot leave out the steps that the guards want skipped.
    """
    if path is None:
        return
    path = expand(path)
    if not Path(path).is_file():
        raise InputError(
            f"--deepspeed {path} does not exist; {resource_dir('configs') / 'deepspeed'} has zero1, zero2, zero3 and "
            "zero3_offload"
        )
    settings = run.read_json(path)
    zero = settings.get("zero_optimization", {}) if isinstance(settings, dict) else None
    if not isinstance(zero, dict):
        raise InputError(f"--deepspeed {path} is no DeepSpeed configuration: it and its zero_optimization are objects")
    for key in settings:
        near = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1, cutoff=0.85)
        if near and key not in DEEPSPEED_KEYS:
            raise InputError(f"--deepspeed {path}: unknown key '{key}', did you mean '{near[0]}'?")
    if not torch.cuda.is_available():
        _prepare_deepspeed_on_cpu()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:  # "auto" is filled in later, from the training's arguments
        stage = DeepSpeedZeroConfig(**{k: v for k, v in zero.items() if v != "auto"}).stage
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise InputError(f"--deepspeed {path}: {where}: {first['msg']}") from None
    if guards is not None and guards.on_bad_step == "skip":
        # DeepSpeed steps by itself. Without ZeRO an fp32 one looks at no gradient; in bf16 it does unless told not to.
        bf16 = settings.get("bf16")
        blind = isinstance(bf16, dict) and bf16.get("check_grad_overflow") is False
        if stage == 0 or blind:
            what = "bf16.check_grad_overflow: false" if blind else "zero_optimization.stage 0"
            raise InputError(
                f"--deepspeed {path}: DeepSpeed may take bad steps under {what}, so --on_bad_step skip cannot be kept: "
                f"{'remove that' if blind else 'use stage 1, 2 or 3, or no --deepspeed'}"
            )


def accumulation(global_batch_size: int, per_device_batch_size: int) -> int:
    """Micro-batches per optimizer step on each rank of this launch.

    Raises:
        InputError: the global batch does not divide over ranks and micro-batches.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if global_batch_size % (per_device_batch_size * world):
        raise InputError(
            f"global_batch_size={global_batch_size} is not a multiple of {world} ranks x "
            f"per_device_batch_size={per_device_batch_size}: change one of them"
        )
    return global_batch_size // (per_device_batch_size * world)


def training_arguments(
    stage_dir: Path,
    deepspeed: str | None,
    *,
    global_batch_size: int,
    per_device_batch_size: int,
    timeout_minutes: float = 30.0,
    **fields: Any,
) -> TrainingArguments:
    """What holds for every training, and ``fields`` on top. Building it joins the process group.

    Collectives wait a little longer than ``timeout_minutes``: the trainer's watchdog, which knows more, speaks first.

    Raises:
        InputError: the global batch does not divide over ranks and micro-batches, or the JSON is not usable.
    """
    on_cpu = not torch.cuda.is_available()
    deepspeed = None if deepspeed is None else expand(deepspeed)
    _complete_launch(deepspeed)
    if deepspeed is not None and on_cpu:
        _prepare_deepspeed_on_cpu()
    steps = accumulation(global_batch_size, per_device_batch_size)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(stage_dir / "tensorboard")
    try:
        common: dict[str, Any] = {
            "output_dir": str(stage_dir),
            "per_device_train_batch_size": per_device_batch_size,
            "gradient_accumulation_steps": steps,
            "optim": "adamw_torch_fused",  # one pass over weights and moments; on CPUs too
            "use_cpu": on_cpu,
            "ddp_timeout": math.ceil(60 * timeout_minutes * 1.25) + 5,
            "ddp_backend": "gloo" if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
            "deepspeed": deepspeed,
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "save_strategy": "steps",
            "ignore_data_skip": True,
            "remove_unused_columns": False,
            "average_tokens_across_devices": False,
            "report_to": ["tensorboard"],
            "disable_tqdm": True,
        }
        args = TrainingArguments(**{**common, **fields})
        if args.n_gpu > 1:  # one process drives one device; nn.DataParallel would split our batches
            args._n_gpu = 1
        if deepspeed is not None and on_cpu:
            import deepspeed as ds

            ds.init_distributed(dist_backend="gloo")
        return args
    except (ValueError, OSError, KeyError) as error:
        if deepspeed is None:
            raise
        raise InputError(f"--deepspeed {deepspeed}: {reason(error)}") from None


def zero_stage(args: TrainingArguments) -> int | None:
    """The ZeRO stage in use, None without DeepSpeed."""
    return int(args.hf_deepspeed_config._stage) if args.deepspeed else None


def _prepare_deepspeed_on_cpu() -> None:
    """Run without DeepSpeed's compiled shared-memory op: gloo does the same, and no compiler is needed."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def without_zero_init(args: TrainingArguments) -> Iterator[None]:
    """Build the model whole even under ZeRO-3; DeepSpeed shards it afterwards (mixed parts break bf16)."""
    config = args.hf_deepspeed_config if args.deepspeed else None
    if config is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def forget() -> None:
    """Free memory and accelerate's one global plugin state, so that a second training can build its own."""
    from accelerate.state import AcceleratorState, GradientState

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    drop_launcher_settings()  # accelerate keeps its own plugins there for a next training
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()


def barrier() -> None:
    """Wait for all ranks, if there are several."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


# --- results ------------------------------------------------------------------------------------------------------


def stage_result(stage_dir: Path) -> dict[str, Any] | None:
    """The facts of a finished stage, or None."""
    path = stage_dir / "result.json"
    if not path.exists():
        return None
    result, weights = run.read_json(path), stage_dir / FINAL_FILE
    if not isinstance(result, dict) or "weights_bytes" not in result:
        raise InputError(f"{path} is not what a finished stage writes: remove it and repeat the run's command")
    if not weights.is_file() or weights.stat().st_size != result["weights_bytes"]:
        return None
    return result


def finish_stage(trainer: ExactTrainer, final: Path, seconds: float, **facts: Any) -> None:
    """Gather the data report, put the weights in place, and write ``result.json`` last."""
    reports: list[Any] = [trainer.loader.report().to_dict()]
    if trainer.cpu_group is not None:
        reports = [None] * trainer.world_size
        dist.all_gather_object(reports, trainer.loader.report().to_dict(), group=trainer.cpu_group)
    if trainer.leads:
        stage_dir, read = trainer.stage_dir, trainer.data_facts(_add_reports(reports))
        skipped = read["skipped"]
        weights = stage_dir / FINAL_FILE
        weights.unlink(missing_ok=True)
        try:
            os.link(final / FINAL_FILE, weights)
        except OSError:  # no hard links here
            shutil.copyfile(final / FINAL_FILE, weights)
        history = run.read_json(stage_dir / "log_history.json")
        run.write_json(
            stage_dir / "result.json",
            {
                **facts,
                "steps": trainer.args.max_steps,
                "final_loss": history[-1]["loss"] if history else None,
                "images_seen": trainer.args.max_steps
                * trainer.args.train_batch_size
                * trainer.args.gradient_accumulation_steps
                * trainer.world_size,
                "seconds": round(seconds, 1),
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
                "parameters": {
                    name: sum(map(_numel, part.parameters())) for name, part in trainer.model.named_children()
                },
                "trainable_parameters": sum(_numel(p) for p in trainer.model.parameters() if p.requires_grad),
                **read,
                "skipped_steps": trainer.guard.skipped,
                "weights_bytes": weights.stat().st_size,
                "weights_sha256": run.read_json(final / run.MARKER)["files"][FINAL_FILE]["sha256"],
            },
        )
        if skipped["skipped"]:
            log.warning(
                "%s: %d of %d images could not be used (%s%s); more in %s",
                stage_dir.name,
                skipped["skipped"],
                skipped["read"],
                plain("; ".join(f"{key}: {why}" for key, why in skipped["keys"][:3])),
                "; ..." if len(skipped["keys"]) > 3 else "",
                stage_dir / "result.json",
            )
    trainer.barrier()


def _numel(parameter: Any) -> int:
    """ZeRO-3 leaves an empty tensor behind and keeps the true size beside it."""
    return int(parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel())


def _add_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ranks' reports as one; what every rank saw of the whole data (``left_out``) is the same in all."""
    total = dict(reports[0])
    for report in reports[1:]:
        for name, value in report.items():
            if isinstance(value, dict) and name != "left_out":
                total[name] = {k: total[name].get(k, 0) + value.get(k, 0) for k in {**total[name], **value}}
            elif not isinstance(value, dict):
                total[name] = total[name] + value
    return total


def read_trained(file: Path) -> dict[str, torch.Tensor]:
    """A stage's trained weights by name.

    Raises:
        InputError: missing or damaged file.
    """
    try:
        state = load_file(file)
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({reason(error)}): {WRITE_AGAIN}") from None
    result = stage_result(file.parent) if file.name == FINAL_FILE else None
    if result is not None and run.sha256(file) != result["weights_sha256"]:
        raise InputError(f"{file} is not what the training wrote (its SHA-256 is another): {WRITE_AGAIN}")
    return state


def load_trained(model: nn.Module, file: Path, names: Collection[str] = (), *, part: str = "") -> None:
    """Load a stage's trained weights into ``model``; every tensor must have its place and shape.

    Args:
        names: parameters that the file must hold.
        part: only weights whose names start so are loaded.

    Raises:
        InputError: missing, damaged or foreign file, or one with a gap.
    """
    state = read_trained(file)
    absent = sorted(set(names) - state.keys())
    if absent:
        raise InputError(f"{file} lacks {len(absent)} weights (first: {absent[0]}): {WRITE_AGAIN}")
    parameters = dict(model.named_parameters())
    state = {name: value for name, value in state.items() if name.startswith(part)}
    for name, value in state.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise InputError(f"{file} was trained with another recipe: {name} {tuple(value.shape)} has no place here")
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)
