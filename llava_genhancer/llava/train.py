"""LLaVA's two trainings, each in a folder of its own below the run: RUN/llava-pretrain -> RUN/llava-finetune.

A step's result is the weights that it trained (fp32 safetensors) plus the folders that other programs read; a finished
step is recognised and left alone, and one that another projector or tower went into is refused.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from llava_genhancer import engine, run
from llava_genhancer.errors import InputError, plain
from llava_genhancer.files import expand
from llava_genhancer.llava.batches import build_loader
from llava_genhancer.llava.conversation import get_template
from llava_genhancer.llava.export import export_step
from llava_genhancer.llava.features import open_features
from llava_genhancer.llava.model import Llava, build_llava, llava_config, local
from llava_genhancer.llava.recipes import STEPS, LlavaRecipe, LlavaStep, harmless_fields
from llava_genhancer.llava.samples import Samples, read_samples, text_summary
from llava_genhancer.tower.export import is_tower, read_marker
from llava_genhancer.trainer import FINAL_FILE, ExactTrainer
from llava_genhancer.units import significant

log = logging.getLogger(__name__)


def pretrain(recipe: LlavaRecipe, output_dir: str | os.PathLike, *, deepspeed: str | None = None) -> Path:
    """Train the projector on captions; see :func:`train_step`."""
    return train_step(recipe, "pretrain", output_dir, deepspeed=deepspeed)


def finetune(recipe: LlavaRecipe, output_dir: str | os.PathLike, *, deepspeed: str | None = None) -> Path:
    """Train language model (or its LoRA) and projector on conversations; see :func:`train_step`."""
    return train_step(recipe, "finetune", output_dir, deepspeed=deepspeed)


def step_dir(run_dir: str | os.PathLike, step: str) -> Path:
    """Where ``pretrain`` or ``finetune`` of a run lives."""
    return Path(expand(run_dir)) / f"llava-{step}"


def train_step(recipe: LlavaRecipe, step: str, output_dir: str | os.PathLike, *, deepspeed: str | None = None) -> Path:
    """Train one step to its end and export it, or go on with it, or recognise that it is finished.

    Args:
        recipe: what to do; its table of the step must name the data.
        step: ``pretrain`` or ``finetune``; the latter starts from the former's projector in the same run.
        output_dir: the run folder.
        deepspeed: path of a DeepSpeed JSON; None trains in one process, or under DDP when launched by torchrun.

    Returns:
        The step's folder.

    Raises:
        InputError: anything in the recipe, the data or the folder that cannot be used, before weights are loaded.
        TrainingStopped, BadStep: see :mod:`llava_genhancer.trainer`.
    """
    engine.check_launch()
    table, folder = recipe.step(step), step_dir(output_dir, step)
    rank = int(os.environ.get("RANK", "0"))
    _check(recipe, step, deepspeed)
    projector = _projector(recipe, step, output_dir)
    inputs = _inputs(recipe, projector)
    with run.exclusive(folder) if rank == 0 else nullcontext():
        if rank == 0:
            _refuse_other_inputs(folder, inputs)
            world = int(os.environ.get("WORLD_SIZE", "1"))
            run.open_run(
                folder, recipe, ignore=harmless_fields(step), step=step, inputs=inputs, world_size=world,
                deepspeed=deepspeed,
            )  # fmt: skip
        if table.max_steps == 0 or engine.stage_result(folder) is not None:
            log.info("%s: %s", folder.name, "nothing to do" if table.max_steps == 0 else "finished before, skipped")
        else:
            _train(recipe, step, folder, projector, deepspeed)
        if rank == 0 and table.max_steps != 0:
            export_step(recipe, step, folder)
        engine.barrier()
    return folder


def _check(recipe: LlavaRecipe, step: str, deepspeed: str | None) -> None:
    """What can be refused without reading weights or data."""
    table = recipe.step(step)
    if table.data is None and table.max_steps != 0:
        raise InputError(f"no data given: add --{step}.data FILE.json and --{step}.image_folder DIR (LLaVA's JSON)")
    for name in STEPS:  # the other step's too: nobody wants to learn of it hours later
        get_template(recipe.step(name).conversation)
    engine.check_deepspeed(deepspeed, recipe)
    engine.accumulation(table.global_batch_size, table.per_device_batch_size)
    llava_config(recipe)


def _projector(recipe: LlavaRecipe, step: str, output_dir: str | os.PathLike) -> Path | None:
    """The weights that finetuning starts from; None in pretraining, or where pretraining is switched off."""
    if step == "pretrain" or recipe.pretrain.max_steps == 0:
        return None
    folder = step_dir(output_dir, "pretrain")
    if engine.stage_result(folder) is None:
        raise InputError(f"finetuning builds on {folder}, which is not finished: run `llava pretrain` first")
    return folder / FINAL_FILE


def _inputs(recipe: LlavaRecipe, projector: Path | None) -> dict[str, Any]:
    """Hashes of what a step builds on and this program made; a step is not the same with others."""
    tower = local(recipe.tower)
    return {
        "tower": read_marker(tower)["weights"] if is_tower(tower) else None,
        "projector": engine.stage_result(projector.parent)["weights_sha256"] if projector else None,  # type: ignore[index]
    }


def _refuse_other_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    if not (folder / run.MANIFEST).exists():
        return
    before = run.read_json(folder / run.MANIFEST).get("inputs", inputs)
    changed = [name for name in inputs if before.get(name) != inputs[name]]
    if changed:
        raise InputError(
            f"{folder} was trained with another {' and another '.join(changed)} than is there now: remove it to train "
            "anew, or choose another --output_dir"
        )


def _train(recipe: LlavaRecipe, step: str, folder: Path, projector: Path | None, deepspeed: str | None) -> None:
    table = recipe.step(step)
    started = time.time()
    assert table.data is not None  # _check refuses that
    samples = read_samples(table.data, table.image_folder)
    _check_images(samples, step)
    args = training_arguments(recipe, step, folder, deepspeed, len(samples))
    loader = build_loader(recipe, table, samples, rank=args.process_index, world_size=args.world_size)
    with engine.without_zero_init(args):
        model = build_llava(recipe, step, bf16_everywhere=deepspeed is not None and recipe.precision == "bf16")
    if projector is not None:
        engine.load_trained(model, projector)
    if table.cache_features:
        cache = Path(recipe.cache_folder or folder.parent / "cache").expanduser()
        autocast = recipe.precision == "bf16" and deepspeed is None
        loader.dataset.features = open_features(
            recipe, step, cache, loader.dataset, model, args.device, autocast=autocast
        )
        model.vision_tower = None
    trainer = build_trainer(recipe, step, model, args, loader, data=samples.fingerprint)
    final = trainer.run()
    engine.finish_stage(trainer, final, time.time() - started, step=step, data=samples.facts())
    trainer.accelerator.free_memory()
    del trainer, model, loader
    engine.forget()


def _check_images(samples: Samples, step: str) -> None:
    """Refuse a pretraining without a single image, and warn of a finetuning without one: the projector stays as it is.

    Raises:
        InputError: no sample has an image, and only the projector learns.
    """
    if samples.with_image:
        return
    why = text_summary(samples.as_text)
    what = f"data {samples.path}: none of the {len(samples)} samples has an image{f' ({why})' if why else ''}"
    if step == "pretrain":
        raise InputError(
            f'{what}, so the projector, all that pretraining trains, would learn nothing: give samples "image", a path '
            "below image_folder, and <image> in their first question"
        )
    log.warning("%s: the projector learns nothing", plain(what))


def build_trainer(
    recipe: LlavaRecipe, step: str, model: Llava, args: TrainingArguments, loader: Any, **facts: Any
) -> LlavaTrainer:
    """The trainer of a step, gradient checkpointing set up; ``facts`` too must be equal on resume."""
    table = recipe.step(step)
    if recipe.gradient_checkpointing:
        # ZeRO-3's weights change their shape between the two forward passes, which only the reentrant kind accepts.
        reentrant = engine.zero_stage(args) == 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name came after the oldest transformers we support
            model.language_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return LlavaTrainer(
        model,
        args,
        loader,
        recipe=recipe,
        table=table,
        keep_checkpoints=recipe.keep_checkpoints,
        facts={
            "world_size": args.world_size,
            "per_device_batch_size": table.per_device_batch_size,
            "deepspeed_stage": engine.zero_stage(args),
            **facts,
        },
        guards=recipe,
    )


def training_arguments(
    recipe: LlavaRecipe, step: str, folder: Path, deepspeed: str | None, samples: int
) -> TrainingArguments:
    """The recipe in Trainer's words; ``samples`` make an epoch. Building it joins the process group."""
    table = recipe.step(step)
    steps = table.max_steps
    if steps is None:
        steps = math.ceil(table.epochs * math.ceil(samples / table.global_batch_size))
    return engine.training_arguments(
        folder,
        deepspeed,
        global_batch_size=table.global_batch_size,
        per_device_batch_size=table.per_device_batch_size,
        timeout_minutes=recipe.timeout_minutes,
        max_steps=steps,
        learning_rate=table.learning_rate,
        lr_scheduler_type="constant_with_warmup" if table.lr_scheduler == "constant" else "cosine",
        warmup_steps=math.ceil(table.warmup_ratio * steps),
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        adam_epsilon=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16",
        tf32=True if recipe.precision == "bf16" and torch.cuda.is_available() else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=recipe.normalise_loss == "items",
        seed=recipe.seed,
        logging_steps=table.log_steps,
        save_steps=table.save_steps,
    )


