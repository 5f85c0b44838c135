"""Where a training step's time goes: data, target encoding, backbone, denoiser, optimizer; stage 1 and stage 2.

The project's own classes with random weights and drawn JPEGs, so that nothing is downloaded. Each part is timed in a
pass of its own, with its inputs ready; then whole steps are timed for comparison. Beside each part stands its floor:
its counted FLOPs at this machine's measured matrix-product rate (for the optimizer: its bytes at the measured copy
rate).

    python benchmarks/enhance_step.py --size tiny                    # a CPU, under a minute
    python benchmarks/enhance_step.py --size full --output out.json  # a GPU with 40 GB: ViT-L/14@224, 1.31 B denoiser
"""

# ruff: noqa: E402 - the path is set before the imports that need it
from __future__ import annotations

import argparse
import dataclasses
import gc
import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # works uninstalled: `measure` beside this file, the package above it

import torch
from measure import Clock, copy_rate, machine, matmul_rate, peak_bytes, reset_peak, summary, timed
from torch import Tensor

from llava_genhancer import costs, recipes
from llava_genhancer.recipes import Recipe

HEADS = 16  # of every known tower; a head count changes no FLOP
OPTIMIZER_BYTES = 40  # per parameter, fp32: AdamW reads 4 and writes 3 values, clipping reads 2 and writes 1


# --- what is measured ---------------------------------------------------------------------------------------------


def build(recipe: Recipe, stage: int, device: torch.device) -> tuple[Any, Any, costs.Backbone, costs.Vae]:
    """The enhancer of a stage and its target tokenizer, with random weights, and the facts to count them by."""
    import transformers
    from diffusers import AutoencoderKL

    from llava_genhancer.architectures import FLUX_VAE_CONFIG
    from llava_genhancer.enhance.backbones import FULL_MODELS, VisionBackbone, add_lora
    from llava_genhancer.enhance.conditions import Projector
    from llava_genhancer.enhance.denoisers.flow import FlowDenoiser
    from llava_genhancer.enhance.enhancer import Enhancer
    from llava_genhancer.enhance.stages import trainable_names
    from llava_genhancer.enhance.targets import VaeTarget
    from llava_genhancer.toyworld.paths import resolve

    toy = Path(resolve(recipe.vae))
    vae_config = json.loads(((toy if toy.is_dir() else FLUX_VAE_CONFIG) / "config.json").read_text())
    config = tower_config(recipe)
    # The text tower is never run here: one layer of it is enough.
    facts = costs.backbone_facts(config)
    config.text_config.num_hidden_layers = 1
    torch.manual_seed(recipe.seed)
    with torch.device(device):
        vae = AutoencoderKL.from_config(vae_config)
        if recipe.vae_dtype != "float32":
            vae = vae.to(getattr(torch, recipe.vae_dtype))
        target = VaeTarget(vae, recipe.vae_posterior)
        full = getattr(transformers, FULL_MODELS[config.model_type])(config)
        backbone = VisionBackbone(full, [0.5] * 3, [0.5] * 3, image_size=recipe.image_size)
        projector = Projector(recipe, backbone.token_dim)
        denoiser = FlowDenoiser(recipe, target.channels, target.latent_side(backbone.image_size))
    if "backbone" in recipe.stage(stage).trains and recipe.lora_rank:
        add_lora(backbone, recipe)
    enhancer = Enhancer(backbone, projector, denoiser).requires_grad_(False)
    learns = trainable_names(enhancer, recipe, stage)
    for name, parameter in enhancer.named_parameters():
        parameter.requires_grad_(name in learns)
    return enhancer.to(device).train(), target, facts, costs.vae_facts(vae_config)


