"""transformers.Trainer, made exact: checkpoints that count only when whole, streams that resume, stops that save.

Nothing here knows what is trained; a training gives a model whose forward returns the loss, and a loader with
``state_dict``/``load_state_dict``. The rules behind it: the loader never goes through ``accelerator.prepare`` (which
would read rank 0's shards only), its state is saved per rank beside the RNG files, and a checkpoint's marker is written
by rank 0 after a barrier.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from llava_genhancer import run
from llava_genhancer.callbacks import Flow, Progress
from llava_genhancer.errors import InputError

log = logging.getLogger(__name__)
MODEL_FILE = "trained.safetensors"  # the trained weights of a checkpoint written without DeepSpeed
FINAL_FILE = "weights.safetensors"  # fp32 result, inside the last checkpoint of a training


class Loader(Protocol):
    """What the trainer asks of its data."""

    def __iter__(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def report(self) -> Any: ...
    def close(self) -> None: ...


class TrainingStopped(Exception):
    """A signal ended training after a complete checkpoint; ``signum`` says which."""

    def __init__(self, step: int, signum: int):
        super().__init__(
            f"stopped at step {step} by {signal.Signals(signum).name}; the same command goes on from there"
        )
        self.step, self.signum = step, signum


class NonFiniteLoss(RuntimeError):
    """The loss or a trained weight became NaN or infinite; the message names step, rank and the batch's keys."""


class _Loss:
    """A micro-batch's loss on its way to the CPU; asking for it waits for its own copy, not for later work."""

    def __init__(self, loss: Tensor, step: int, keys: list[str]):
        self.step, self.keys = step, keys
        self._value = loss.detach().to("cpu", non_blocking=True)  # from a GPU: into pinned memory
        self._copied = torch.cuda.Event() if loss.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def value(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)


