"""transformers.Trainer, made exact: checkpoints that count only when whole, streams that resume, stops that save.

Nothing here knows what is trained; a training gives a model whose forward returns the loss, and a loader with
``state_dict``/``load_state_dict``. The rules behind it: the loader never goes through ``accelerator.prepare`` (which
would read rank 0's shards only), its state is saved per rank beside the RNG files, and a checkpoint's marker is written
by one rank, on every disk, once every rank has hashed its share of the files.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from llava_genhancer import files, run
from llava_genhancer.callbacks import Flow, Progress
from llava_genhancer.errors import InputError, disk_failure, reason
from llava_genhancer.fields import Guards
from llava_genhancer.guard import BadStep, LossGuard, LossSpike, NonFiniteLoss
from llava_genhancer.units import significant
from llava_genhancer.watchdog import Watchdog, launcher

__all__ = ["BadStep", "ExactTrainer", "LossSpike", "NonFiniteLoss", "TrainingStopped"]
log = logging.getLogger(__name__)
MODEL_FILE = "trained.safetensors"  # the trained weights of a checkpoint written without DeepSpeed
FINAL_FILE = "weights.safetensors"  # fp32 result, inside the last checkpoint of a training
# Files that a rank writes for itself: DeepSpeed's parts of the optimizer and, under ZeRO-3, of the model; noise; data.
OF_ONE_RANK = re.compile(r"(?:zero_pp_rank_|rng_state_|loader_)(\d+)[._][^/]*$")
GUARD_FILE = "guard.json"  # the loss guard's state, the same for all ranks


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


class ExactTrainer(Trainer):
    """A Trainer whose interrupted run ends with the weights of an uninterrupted one (bit-identical on CPU).

    Args:
        model: what :meth:`batch_loss`, which a subclass gives, calls.
        args: from :func:`training_arguments`.
        loader: endless batches; each a dict with ``keys``, the samples' names, for messages.
        keep_checkpoints: complete checkpoints kept.
        facts: what must be equal on resume (world size, workers, ...); stored in every checkpoint's marker.
        snapshot_steps: steps whose trained weights are kept in ``snapshots/step-N.safetensors``.
        decay_all: weight decay on biases and norms too.
        optimizer: class and arguments; None is torch's AdamW by the arguments of ``args``.
        guards: what to do about a loss that is not finite or far too high, and about a rank that hangs.
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
        guards: Guards | None = None,
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
        # By rank, the host; the ranks that share this one's disk, and the lowest of them; see _find_disks.
        self.hosts, self.disk, self.leader = [""] * self.world_size, list(range(self.world_size)), 0
        # Flags and barriers travel on the CPU: they never wait for the device.
        distributed = dist.is_available() and dist.is_initialized() and self.world_size > 1
        patience = timedelta(seconds=args.ddp_timeout)
        self.cpu_group: Any = dist.new_group(backend="gloo", timeout=patience) if distributed else None
        guards = guards or Guards()
        self.guard = LossGuard(guards, self.stage_dir, self.rank, self._total)
        self.watchdog = Watchdog(self.stage_dir, self.rank, self.world_size, 60 * guards.timeout_minutes)
        self.stop_signal = 0
        self._launcher = launcher()
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
            BadStep: the loss is not finite, or far too high; no checkpoint holds the damage.
            InputError: the checkpoint belongs to another world size or number of workers, or the disk refuses one.
        """
        checkpoint = self._choose_checkpoint()
        if checkpoint is not None and (checkpoint / FINAL_FILE).exists():
            self._load_data_position(checkpoint)  # for the report of what was skipped
            return checkpoint
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.watchdog:
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except InputError as error:
            if self.world_size == 1:
                raise
            raise InputError(f"rank {self.rank}: {error}") from None
        finally:
            self.loader.close()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        # A signal in the last step ends the program too, though nothing is left to train here.
        if self.agreed_stop() or self.state.global_step < self.args.max_steps:
            raise TrainingStopped(self.state.global_step, self.stop_signal or signal.SIGTERM)
        return self.stage_dir / f"checkpoint-{self.state.global_step}"

    def _find_disks(self) -> None:
        """Find out which ranks share a disk with this one, and who writes what is written once for a disk."""
        if self.cpu_group is None:
            return
        self.stage_dir.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(self.stage_dir)
        self.hosts = self._gathered(files.Process.current().host)
        first = self.args.local_process_index == 0
        names = self._gathered(files.beside(self.stage_dir / f"disk-{self.rank}").name if first else "")
        mine = self.stage_dir / names[self.rank] if names[self.rank] else None
        if mine is not None:
            mine.touch()
        self.barrier()
        found = [rank for rank, name in enumerate(names) if name and (self.stage_dir / name).exists()]
        leaders = self._gathered(min(found, default=self.rank))
        if mine is not None:
            mine.unlink(missing_ok=True)
        self.leader = leaders[self.rank]
        self.disk = [rank for rank, leader in enumerate(leaders) if leader == self.leader]
        if len(set(leaders)) > 1:
            log.info("rank %d: ranks %s share a disk", self.rank, self.disk)
            self.args.save_on_each_node = self.leads  # Trainer: the local rank 0 writes too
            if self.is_deepspeed_enabled:
                settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
                settings.setdefault("checkpoint", {})["use_node_local_storage"] = True

    @property
    def leads(self) -> bool:
        """Whether this rank writes what is written once for each disk."""
        return self.rank == self.leader

    def _choose_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole on every disk, the same on every rank; later leftovers are removed."""
        self._find_disks()
        whole = (p for p in run.checkpoints(self.stage_dir) if run.complete_facts(p, verify=False) is not None)
        there = {int(p.name.split("-")[1]) for p in whole}
        path, step = None, -1
        for number in sorted(set.intersection(*self._gathered(there)), reverse=True):
            folder = self.stage_dir / f"checkpoint-{number}"
            if all(self._gathered(self._verified(folder))):
                path, step = folder, number
                break
        if self.leads:
            for other in run.checkpoints(self.stage_dir):
                if int(other.name.split("-")[1]) > step:
                    log.warning("removing %s: it is not whole (a crash while it was written, or damage since)", other)
                    shutil.rmtree(other, ignore_errors=True)
        self.barrier()
        if path is None:
            return None
        facts = run.complete_facts(path, verify=False) or {}
        changed = [f"{k} was {facts.get(k)}, is {v}" for k, v in self.facts.items() if facts.get(k) != v]
        if changed:
            raise InputError(
                f"{path} cannot be resumed exactly: {'; '.join(changed)}. Start it as before, or use a new --output_dir"
            )
        log.info("resuming from %s", path)
        return path

    def _gathered(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.cpu_group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    # --- hashing ---------------------------------------------------------------------------------------------------

    def _share(self, sizes: dict[str, int]) -> list[str]:
        """The files of a checkpoint that this rank hashes.

        A rank's own files, which are in its host's memory still, are its own to hash. The others, which their disk's
        leader has written, are divided among the ranks of its host.
        """
        loads = dict.fromkeys(self.disk, 0)
        shares: dict[int, list[str]] = {rank: [] for rank in self.disk}
        rest = []
        for name, size in sizes.items():
            found = OF_ONE_RANK.search(name)
            if found and int(found[1]) in shares:
                shares[int(found[1])].append(name)
                loads[int(found[1])] += size
            else:
                rest.append(name)
        helpers = [rank for rank in self.disk if self.hosts[rank] == self.hosts[self.leader]]
        for name in sorted(rest, key=lambda name: (-sizes[name], name)):
            rank = min(helpers, key=lambda rank: (loads[rank], rank))
            shares[rank].append(name)
            loads[rank] += sizes[name]
        return shares[self.rank]

    def _hash(self, folder: Path, names: list[str], doing: str, *, sync: bool) -> dict[str, Any]:
        """Hash some files while the other ranks hash theirs, and return when all ranks are done (collective).

        No rank is silent meanwhile: its watchdog hears of every byte that any rank has read.
        """
        read, lock = 0, threading.Lock()

        def count(size: int) -> None:
            nonlocal read
            with lock:
                read += size

        ranks_here = self.hosts.count(self.hosts[self.rank])
        threads = max(1, min(8, (os.cpu_count() or 1) // ranks_here))
        with ThreadPoolExecutor(1, thread_name_prefix="hashing") as pool:
            task = pool.submit(files.hash_files, folder, names, threads=threads, sync=sync, progress=count)
            before = -1.0
            while True:
                wait([task], timeout=1.0)
                busy = self._total(float(not task.done()))
                total = self._total(float(read))
                if total != before:
                    self.watchdog.note(f"{doing} ({total / 1e9:.2f} GB so far, on all ranks)")
                    before = total
                if not busy:
                    return task.result()

    def _verified(self, folder: Path) -> bool:
        """Whether this rank's share of a checkpoint's files has the hashes that the marker lists (collective)."""
        try:
            listed = run.read_json(folder / run.MARKER)["files"]
            names = self._share({name: entry["bytes"] for name, entry in listed.items()})
        except (InputError, LookupError, TypeError, AttributeError):
            listed, names = {}, []
        try:
            hashed = self._hash(folder, names, f"verifying {folder.name}", sync=False)
        except OSError:
            return False
        return bool(listed) and all(hashed[name]["sha256"] == listed[name].get("sha256") for name in names)

    def _mark(self, folder: Path, **facts: Any) -> None:
        """Let a checkpoint count, on every disk with the files that are there (collective)."""
        sizes = {name: (folder / name).stat().st_size for name in run.content(folder)}
        shares = self._gathered(self._hash(folder, self._share(sizes), f"hashing {folder.name}", sync=True))
        if self.leads:
            hashed = {name: entry for rank in self.disk for name, entry in shares[rank].items()}
            # What one rank's listing lacked, as a network disk's may for a moment.
            missing = [name for name in run.content(folder) if name not in hashed]
            hashed |= files.hash_files(folder, missing, sync=True)
            run.mark_complete(folder, dict(sorted(hashed.items())), **facts)

    def _on_signal(self, signum: int, frame: Any) -> None:
        if not self.stop_signal and self.rank == 0:
            # Straight to the descriptor: the signal may have come in the middle of a print, which cannot be re-entered.
            os.write(2, f"\n{signal.Signals(signum).name}: saving at the end of this step\n".encode())
        self.stop_signal = self.stop_signal or signum

    def agreed_stop(self) -> int:
        """The signal that any rank received, or 0; every rank gets the same answer."""
        if self._launcher is not None and launcher() != self._launcher:
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

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step."""
        self.watchdog.note(f"reading the data of step {self.state.global_step + 1}")
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def batch_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Tensor:
        """The loss of a micro-batch, fp32 scalar; subclasses give it.

        Args:
            num_items: what is averaged over in the whole global batch, where the model divides by that.
        """
        raise NotImplementedError

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """:meth:`batch_loss`, past the guard."""
        loss = self.batch_loss(model, inputs, num_items_in_batch)
        step, last = self.state.global_step + 1, self.accelerator.sync_gradients
        loss = self.guard.before_backward(loss, step, inputs["keys"], last=last)
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. Its loss is looked at once the next one is queued, so that the device never runs dry."""
        step = self.state.global_step + 1
        self.watchdog.note(f"computing step {step}")
        self.guard.check(pending=1)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.after_backward(loss, step, list(inputs["keys"]))
        if self.guard.skips:  # Trainer's mean over the steps between two log entries must not become NaN
            loss = torch.where(loss.isfinite(), loss, torch.zeros_like(loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's, whose answer is the same on all ranks: where it is not finite the step may have to go."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.check_gradient(norm, self.state.global_step + 1, self.args.max_steps)
        if not self.guard.skips:
            return norm
        if self.is_deepspeed_enabled:  # ... which has taken the step, or dropped it, in its backward pass
            dropped = bool(self.accelerator.optimizer_step_was_skipped)
        else:
            dropped = not math.isfinite(float(norm))
        if dropped:
            if self.is_deepspeed_enabled:
                self.lr_scheduler.step()  # as it does without DeepSpeed, whatever becomes of the step
            else:
                self.optimizer.zero_grad()
            self.guard.drop(self.state.global_step + 1)
        return norm

    def _total(self, value: float) -> float:
        if self.cpu_group is None:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total, group=self.cpu_group)
        return float(total)

    def check_weights(self) -> None:
        """Raise NonFiniteLoss if a trained weight is NaN or infinite: a finite loss may have a gradient that is not."""
        self.guard.check()
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
        """Trainer's log with images/s over all ranks added, without what is not finite (a skipped step's gradient)."""
        logs = {k: v for k, v in logs.items() if math.isfinite(v)}
        if "loss" in logs:
            now, step = time.monotonic(), self.state.global_step
            then, before = self.last_log
            images = (step - before) * self.args.train_batch_size * self.args.gradient_accumulation_steps
            logs["images_per_second"] = significant(images * self.world_size / max(now - then, 1e-9))
            self.last_log = (now, step)
        super().log(logs, start_time)

    # --- saving and loading ---------------------------------------------------------------------------------------

    def trained_state(self) -> dict[str, Tensor]:
        """The trained weights in fp32 on the CPU, from the optimizer's master copy under DeepSpeed.

        Every rank must call it; only one rank for each disk, mostly rank 0 alone, gets the tensors.
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
            if self.leads:
                state[name] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        return state

    def save_trained(self, path: Path) -> None:
        """Write :meth:`trained_state` as safetensors (collective)."""
        state = self.trained_state()
        if self.leads:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(path.parent)
            with files.staged_file(path) as staging:
                save_file(state, staging, metadata={"format": "pt"})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trained weights only; under DeepSpeed the engine's own checkpoint holds them."""
        if not self.is_deepspeed_enabled and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            state = {n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
            with files.staged_file(folder / MODEL_FILE) as staging:
                save_file(state, staging, metadata={"format": "pt"})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()
        step = self.state.global_step
        self.watchdog.note(f"saving step {step}")
        folder = self.stage_dir / f"checkpoint-{step}"
        with self._writing(folder):
            super()._save_checkpoint(model, trial)
            torch.save(self.loader.state_dict(), folder / f"loader_{self.rank}.pt")
            if self.leads:
                run.write_json(folder / GUARD_FILE, self.guard.state_dict())
            if step >= self.args.max_steps:
                self.save_trained(folder / FINAL_FILE)
            self.barrier()
            self._mark(folder, step=step, **self.facts)
            if self.leads:
                run.rotate_checkpoints(self.stage_dir, self.keep_checkpoints)
                self.write_history()
            self.barrier()

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """A disk that is full takes the half-written checkpoint along, and says so in one line."""
        try:
            yield
        except Exception as error:
            why = disk_failure(error)
            if why is None:
                raise
            whole = run.complete_facts(folder, verify=False) is not None
            if not whole:
                shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(self.stage_dir).free / 2**20
            raise InputError(
                f"{folder} could not be written: {why}; {free:.0f} MiB are free there. Earlier checkpoints are whole: "
                "make room, then repeat the command"
            ) from None

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
            # The tag by name: DeepSpeed's file `latest` is on rank 0's disk alone.
            tag = next((p.name for p in folder.glob("global_step*")), None)
            loaded, _ = self.model_wrapped.load_checkpoint(str(folder), tag, load_module_strict=False)
            if loaded is None:
                raise InputError(f"{folder} holds no DeepSpeed checkpoint: it was written without --deepspeed")
        self._load_optimizer_and_scheduler(str(folder))
        self._load_data_position(folder)
        self.guard.load_state_dict(run.read_json(folder / GUARD_FILE))
        return prepared

    def data_facts(self, report: dict[str, Any]) -> dict[str, Any]:
        """What a finished training's result says of its data: the ranks' loader reports, added up, as ``skipped``."""
        return {"skipped": report}

    def _load_data_position(self, folder: Path) -> None:
        path = folder / f"loader_{self.rank}.pt"
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:  # its hash was right, so it was made to be wrong
            raise InputError(f"{path} is no data position ({reason(error)}): remove {folder}") from None
        self.loader.load_state_dict(state)
