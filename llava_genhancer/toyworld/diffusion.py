"""The toy world's pre-trained denoisers: a Stable Diffusion and a FLUX, tiny, as ordinary diffusers folders.

``python -m llava_genhancer.toyworld.diffusion --output DIR`` trains both on captions. What is shipped under
``weights/`` comes from ``--images 5000 --steps 1200``. Both read the toy CLIP's text tower and rebuild the latents of
the toy VAE, which stays in its own folder.

Shapes: B images, latents 8 x 12 x 12 (FLUX packs them as 36 tokens of 32), captions of 77 tokens, 96 wide.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from llava_genhancer.files import settle_folder
from llava_genhancer.toyworld import paths, scenes, training
from llava_genhancer.toyworld.tokenizer import MAX_LENGTH, write_tokenizer

logger = logging.getLogger(__name__)

LATENT_SIDE, LATENT_CHANNELS = 12, 8
TEXT_WIDTH = 96
EMPTY_SHARE = 0.1  # captions left out, so that the empty prompt means "anything", as in the big ones
GUIDANCE = 4.0  # what a recipe feeds to the guidance embedding


def build_unet(channels: tuple[int, int] = (48, 64)) -> UNet2DConditionModel:
    """A UNet of Stable Diffusion 2's design: cross-attention at the full side, and in the middle at half of it."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        attention_head_dim=(2, 2),  # in Stable Diffusion 2 the numbers of heads, in spite of the name
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def build_flux() -> FluxTransformer2DModel:
    """A FLUX of one double-stream and two single-stream blocks, 128 wide, with FLUX.1-dev's guidance embedding."""
    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def build_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def load_text_encoder() -> CLIPTextModel:
    """The toy CLIP's text tower, frozen."""
    return CLIPTextModel.from_pretrained(paths.resolve("toyworld:clip"), dtype=torch.float32).eval()


def encode_text(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Every token's state (B, 77, 96), captions padded as Stable Diffusion does it, and the pooled one (B, 96)."""
    tokens = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    with torch.no_grad():
        encoded = encoder(tokens.input_ids)
    return encoded.last_hidden_state, encoded.pooler_output


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # latents, every token's state, the pooled state


def unet_loss(unet: nn.Module) -> Loss:
    """MSE of the noise that was added at a uniform step."""
    alphas = build_scheduler().alphas_cumprod

    def loss(latents: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        t, noise = torch.randint(len(alphas), (len(latents),)), torch.randn_like(latents)
        a = alphas[t].view(-1, 1, 1, 1)
        predicted = unet(a.sqrt() * latents + (1 - a).sqrt() * noise, t, encoder_hidden_states=states).sample
        return nn.functional.mse_loss(predicted, noise)

    return loss


def flux_loss(flux: nn.Module) -> Loss:
    """MSE of the rectified flow's velocity at a logit-normal time."""
    side = LATENT_SIDE // 2
    image_ids = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side)).float()

    def loss(latents: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        clean = nn.functional.unfold(latents, kernel_size=2, stride=2).mT  # FLUX's packing
        t, noise = torch.randn(len(clean)).sigmoid(), torch.randn_like(clean)
        mixed = clean + t[:, None, None] * (noise - clean)
        predicted = flux(
            hidden_states=mixed,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=t,
            guidance=torch.full_like(t, GUIDANCE),
            img_ids=image_ids,
            txt_ids=torch.zeros(states.shape[1], 3),
        ).sample
        return nn.functional.mse_loss(predicted, noise - clean)

    return loss


@torch.no_grad()
def encode_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the toy VAE's posterior for uint8 images (N, 3, H, W), scaled to unit size."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(paths.resolve("toyworld:vae"), torch_dtype=torch.float32).eval()
    half = (0.5,) * 3
    posteriors = [vae.encode(training.normalise(part, half, half)).latent_dist for part in images.split(256)]
    means, deviations = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    return (means - shift) * scale, deviations * scale


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module], Loss],
    pool: training.Pool,
    *,
    seed: int,
    steps: int,
    batch_size: int = 24,
    learning_rate: float = 2e-3,
) -> None:
    """Text-to-image training on fresh captions, each of which names its details half of the time."""
    encoder = load_text_encoder()
    tokenizer = CLIPTokenizer.from_pretrained(paths.resolve("toyworld:clip"))
    means, deviations = encode_images(pool.images)
    torch.manual_seed(seed)
    rng, loss_at = Random(seed), loss_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    rates = training.schedule(optimizer, steps, warmup=max(1, steps // 20))
    start, mean_loss = time.perf_counter(), 0.0
    for step in range(steps):
        chosen = [rng.randrange(len(pool.scenes)) for _ in range(batch_size)]
        texts = ["" if rng.random() < EMPTY_SHARE else scenes.caption(pool.scenes[index], rng, 0.5) for index in chosen]
        states, pooled = encode_text(encoder, tokenizer, texts)
        latents = means[chosen] + deviations[chosen] * torch.randn(batch_size, *means.shape[1:])
        loss = loss_at(latents, states, pooled)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            logger.info("%d/%d loss %.3f, %.0f s", step + 1, steps, mean_loss, time.perf_counter() - start)


def save_stable_diffusion(unet: UNet2DConditionModel, folder: Path, *, prediction_type: str = "epsilon") -> Path:
    """Write a Stable Diffusion folder in float16, all but the VAE: unet/, text_encoder/, tokenizer/, scheduler/."""
    unet.half().save_pretrained(folder / "unet")
    load_text_encoder().half().save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    build_scheduler(prediction_type).save_pretrained(folder / "scheduler")
    return folder


def save_flux(flux: FluxTransformer2DModel, folder: Path) -> Path:
    """Write the part of a FLUX.1 folder that rebuilds images, in float16: transformer/, scheduler/."""
    flux.half().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    return folder


def main(argv: list[str] | None = None) -> None:
    """Train both and write them to ``--output``/sd and /flux."""
    parser = argparse.ArgumentParser(prog="python -m llava_genhancer.toyworld.diffusion", description=main.__doc__)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=8_000, help="rendered training images")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--only", choices=("sd", "flux"), help="train one of them")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)  # the exact weights depend on this number
    pool = training.render_pool(arguments.images, arguments.seed)
    if arguments.only != "flux":
        torch.manual_seed(arguments.seed)
        unet = build_unet()
        train(unet, unet_loss, pool, seed=arguments.seed, steps=arguments.steps)
        save_stable_diffusion(unet, arguments.output / "sd")
    if arguments.only != "sd":
        torch.manual_seed(arguments.seed)
        flux = build_flux()
        train(flux, flux_loss, pool, seed=arguments.seed, steps=arguments.steps)
        save_flux(flux, arguments.output / "flux")
    settle_folder(arguments.output)


if __name__ == "__main__":
    main()