class ExactTrainer(Trainer):
    """A Trainer whose interrupted run ends with the weights of an uninterrupted one (bit-identical on CPU).

    Args:
        model: ``forward(...)`` returns the loss; subclasses that need more override ``compute_loss``.
        args: from :func:`training_arguments`.
        loader: endless batches; each a dict with ``keys``, the samples' names, for messages.
        keep_checkpoints: complete checkpoints kept.
        facts: what must be equal on resume (world size, workers, ...); stored in every checkpoint's marker.
        snapshot_steps: steps whose trained weights are kept in ``snapshots/step-N.safetensors``.
        decay_all: weight decay on biases and norms too.
        optimizer: class and arguments; None is torch's AdamW by the arguments of ``args``.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        loader: Loader,
        *,
        keep_checkpoints: int,
        facts: dict[str, Any],
        snapshot_steps: Iterable[int] = (),
        decay_all: bool = False,
        optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.decay_all = decay_all
        super().__init__(model=model, args=args, callbacks=callbacks, optimizer_cls_and_kwargs=optimizer)
        self.remove_callback(PrinterCallback)
        self.loader = loader
        self.keep_checkpoints = keep_checkpoints
        self.facts = facts
        self.snapshot_steps = frozenset(snapshot_steps)
        self.stage_dir = Path(args.output_dir)
        self.rank, self.world_size = args.process_index, args.world_size
        # Flags and barriers travel on the CPU: they never wait for the device.
        distributed = dist.is_available() and dist.is_initialized() and self.world_size > 1
        self.cpu_group: Any = dist.new_group(backend="gloo") if distributed else None
        self.stop_signal = 0
        self._runner = _deepspeed_runner()
        self._unchecked: deque[_Loss] = deque()
        self.last_log = (time.monotonic(), 0)
        self.add_callback(Flow(self))
        self.add_callback(Progress(self))

    # --- running -------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train from the last complete checkpoint, or from the start, to the end.

        Returns:
            The final checkpoint; it holds the trained weights in fp32 as ``weights.safetensors``.

        Raises:
            TrainingStopped: SIGINT or SIGTERM, after a checkpoint.
            NonFiniteLoss: the loss is NaN or infinite; no checkpoint holds the damage.
            InputError: the checkpoint belongs to another world size or number of workers.
        """
        checkpoint = self._choose_checkpoint()
        if checkpoint is not None and (checkpoint / FINAL_FILE).exists():
            self._load_data_position(checkpoint)  # for the report of what was skipped
            return checkpoint
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            self.loader.close()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        # A signal in the last step ends the program too, though nothing is left to train here.
        if self.agreed_stop() or self.state.global_step < self.args.max_steps:
            raise TrainingStopped(self.state.global_step, self.stop_signal or signal.SIGTERM)
        return self.stage_dir / f"checkpoint-{self.state.global_step}"

    def _choose_checkpoint(self) -> Path | None:
        """The newest whole checkpoint, the same on every rank; later leftovers are removed."""
        chosen: list[Any] = [None, None]
        if self.rank == 0:
            path = run.last_complete_checkpoint(self.stage_dir)
            facts = run.complete_facts(path, verify=False) if path else None
            step = int(path.name.split("-")[1]) if path else -1
            for other in run.checkpoints(self.stage_dir):
                if int(other.name.split("-")[1]) > step:
                    log.warning("removing %s: it is not whole (a crash while it was written, or damage since)", other)
                    shutil.rmtree(other, ignore_errors=True)
            chosen = [path, facts]
        if self.cpu_group is not None:
            dist.broadcast_object_list(chosen, src=0, group=self.cpu_group)
        path, facts = chosen
        if path is None:
            return None
        changed = [f"{k} was {facts.get(k)}, is {v}" for k, v in self.facts.items() if facts.get(k) != v]
        if changed:
            raise InputError(
                f"{path} cannot be resumed exactly: {'; '.join(changed)}. Start it as before, or use a new --output_dir"
            )
        log.info("resuming from %s", path)
        return path

    def _on_signal(self, signum: int, frame: Any) -> None:
        if not self.stop_signal and self.rank == 0:
            # Straight to the descriptor: the signal may have come in the middle of a print, which cannot be re-entered.
            os.write(2, f"\n{signal.Signals(signum).name}: saving at the end of this step\n".encode())
        self.stop_signal = self.stop_signal or signum

    def agreed_stop(self) -> int:
        """The signal that any rank received, or 0; every rank gets the same answer."""
        if self._runner is not None and _deepspeed_runner() != self._runner:
            self._on_signal(signal.SIGTERM, None)
        if self.cpu_group is not None:
            flag = torch.tensor([self.stop_signal])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.cpu_group)
            self.stop_signal = int(flag)
        return self.stop_signal

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.cpu_group is not None:
            dist.barrier(group=self.cpu_group)

    # --- data, loss, optimizer ------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """The loader itself, not prepared by accelerate."""
        return self.loader

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All trained weights, or Trainer's choice (no biases, no norms)."""
        return [n for n, _ in model.named_parameters()] if self.decay_all else super().get_decay_parameter_names(model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's; ZeRO refuses parameter groups without parameters, so those go."""
        optimizer = super().create_optimizer(model)
        optimizer.param_groups = [g for g in optimizer.param_groups if g["params"]]
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. Its loss is looked at once the next one is queued, so that the device never runs dry."""
        self.check_losses(pending=1)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._unchecked.append(_Loss(loss, self.state.global_step + 1, list(inputs["keys"])))
        return loss

    def check_losses(self, pending: int = 0) -> None:
        """Raise NonFiniteLoss if a micro-batch's loss was NaN or infinite; the newest ``pending`` may wait."""
        while len(self._unchecked) > pending:
            loss = self._unchecked.popleft()
            value = loss.value()
            if math.isfinite(value):
                continue
            path = self.stage_dir / f"nonfinite-rank{self.rank}.json"
            run.write_json(path, {"step": loss.step, "rank": self.rank, "loss": str(value), "keys": loss.keys})
            raise NonFiniteLoss(
                f"the loss is {value} in step {loss.step} on rank {self.rank}; batch keys: {', '.join(loss.keys[:4])}"
                f"{', ...' if len(loss.keys) > 4 else ''} (all in {path}). No checkpoint holds the damage: lower the "
                "learning rate or look at those images, then repeat the command"
            )

    def check_weights(self) -> None:
        """Raise NonFiniteLoss if a trained weight is NaN or infinite: a finite loss may have a gradient that is not."""
        self.check_losses()
        for name, parameter in self.model.named_parameters():
            held = (
                parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
            )  # this rank's part under ZeRO-3
            if parameter.requires_grad and not torch.isfinite(held).all():
                raise NonFiniteLoss(
                    f"{name} is not finite after step {self.state.global_step} on rank {self.rank}, though every loss "
                    "was: a gradient overflowed. No checkpoint holds the damage: lower the learning rate, then repeat "
                    "the command"
                )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log with images/s over all ranks added."""
        if "loss" in logs:
            now, step = time.monotonic(), self.state.global_step
            then, before = self.last_log
            images = (step - before) * self.args.train_batch_size * self.args.gradient_accumulation_steps
            logs["images_per_second"] = round(images * self.world_size / max(now - then, 1e-9), 3)
            self.last_log = (now, step)
        super().log(logs, start_time)

    # --- saving and loading ---------------------------------------------------------------------------------------

    def trained_state(self) -> dict[str, Tensor]:
        """The trained weights in fp32 on the CPU, from the optimizer's master copy under DeepSpeed.

        Every rank must call it; only rank 0 gets the tensors.
        """
        state = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            value = None
            if self.is_deepspeed_enabled:
                from deepspeed.utils import safe_get_full_fp32_param

                value = safe_get_full_fp32_param(parameter)
            value = parameter if value is None else value
            if self.rank == 0:
                state[name] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        return state

    def save_trained(self, path: Path) -> None:
        """Write :meth:`trained_state` as safetensors (collective)."""
        state = self.trained_state()
        if self.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            save_file(state, partial, metadata={"format": "pt"})
            os.replace(partial, path)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trained weights only; under DeepSpeed the engine's own checkpoint holds them."""
        if not self.is_deepspeed_enabled and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            state = {n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
            save_file(state, folder / MODEL_FILE, metadata={"format": "pt"})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()
        step = self.state.global_step
        folder = self.stage_dir / f"checkpoint-{step}"
        super()._save_checkpoint(model, trial)
        torch.save(self.loader.state_dict(), folder / f"loader_{self.rank}.pt")
        if step >= self.args.max_steps:
            self.save_trained(folder / FINAL_FILE)
        self.barrier()
        if self.rank == 0:
            run.mark_complete(folder, step=step, **self.facts)
            run.rotate_checkpoints(self.stage_dir, self.keep_checkpoints)
            self.write_history()
        self.barrier()

    def write_history(self) -> None:
        """The log so far as ``log_history.json``."""
        run.write_json(self.stage_dir / "log_history.json", [e for e in self.state.log_history if "loss" in e])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        state = load_file(Path(resume_from_checkpoint) / MODEL_FILE)
        if set(state) != set(parameters):
            raise InputError(f"{resume_from_checkpoint} holds other weights than this training's")
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is None:
            return prepared
        folder = Path(resume_from_checkpoint)
        if self.is_deepspeed_enabled:  # not strict: frozen weights are not in the checkpoint
            loaded, _ = self.model_wrapped.load_checkpoint(str(folder), load_module_strict=False)
            if loaded is None:
                raise InputError(f"{folder} holds no DeepSpeed checkpoint: it was written without --deepspeed")
        self._load_optimizer_and_scheduler(str(folder))
        self._load_data_position(folder)
        return prepared

    def _load_data_position(self, folder: Path) -> None:
        self.loader.load_state_dict(torch.load(folder / f"loader_{self.rank}.pt", weights_only=True))


def _deepspeed_runner() -> int | None:
    """The process of the `deepspeed` command, two above a rank's; None without it.

    On one node it dies of a signal without passing it on, and the ranks would train to the end unattended.
    """
    parent = Path(f"/proc/{os.getppid()}")
    try:
        if b"deepspeed.launcher.launch" not in (parent / "cmdline").read_bytes():
            return None
        return int((parent / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # no /proc on this system
        return None
