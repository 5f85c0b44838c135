"""The run as it is planned: its work, batch, memory and disk, beside what is here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_genhancer import costs, machine
from llava_genhancer.costs import GIB, Backbone, Vae, Zero
from llava_genhancer.doctor import devices
from llava_genhancer.doctor.devices import Gpu
from llava_genhancer.doctor.findings import NOTE, OK, PROBLEM, Finding, flops, gib, several
from llava_genhancer.recipes import Recipe
from llava_genhancer.units import duration, significant

CPU_DAYS = 3.0  # a training that takes longer than this on the CPU wants a GPU
A100 = 312e12  # dense bf16 FLOP/s, for a forecast where no GPU can be asked
WORKER_BYTES = 0.5 * GIB  # a data worker: imports and a shuffle block of undecoded images
SOME_IMAGES = 1_000  # what a cache costs is told for these where their number is not known


@dataclass(frozen=True)
class Plan:
    """A recipe with the facts that its cost is counted from, and the machine it is for.

    Attributes:
        ranks: devices that it would run on, here or elsewhere.
        gpus: those here.
        run_dir: where it would go.
        images: in its data, for the cache; None where that is not known.
    """

    recipe: Recipe
    backbone: Backbone
    vae: Vae
    zero: Zero
    ranks: int
    gpus: list[Gpu]
    run_dir: Path
    images: int | None = None

    def work(self, torch: Any) -> Iterator[Finding]:
        """How long the counted work takes at least; a GPU is a must where the CPU would take days."""
        recipe, ranks = self.recipe, self.ranks
        work = [costs.total_flops(recipe, stage, self.backbone, self.vae) for stage in (1, 2)]
        counted = f"stage 1 {flops(work[0])}, stage 2 {flops(work[1])}"
        if recipe.cache_crops:
            images = SOME_IMAGES if self.images is None else self.images
            work.append(costs.fill_flops(recipe, self.backbone, self.vae, images))
            counted += f", filling the cache {flops(work[2])}{self._per_images}"
        if torch is None:
            return
        if self.gpus:
            half = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
            try:
                rate = devices.matmul_rate(torch, "cuda", half, 8192)
            except RuntimeError:  # no memory free on it; the lines on memory say so
                yield Finding(OK, "compute", counted)
                return
            least = duration(sum(work) / rate / ranks)
            basis = f"{several(ranks, 'GPU')} at this one's measured {significant(rate / 1e12, 3):g} TFLOP/s"
            yield Finding(OK, "compute", f"{counted}: at least {least} on {basis}")
            return
        seconds = sum(work) / devices.matmul_rate(torch, "cpu", torch.float32, 512)
        cores = f"{several(os.cpu_count() or 1, 'CPU core')}, no GPU"
        if seconds > CPU_DAYS * 24 * 3600:
            gpu = f"{several(ranks, 'A100')} would take at least {duration(sum(work) / A100 / ranks)}"
            yield Finding(PROBLEM, "devices", cores, f"use a machine with a GPU ({gpu}); the recipe `tiny` runs here")
        else:
            yield Finding(OK, "devices", cores)
        yield Finding(OK, "compute", f"{counted}: at least {duration(seconds)} on this CPU")

    def shapes(self) -> Iterator[Finding]:
        """Whether image side and batch come out even."""
        recipe, ranks = self.recipe, self.ranks
        size = costs.target_size(recipe, self.backbone)
        # FLUX's tokens are 2x2 patches of latents.
        needed = self.vae.downscale * (2 if recipe.denoiser == "flow" else 1)
        if size % needed:
            todo = f"set --image_size or --target_size to a multiple of {needed}, or choose another target tokenizer"
            yield Finding(PROBLEM, "image size", f"{size} px do not fit the target tokenizer and the denoiser", todo)
        micro = recipe.per_device_batch_size * ranks
        if recipe.global_batch_size % micro:
            found = f"{recipe.global_batch_size} images are not a multiple of {ranks} x {recipe.per_device_batch_size}"
            yield Finding(PROBLEM, "batch", found, "change --global_batch_size or --per_device_batch_size")
        else:
            each = f"{ranks} x {recipe.per_device_batch_size} x {recipe.global_batch_size // micro} accumulated"
            yield Finding(OK, "batch", f"{each} = {recipe.global_batch_size} images")

    # --- memory -----------------------------------------------------------------------------------------------------

    def memory(self) -> Iterator[Finding]:
        """Each stage's peak on a device, and what the ranks here put into main memory."""
        gpus, ranks, zero = self.gpus, self.ranks, self.zero
        elsewhere = bool(gpus) or ranks > 1  # several ranks without a GPU are a forecast for another machine
        here = min((gpu.free for gpu in gpus[:ranks]), default=0.0)
        label = f"ZeRO-{zero.stage}" if zero.stage is not None else "no ZeRO"
        largest_host = 0.0
        for stage in (1, 2):
            if self.recipe.stage(stage).max_steps == 0:
                continue
            need = costs.memory(self.recipe, stage, self.backbone, self.vae, zero=zero, ranks=ranks, cuda=elsewhere)
            # On a CPU what counts as device memory is main memory.
            largest_host = max(largest_host, sum(need.host.values()) + (0 if elsewhere else need.total))
            parts = ", ".join(f"{name} {gib(size)}" for name, size in need.device.items() if size >= 0.05 * GIB)
            where = f"{several(ranks, 'GPU')}, {label}" if elsewhere else label
            what, found = f"memory stage {stage}", f"{gib(need.total)} per device ({where}): {parts}"
            if not gpus:
                yield Finding(OK, what, found)
            elif need.total > here:
                yield Finding(PROBLEM, what, f"{found}; there: {gib(here)}", self.smaller(stage, here))
            elif need.total > 0.9 * here:
                todo = f"tight; if it fails, {self.smaller(stage, 0.9 * here)}"
                yield Finding(NOTE, what, f"{found}; there: {gib(here)}", todo)
            else:
                yield Finding(OK, what, f"{found}; there: {gib(here)}")
        yield from self._host(largest_host, min(ranks, len(gpus) or 1))

    def smaller(self, stage: int, room: float) -> str:
        """The mildest change under which a stage fits."""
        recipe, batch = self.recipe, self.recipe.per_device_batch_size
        levels = [("", self.zero)]
        for level, name in ((2, "zero2"), (3, "zero3")):
            if (self.zero.stage or 0) < level:
                levels.append((f"--deepspeed configs/deepspeed/{name}.json", Zero(level)))
        levels.append(("--deepspeed configs/deepspeed/zero3_offload.json", Zero(3, True, True)))
        divides = (b for b in (batch, 8, 4, 2, 1) if b <= batch and recipe.global_batch_size % (b * self.ranks) == 0)
        for size in list(divides) or [batch]:
            for option, zero in levels:
                for again in (False, True):
                    if again and recipe.gradient_checkpointing:
                        continue
                    checkpointing = again or recipe.gradient_checkpointing
                    tried = replace(recipe, per_device_batch_size=size, gradient_checkpointing=checkpointing)
                    need = costs.memory(tried, stage, self.backbone, self.vae, zero=zero, ranks=self.ranks)
                    if need.total <= 0.9 * room:
                        words = [option] if option else []
                        words += ["--gradient_checkpointing true"] if again else []
                        words += [f"--per_device_batch_size {size}"] if size != batch else []
                        return f"use {' '.join(words)}" if words else "close other programs on the GPU"
        return "no setting fits: use a larger GPU, or more of them with ZeRO-3"

    def _host(self, extra: float, ranks: int) -> Iterator[Finding]:
        """Main memory: each rank reads both towers in fp32, builds the model, and reads images with its workers."""
        recipe, available = self.recipe, machine.host_memory()
        built = max(costs.built_bytes(recipe, stage, self.backbone, self.vae) for stage in (1, 2))
        model = max(4.0 * costs.full_model_parameters(self.backbone), built)
        need = ranks * (max(extra, model + GIB) + recipe.num_workers * WORKER_BYTES)
        found = f"{gib(need)} needed, {gib(available)} available"
        if need > available:
            todo = "lower --num_workers, run fewer ranks per node, or use a machine with more memory"
            yield Finding(PROBLEM, "main memory", found, todo)
        else:
            yield Finding(OK, "main memory", found)
        size = recipe.image_size or self.backbone.image_size
        batches = ranks * recipe.num_workers * 3.0 * recipe.per_device_batch_size * 3 * size**2  # prefetched, uint8
        if recipe.num_workers and os.path.isdir("/dev/shm") and machine.free_bytes("/dev/shm") < batches:
            found = f"{gib(machine.free_bytes('/dev/shm'))} free in /dev/shm, {gib(batches)} needed by data workers"
            yield Finding(PROBLEM, "shared memory", found, "start the container with --shm-size=2g, or --num_workers 0")

    # --- disk -------------------------------------------------------------------------------------------------------

    def disk(self) -> Iterator[Finding]:
        """The run folder at its fullest, and the cache: in the run folder's line where both lie on one disk."""
        parts = costs.disk_bytes(self.recipe, self.backbone, self.vae, self.zero)
        written = 0
        if (self.run_dir / "manifest.json").is_file():  # what the run has written already is not needed again
            written = sum(p.stat().st_size for p in self.run_dir.rglob("*") if p.is_file())
        kinds = costs.cache_records(self.recipe, self.backbone, self.vae) if self.recipe.cache_crops else {}
        if kinds:
            folder = Path(self.recipe.cache_folder or self.run_dir / "cache").expanduser()
            told = "; ".join(f"{name}: {records.told(self.images)}" for name, records in kinds.items())
            sizes = {
                n: records.size(SOME_IMAGES if self.images is None else self.images) for n, records in kinds.items()
            }
            found = f"{told}: {gib(sum(sizes.values()))}{self._per_images} in {folder}"
            there, run_there = machine.existing(folder), machine.existing(self.run_dir)
            if there.stat().st_dev == run_there.stat().st_dev:
                yield Finding(OK, "cache", found)
                parts |= {f"cached {name}": size for name, size in sizes.items()}
            else:
                todo = "choose a --cache_folder on a larger disk, or fewer --cache_crops"
                yield self._fits("cache", sum(sizes.values()), found, there, todo)
        need = max(0.0, sum(parts.values()) - written)
        named = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size >= 0.05 * GIB)
        found = f"{gib(need)} needed{f' ({named})' if named else ''}"
        yield self._fits("disk", need, found, machine.existing(self.run_dir), "choose an --output_dir on a larger disk")

    def _fits(self, what: str, need: float, found: str, there: Path, todo: str) -> Finding:
        free = machine.free_bytes(there)
        found = f"{found}, {gib(free)} free at {there}"
        return Finding(PROBLEM, what, found, todo) if need > free else Finding(OK, what, found)

    @property
    def _per_images(self) -> str:
        return f" per {SOME_IMAGES} images" if self.images is None else ""
