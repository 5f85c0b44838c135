"""One command from images to a tower: stage 1, stage 2, merge, export; each finished step is recognised and skipped.

RUN/manifest.json -> RUN/stage1/ -> RUN/stage2/ -> RUN/tower/
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from llava_genhancer import engine, run
from llava_genhancer.data.images import Source, description, listing, open_source
from llava_genhancer.data.loader import build_loader, check_readers
from llava_genhancer.data.views import SecondView, TrainView, shrink
from llava_genhancer.enhance.backbones import check_backbone
from llava_genhancer.enhance.cache import Cache
from llava_genhancer.enhance.cache_fill import open_cache
from llava_genhancer.enhance.enhancer import Enhancer
from llava_genhancer.enhance.export import check_run_export, export_tower
from llava_genhancer.enhance.inputs import CachedInputs, FreshInputs
from llava_genhancer.enhance.pretrained import check_denoiser
from llava_genhancer.enhance.size import check_size
from llava_genhancer.enhance.stages import WEIGHTS, build_stage
from llava_genhancer.enhance.targets import check_target, load_target
from llava_genhancer.enhance.tokenizer import Target
from llava_genhancer.errors import InputError
from llava_genhancer.files import expand
from llava_genhancer.recipes import Recipe, StageRecipe
from llava_genhancer.trainer import ExactTrainer

log = logging.getLogger(__name__)


def enhance(
    recipe: Recipe,
    output_dir: str | os.PathLike,
    *,
    deepspeed: str | None = None,
    stages: Sequence[int] = (1, 2),
) -> Path:
    """Run (or go on with) an enhancement.

    Args:
        recipe: what to do; ``recipe.data`` must name the images.
        output_dir: the run folder.
        deepspeed: path of a DeepSpeed JSON; None trains in one process, or under DDP when launched by torchrun.
        stages: which stages to run; the tower is exported once stage 2 is done.

    Returns:
        The tower folder, or the last stage's folder if stage 2 was not asked for.

    Raises:
        InputError: anything in the recipe, the data or the folder that cannot be used, before weights are loaded.
        TrainingStopped, BadStep: see :mod:`llava_genhancer.trainer`.
    """
    engine.check_launch()
    run_dir = Path(expand(output_dir))
    rank = int(os.environ.get("RANK", "0"))
    if recipe.data is None:
        raise InputError("no images given: add --data PATH (tar shards, image folder, HF dataset or LLaVA JSON)")
    engine.check_deepspeed(deepspeed, recipe)
    engine.accumulation(recipe.global_batch_size, recipe.per_device_batch_size)  # refused before a manifest says it
    check_backbone(recipe.backbone)
    check_target(recipe)
    check_denoiser(recipe)
    check_size(recipe)
    if 2 in stages:
        check_run_export(recipe, run_dir)
    source = open_source(recipe.data, image_folder=recipe.image_folder)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_readers(source, num_workers=recipe.num_workers, world_size=world, sharding=recipe.data_sharding)
    with run.exclusive(run_dir) if rank == 0 else nullcontext():
        if rank == 0:
            run.open_run(run_dir, recipe, world_size=world, deepspeed=deepspeed)
        for stage in sorted(stages):
            train_stage(recipe, stage, run_dir, source, deepspeed)
        if 2 not in stages:
            return run_dir / f"stage{max(stages)}"
        if rank == 0:
            export_tower(run_dir, run_dir / "tower", recipe)
        engine.barrier()
    return run_dir / "tower"


def train_stage(recipe: Recipe, stage: int, run_dir: Path, source: Source, deepspeed: str | None) -> None:
    """Train one stage to its end, or recognise that it is finished."""
    table = recipe.stage(stage)
    stage_dir = run_dir / f"stage{stage}"
    if table.max_steps == 0 or engine.stage_result(stage_dir) is not None:
        log.info("stage %d: %s", stage, "nothing to do" if table.max_steps == 0 else "finished before, skipped")
        return
    earlier = [run_dir / f"stage{s}" for s in range(1, stage) if recipe.stage(s).max_steps > 0]
    for folder in earlier:
        if engine.stage_result(folder) is None:
            raise InputError(f"stage {stage} builds on {folder.name}, which is not finished in {run_dir}: run it first")

    started = time.time()
    args = training_arguments(recipe, stage, stage_dir, deepspeed)
    data = record_data(recipe, stage, run_dir, source)
    target = load_target(recipe).to(args.device)
    with engine.without_zero_init(args):
        enhancer = build_stage(recipe, stage, target, [folder / WEIGHTS for folder in earlier])
    side = max(enhancer.backbone.image_size, recipe.target_size or 0)
    view = TrainView(side, scale=recipe.crop_scale, ratio=recipe.crop_ratio)
    cache = None
    if recipe.cache_crops:
        folder = Path(recipe.cache_folder or run_dir / "cache").expanduser()
        cache = open_cache(recipe, stage, folder, source, target, enhancer, args.device)
    loader = build_loader(
        cache.source if cache else source,
        cache.view if cache else view,
        batch_size=recipe.per_device_batch_size,
        num_workers=recipe.num_workers,
        seed=recipe.seed + stage,
        rank=args.process_index,
        world_size=args.world_size,
        sharding=recipe.data_sharding,
        shuffle_block=recipe.shuffle_block,
        max_bad_fraction=recipe.max_bad_fraction,
    )
    trainer = EnhanceTrainer(
        enhancer,
        args,
        loader,
        target=target,
        target_size=recipe.target_size,
        second_view=SecondView() if recipe.objective == "contrast" else None,
        cache=cache,
        keep_checkpoints=recipe.keep_checkpoints,
        facts={
            "world_size": args.world_size,
            "num_workers": recipe.num_workers,
            "per_device_batch_size": recipe.per_device_batch_size,
            "deepspeed_stage": engine.zero_stage(args),
            "data": data["fingerprint"],
        },
        snapshot_steps=table.snapshot_steps,
        decay_all=recipe.decay_biases_and_norms,
        optimizer=optimizer(recipe, table),
        guards=recipe,
    )
    pictures = table.sample_steps > 0 and recipe.sample_images > 0
    if not pictures or args.process_index > 0:
        target.drop_decoder()
    if pictures:
        images = _preview(source, recipe.sample_images, side)
        trainer.add_callback(_Pictures(trainer, images, table.sample_steps))
    final = trainer.run()
    engine.finish_stage(trainer, final, time.time() - started, stage=stage, data=data)
    # Let a second stage start from an empty device.
    trainer.accelerator.free_memory()
    del trainer, enhancer, target, loader
    engine.forget()


def record_data(recipe: Recipe, stage: int, run_dir: Path, source: Source) -> dict[str, Any]:
    """Write into the manifest which data a stage trains on, beside the other stages' (collective).

    Rank 0 computes the fingerprint, or takes it from the manifest if the files' listing is the same as at an earlier
    start.

    Returns:
        The entry, on every rank: path, image_folder, fingerprint, number of images or shards.
    """
    shared: list[Any] = [None]
    if int(os.environ.get("RANK", "0")) == 0:
        manifest = run.read_json(run_dir / run.MANIFEST)
        entries: dict[str, dict[str, Any]] = manifest.get("data", {})
        seen = listing(source)
        known = {entry["listing"]: entry["fingerprint"] for entry in entries.values() if entry.get("listing")}
        source.identity = source.identity or known.get(seen, "")
        entry = {"path": recipe.data, "image_folder": recipe.image_folder, **description(source), "listing": seen}
        for name, other in entries.items():
            if name < f"stage{stage}" and other["fingerprint"] != entry["fingerprint"]:
                log.warning(
                    "stage %d trains on other data (%s, %s) than %s (%s, %s); the manifest names both",
                    stage, entry["path"], entry["fingerprint"], name, other["path"], other["fingerprint"],
                )  # fmt: skip
        run.write_json(run_dir / run.MANIFEST, {**manifest, "data": {**entries, f"stage{stage}": entry}})
        shared = [entry]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(shared, src=0)
    source.identity = shared[0]["fingerprint"]
    return {key: value for key, value in shared[0].items() if key != "listing"}


def optimizer(recipe: Recipe, table: StageRecipe) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The class and its arguments where it is not the Trainer's AdamW."""
    if recipe.optimizer == "adamw":
        return None
    return torch.optim.SGD, {"lr": table.learning_rate, "momentum": recipe.momentum}