def _padding(tokens: int, places: int) -> float:
    """Share of the places that hold no token."""
    return round(1 - tokens / max(places, 1), 4)


class LlavaTrainer(ExactTrainer):
    """Feeds a :class:`Llava`; the projector may have a learning rate of its own."""

    def __init__(
        self,
        model: Llava,
        args: TrainingArguments,
        loader: Any,
        *,
        recipe: LlavaRecipe,
        table: LlavaStep,
        **kwargs: Any,
    ):
        super().__init__(model, args, loader, **kwargs)
        self.llava, self.table = model, table
        self.counted = torch.zeros(2, dtype=torch.int64)  # tokens and places that this rank's earlier log entries told
        # True makes Trainer count the global batch's labels and leave the division to the model.
        self.model_accepts_loss_kwargs = recipe.normalise_loss == "items"

    def batch_loss(self, model: Any, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        """The loss of a micro-batch, so that the mean over ranks and micro-batches is the recipe's."""
        items = num_items if self.model_accepts_loss_kwargs else None
        loss: torch.Tensor = model(
            inputs["input_ids"], inputs["labels"], inputs["pixel_values"], items, inputs.get("lengths")
        )
        return loss if items is None else loss * self.args.world_size  # ranks' gradients are averaged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With tokens/s and the share of padding since the last entry, over all ranks; the loader has counted them."""
        if "loss" in logs:
            report = self.loader.report()
            now = torch.tensor([report.tokens, report.places])
            new, self.counted = now - self.counted, now
            if self.cpu_group is not None:
                dist.all_reduce(new, group=self.cpu_group)
            tokens, places = new.tolist()
            rate = tokens / max(time.monotonic() - self.last_log[0], 1e-9)
            logs = {**logs, "tokens_per_second": significant(rate), "padding_share": _padding(tokens, places)}
        super().log(logs, start_time)

    def data_facts(self, report: dict[str, Any]) -> dict[str, Any]:
        """Beside what was skipped, the tokens that the language model read and the places that it computed."""
        skipped = dict(report)
        tokens, places = skipped.pop("tokens"), skipped.pop("places")
        return {
            "tokens": tokens,
            "places": places,
            "padding_share": _padding(tokens, places),
            **super().data_facts(skipped),
        }

    def _load_data_position(self, folder: Path) -> None:
        super()._load_data_position(folder)
        report = self.loader.report()
        self.counted = torch.tensor([report.tokens, report.places])

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; the projector's weights move into groups of their own where the recipe gives them a rate."""
        optimizer = super().create_optimizer(model)
        if self.table.projector_learning_rate is None:
            return optimizer
        projector = set(self.llava.multi_modal_projector.parameters())
        groups = []
        for group in optimizer.param_groups:
            mine = [p for p in group["params"] if p in projector]
            rest = [p for p in group["params"] if p not in projector]
            groups += [
                {**group, "params": rest},
                {**group, "params": mine, "lr": self.table.projector_learning_rate},
            ]
        optimizer.param_groups = [g for g in groups if g["params"]]
        return optimizer