def tower_config(recipe: Recipe) -> Any:
    """The HF config of the recipe's backbone, from the shipped toy world or the known facts."""
    from transformers import AutoConfig, CLIPConfig, SiglipConfig

    from llava_genhancer.toyworld.paths import resolve

    if Path(resolve(recipe.backbone)).is_dir():
        return AutoConfig.from_pretrained(resolve(recipe.backbone))
    known = costs.KNOWN_BACKBONES[recipe.backbone]
    vision = {"hidden_size": known.width, "num_hidden_layers": known.layers, "intermediate_size": known.mlp}
    vision |= {"num_attention_heads": HEADS, "patch_size": known.patch, "image_size": known.image_size}
    text = {"hidden_size": known.text_width, "num_hidden_layers": known.text_layers, "num_attention_heads": HEADS}
    text |= {"intermediate_size": known.text_mlp, "vocab_size": known.vocabulary}
    text |= {"max_position_embeddings": known.text_positions, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if known.kind == "clip":
        return CLIPConfig(vision_config=vision, text_config=text, projection_dim=known.projection)
    return SiglipConfig(vision_config=vision, text_config=text)


def write_shards(folder: Path, count: int, side: int) -> None:
    """Tar shards of drawn JPEGs, a third wider than high, as img2dataset lays them out."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for shard in range(4):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(count // 4):
                pixels = torch.rand(1, 3, 24, 32, generator=generator)
                pixels = torch.nn.functional.interpolate(pixels, size=(side, side * 4 // 3), mode="bilinear")[0]
                noise = torch.randn(pixels.shape, generator=generator) * 0.02  # photographs are not this smooth
                array = ((pixels + noise).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
                data = io.BytesIO()
                Image.fromarray(array).save(data, format="JPEG", quality=90)
                member = tarfile.TarInfo(f"{shard:05}{i:04}.jpg")
                member.size = data.tell()
                data.seek(0)
                tar.addfile(member, data)


def images_of(recipe: Recipe, folder: Path, size: int, device: torch.device) -> Iterator[Tensor]:
    """Batches from the project's own stream, on the device."""
    from llava_genhancer.data.images import open_source
    from llava_genhancer.data.loader import build_loader
    from llava_genhancer.data.views import TrainView

    loader = build_loader(
        open_source(str(folder)),
        TrainView(size, scale=recipe.crop_scale, ratio=recipe.crop_ratio),
        batch_size=recipe.per_device_batch_size,
        num_workers=recipe.num_workers,
    )
    for batch in loader:
        yield batch["images"].to(device, non_blocking=True)


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rates:
    """What this machine can do: FLOP/s of the trained model's and of the VAE's arithmetic, bytes/s of a copy."""

    model: float
    vae: float
    copy: float


def rates_of(recipe: Recipe, device: torch.device) -> Rates:
    """Measure them. The VAE's fp32 convolutions run in TF32 on GPUs that have it, torch's default."""
    half = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    model = matmul_rate(device, half)
    same = recipe.vae_dtype == ("bfloat16" if recipe.precision == "bf16" else "float32") and not tf32
    vae = model if same else matmul_rate(device, getattr(torch, recipe.vae_dtype), tf32=tf32)
    return Rates(model, vae, copy_rate(device))


def measure_stage(
    recipe: Recipe, stage: int, folder: Path, device: torch.device, rates: Rates, *, repeats: int, warmup: int
) -> dict[str, Any]:
    """Every part in a pass of its own, then whole steps."""
    enhancer, target, facts, vae = build(recipe, stage, device)
    batch, size = recipe.per_device_batch_size, enhancer.backbone.image_size
    trained = [p for p in enhancer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=recipe.weight_decay, fused=True)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if recipe.precision == "bf16" else nullcontext()

    def forget() -> None:
        optimizer.zero_grad(set_to_none=True)

    def update() -> None:
        if recipe.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        optimizer.step()
        forget()

    def step(images: Tensor) -> Tensor:
        latents = target.encode(images)
        with autocast():
            loss = enhancer(enhancer.backbone.normalise(images), latents)
        loss.backward()
        update()
        return loss.detach()

    stream = images_of(recipe, folder, size, device)
    images = next(stream)
    for _ in range(warmup):  # allocators reach their steady state, else the first part pays for all of them
        step(images)
    latents = target.encode(images)
    eye_learns = any(p.requires_grad for p in enhancer.backbone.parameters())
    with autocast(), torch.no_grad():
        token = enhancer.tokens(enhancer.backbone.normalise(images))
    pull = torch.randn_like(token)  # stands for the denoiser's gradient
    token = token.detach().requires_grad_(eye_learns)

    def backbone() -> None:
        with autocast():
            seen = enhancer.tokens(enhancer.backbone.normalise(images))
        if eye_learns:
            seen.backward(pull)

    def denoiser() -> None:
        token.grad = None
        with autocast():
            loss = enhancer.denoiser(latents, enhancer.projector(token))
        loss.backward()

    repeat: dict[str, Any] = {"repeats": repeats, "warmup": warmup}
    seconds = {
        "data": data_seconds(stream, device, recipe.num_workers, repeats),
        "target encoding": timed(lambda: target.encode(images), device, **repeat),
        "backbone": timed(backbone, device, prepare=forget, **repeat),
        "denoiser": timed(denoiser, device, prepare=forget, **repeat),
    }
    seconds["optimizer"] = optimizer_seconds(update, trained, device, repeat)
    reset_peak(device)
    computing = timed(lambda: step(images), device, **repeat)
    whole, loss = whole_steps(step, stream, device, repeats, warmup)
    flops = {name: batch * n for name, n in costs.step_flops(recipe, stage, facts, vae).items()}
    floors = {name: n / (rates.vae if name == "target encoding" else rates.model) for name, n in flops.items()}
    numel = sum(p.numel() for p in trained)
    floors["optimizer"] = OPTIMIZER_BYTES * numel / rates.copy
    if numel != costs.trained_parameters(recipe, stage, facts, vae):
        raise AssertionError("costs counts other parameters than there are")
    return {
        "batch": batch,
        "image_size": size,
        "trained_parameters": numel,
        "parts": {
            name: summary(times) | {"flops": flops.get(name), "floor_s": floors.get(name)}
            for name, times in seconds.items()
        },
        "step_without_data": summary(computing),
        "step": summary(whole),
        "images_per_second": batch / summary(whole)["median_s"],
        "floor_s": sum(floors.values()),
        "peak_bytes": peak_bytes(device),
        "predicted_bytes": costs.memory(recipe, stage, facts, vae, cuda=device.type == "cuda").total,
        "loss": float(loss),
    }


def optimizer_seconds(
    update: Callable[[], None], trained: list[Any], device: torch.device, repeat: dict[str, Any]
) -> list[float]:
    """Clipping and AdamW, with gradients lying ready."""
    gradients = [torch.full_like(p, 1e-3) for p in trained]

    def give() -> None:
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient

    return timed(update, device, prepare=give, **repeat)


def data_seconds(stream: Iterator[Tensor], device: torch.device, workers: int, repeats: int) -> list[float]:
    """Seconds per batch of the loader alone. Batches that workers prepared ahead are taken off first."""
    for _ in range(2 * workers + 1):
        next(stream)
    clock = Clock(torch.device("cpu"))
    clock.mark()
    for _ in range(max(repeats, 4 * workers)):
        next(stream)
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock.mark()
    times = clock.seconds()
    # Workers deliver in bursts: the mean is the rate, a median would be the time to take a batch from a queue.
    return [sum(times) / len(times)] * len(times) if workers else times


def whole_steps(
    step: Callable[[Tensor], Tensor], stream: Iterator[Tensor], device: torch.device, repeats: int, warmup: int
) -> tuple[list[float], Tensor]:
    """From one step's end to the next one's, data included, and the last loss."""
    clock = Clock(device)
    loss = torch.zeros(())
    for i in range(warmup + repeats):
        if i == warmup:
            clock.mark()
        loss = step(next(stream))
        if i >= warmup:
            clock.mark()
    return clock.seconds(), loss


def measure_deepspeed(
    recipe: Recipe, stage: int, folder: Path, device: torch.device, config_path: str, *, repeats: int, warmup: int
) -> dict[str, Any]:
    """Whole steps through a DeepSpeed engine on this one device."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29517")
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":  # gloo does the same, and no compiler is needed
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    enhancer, target, facts, vae = build(recipe, stage, device)
    stated = json.loads(Path(config_path).read_text())
    config = _without_auto(stated) | {
        "train_micro_batch_size_per_gpu": recipe.per_device_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.max_grad_norm,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
    }
    config.pop("train_batch_size", None)
    trained = [p for p in enhancer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=recipe.weight_decay)
    engine, *_ = deepspeed.initialize(model=enhancer, optimizer=optimizer, config=config)
    stream = images_of(recipe, folder, enhancer.backbone.image_size, device)

    def step(images: Tensor) -> Tensor:
        latents = target.encode(images)
        loss = engine(enhancer.backbone.normalise(images), latents)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    reset_peak(device)
    whole, loss = whole_steps(step, stream, device, repeats, warmup)
    level = int(config.get("zero_optimization", {}).get("stage", 0))
    predicted = costs.memory(recipe, stage, facts, vae, zero=costs.Zero(level), cuda=device.type == "cuda").total
    engine.destroy()
    return {
        "zero_stage": level,
        "step": summary(whole),
        "images_per_second": recipe.per_device_batch_size / summary(whole)["median_s"],
        "peak_bytes": peak_bytes(device),
        "predicted_bytes": predicted,
        "loss": float(loss),
    }


def _without_auto(value: Any) -> Any:
    """A DeepSpeed JSON whose "auto" values, which Trainer would fill in, fall back to DeepSpeed's defaults."""
    if isinstance(value, dict):
        return {k: _without_auto(v) for k, v in value.items() if v != "auto"}
    return value


# --- showing ------------------------------------------------------------------------------------------------------


def table(stage: int, result: dict[str, Any]) -> str:
    """A stage's result for reading."""
    parts = result["parts"]
    total = sum(p["median_s"] for p in parts.values())
    lines = [
        f"stage {stage}: {result['batch']} images of {result['image_size']} px, "
        f"{result['trained_parameters'] / 1e6:.1f} M trained parameters",
        f"{'':22}{'ms':>10}{'share':>8}{'GFLOP/image':>13}{'floor ms':>10}{'floor/ms':>10}",
    ]

    def row(name: str, seconds: float, flops: float | None = None, floor: float | None = None) -> str:
        counted = f"{flops / 1e9 / result['batch']:.4g}" if flops else ""
        least, ratio = (f"{floor * 1e3:.2f}", f"{floor / seconds:.0%}") if floor else ("", "")
        return f"{name:22}{seconds * 1e3:>10.2f}{seconds / total:>8.0%}{counted:>13}{least:>10}{ratio:>10}"

    lines += [row(name, p["median_s"], p["flops"], p["floor_s"]) for name, p in parts.items()]
    computing = sum(p["median_s"] for name, p in parts.items() if name != "data")
    flops = sum(p["flops"] or 0 for p in parts.values())
    lines += [
        row("sum, data aside", computing, flops, result["floor_s"]),
        row("step, data aside", result["step_without_data"]["median_s"], flops, result["floor_s"]),
        row("step", result["step"]["median_s"], flops, result["floor_s"]),
        f"{result['images_per_second']:.1f} images/s; {_peak(result)}; loss {result['loss']:.3f}",
    ]
    if "deepspeed" in result:
        zero = result["deepspeed"]
        name = f"DeepSpeed ZeRO-{zero['zero_stage']}, one device"
        step = f"step {zero['step']['median_s'] * 1e3:.2f} ms, {zero['images_per_second']:.1f} images/s"
        lines.append(f"{name}: {step}; {_peak(zero)}")
    return "\n".join(lines)


def _peak(result: dict[str, Any]) -> str:
    return f"peak {result['peak_bytes'] / 2**30:.1f} GiB, predicted {result['predicted_bytes'] / 2**30:.1f} GiB"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--recipe", help="another named recipe's shapes (default: tiny, or openai-l14-224)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--batch", type=int, help="images per step (default: the recipe's)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: the recipe's")
    parser.add_argument("--vae_dtype", choices=("float32", "bfloat16"), help="default: the recipe's")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--workers", type=int, help="data workers (default: 0 for tiny, else the recipe's)")
    parser.add_argument("--steps", type=int, help="repeats (default: 8 for tiny, 20 for full)")
    parser.add_argument("--deepspeed", metavar="JSON", help="time whole steps under this configuration too")
    parser.add_argument("--output", metavar="JSON", help="write the figures here")
    args = parser.parse_args(argv)
    if args.size == "full" and args.device is None and not torch.cuda.is_available():
        parser.error("--size full needs a GPU (or say --device cpu and wait)")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, write the JSON."""
    args = parse(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tiny = args.size == "tiny"
    recipe = recipes.get_recipe(args.recipe or ("tiny" if tiny else "openai-l14-224"))
    changes = {
        "per_device_batch_size": args.batch,
        "precision": args.precision,
        "vae_dtype": args.vae_dtype,
        "num_workers": args.workers if args.workers is not None else 0 if tiny else None,
        "gradient_checkpointing": True if args.gradient_checkpointing else None,
    }
    recipe = recipes.override(recipe, {k: v for k, v in changes.items() if v is not None})
    repeat = {"repeats": args.steps or (8 if tiny else 20), "warmup": 2 if tiny else 5}
    result: dict[str, Any] = {
        "format": 1,
        "size": args.size,
        "recipe": recipe.name,
        "precision": recipe.precision,
        "vae_dtype": recipe.vae_dtype,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "num_workers": recipe.num_workers,
        "machine": machine(device),
    }
    rates = rates_of(recipe, device)
    result["rates"] = dataclasses.asdict(rates)
    print(
        f"{result['machine']['device']}, torch {torch.__version__}, {recipe.precision}: "
        f"{rates.model / 1e12:.3g} TFLOP/s, VAE {rates.vae / 1e12:.3g} TFLOP/s, copy {rates.copy / 1e9:.3g} GB/s",
        flush=True,
    )
    result["stages"] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), 64 if tiny else 256, 96 if tiny else 360)
        for stage in args.stages:
            figures = measure_stage(recipe, stage, Path(folder), device, rates, **repeat)
            free(device)
            if args.deepspeed:
                figures["deepspeed"] = measure_deepspeed(recipe, stage, Path(folder), device, args.deepspeed, **repeat)
                free(device)
            result["stages"][str(stage)] = figures
            print("\n" + table(stage, figures), flush=True)
            if args.output:  # after each stage: the second one may not come to its end
                Path(args.output).parent.mkdir(parents=True, exist_ok=True)
                Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


def free(device: torch.device) -> None:
    """Let the next measurement start from an empty device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