class EnhanceTrainer(ExactTrainer):
    """Feeds an :class:`Enhancer`: uint8 images become pixel values and frozen targets on the device."""

    def __init__(
        self,
        enhancer: Enhancer,
        args: TrainingArguments,
        loader: Any,
        *,
        target: Target,
        target_size: int | None = None,
        second_view: SecondView | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ):
        super().__init__(enhancer, args, loader, **kwargs)
        eye = enhancer.backbone
        self.enhancer, self.target, self.second_view = enhancer, target, second_view
        self.fresh = FreshInputs(eye, target, target_size or eye.image_size)
        self.inputs: Callable[[Any], tuple[Tensor, Tensor]] = (
            self.fresh if cache is None else CachedInputs(eye, target, cache)
        )

    def batch_loss(self, model: Any, inputs: dict[str, Any], num_items: Any) -> Tensor:
        """The loss of a batch; ``draws`` in it replace the denoiser's random ones (tests)."""
        images: Any = inputs["images"]
        view = None if self.second_view is None else self.fresh.see(self.second_view(images))
        seen, target = self.inputs(images)
        loss: Tensor = model(seen, target, view, inputs.get("draws"))
        return loss


class _Pictures(TrainerCallback):
    """Strips of images rebuilt from the condition, as training goes on; the same images and noise each time."""

    def __init__(self, trainer: EnhanceTrainer, images: Tensor, every: int):
        self.trainer, self.images, self.every = trainer, images, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.rank == 0:
            originals = shrink(self.images, self.trainer.fresh.target_size)
            _write_strip(self.trainer.stage_dir / "samples" / "originals.png", originals)
        if state.global_step == 0:
            self.draw(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.draw(state.global_step)

    def draw(self, step: int) -> None:
        trainer = self.trainer
        images = self.images.to(trainer.args.device)
        # Every rank takes part: under ZeRO-3 no rank has the weights alone.
        # In transformers 5.23 compute_loss_context_manager is empty: accelerate wraps the model's forward alone.
        with trainer.accelerator.autocast():
            latents = trainer.enhancer.rebuild(trainer.fresh.see(images), torch.Generator().manual_seed(0))
        if trainer.rank == 0:
            _write_strip(trainer.stage_dir / "samples" / f"step-{step:06d}.png", trainer.target.decode(latents).cpu())


def _preview(source: Source, count: int, size: int) -> Tensor:
    """The first images of a source, resized and centre-cropped, uint8 (n, 3, H, W)."""
    from PIL import ImageOps
    from torchvision.transforms.v2.functional import pil_to_tensor

    return torch.stack([pil_to_tensor(ImageOps.fit(image, (size, size))) for _, image in source.first(count)])


def _write_strip(path: Path, images: Tensor) -> None:
    """uint8 images (n, 3, H, W) side by side in one PNG."""
    from io import BytesIO

    from PIL import Image

    strip = images.permute(2, 0, 3, 1).reshape(images.shape[2], -1, 3)
    data = BytesIO()
    Image.fromarray(strip.contiguous().numpy()).save(data, format="PNG")
    run.write_bytes(path, data.getvalue())


def training_arguments(recipe: Recipe, stage: int, stage_dir: Path, deepspeed: str | None) -> TrainingArguments:
    """The recipe in Trainer's words. Building it joins the process group.

    Raises:
        InputError: the global batch does not divide over ranks and micro-batches, or the JSON is not usable.
    """
    table = recipe.stage(stage)
    return engine.training_arguments(
        stage_dir,
        deepspeed,
        global_batch_size=recipe.global_batch_size,
        per_device_batch_size=recipe.per_device_batch_size,
        timeout_minutes=recipe.timeout_minutes,
        max_steps=table.max_steps,
        learning_rate=table.learning_rate,
        lr_scheduler_type="constant_with_warmup" if table.lr_scheduler == "constant" else "cosine",
        warmup_steps=table.warmup_steps,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        adam_epsilon=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16",
        ddp_find_unused_parameters=recipe.lora_scope == "all",
        seed=recipe.seed,
        logging_steps=table.log_steps,
        save_steps=table.save_steps,
    )
