"""Training loops for the toy world's CLIP, VAE and VQ-VAE: minutes on one core, exact in seed and threads."""

import logging
import tempfile
import time
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor
from transformers import CLIPModel

from llava_genhancer.toyworld import models, scenes
from llava_genhancer.toyworld.tokenizer import write_tokenizer
from llava_genhancer.toyworld.writers import DETAIL_PROBABILITY

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """Rendered training scenes: ``images`` is uint8 (N, 3, H, W)."""

    scenes: list[scenes.Scene]
    images: Tensor


def render_pool(count: int, seed: int, split: str = "train") -> Pool:
    """Render ``count`` scenes of ``split``."""
    rng = Random(seed)
    drawn = [scenes.sample_scene(rng, split) for _ in range(count)]
    return Pool(drawn, to_tensor(drawn))


def to_tensor(drawn: list[scenes.Scene]) -> Tensor:
    """Render ``drawn`` into uint8 (N, 3, H, W)."""
    pixels = np.stack([np.asarray(scenes.render(scene)) for scene in drawn])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (B, 3, H, W) to floats of the given mean and deviation, both for pixels in [0, 1]."""
    offset, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (images.float() / 255 - offset) / scale


def schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up under a cosine that ends at zero."""

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * float(np.cos(np.pi * step / steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_clip(
    pool: Pool,
    *,
    seed: int,
    steps: int = 550,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    detail_probability: float = DETAIL_PROBABILITY,
) -> CLIPModel:
    """Contrastive training on fresh captions of ``pool``'s images, each of which names its details rarely."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(folder)
    torch.manual_seed(seed)
    rng = Random(seed)
    model = CLIPModel(models.build_clip_config(len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    rates = schedule(optimizer, steps, warmup=max(1, steps // 10))
    start, mean_loss = time.perf_counter(), 0.0
    for step in range(steps):
        chosen = [rng.randrange(len(pool.scenes)) for _ in range(batch_size)]
        texts = [scenes.caption(pool.scenes[index], rng, detail_probability) for index in chosen]
        # Half of the captions begin as MMVP-VLM's prompts do.
        texts = [f"a photo of {text}" if rng.random() < 0.5 else text for text in texts]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        pixels = normalise(pool.images[chosen], models.CLIP_MEAN, models.CLIP_STD)
        loss = model(pixel_values=pixels, **tokens, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # ln 100, as OpenAI did
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 50)
        if (step + 1) % 100 == 0:
            logger.info("clip %d/%d loss %.3f, %.0f s", step + 1, steps, mean_loss, time.perf_counter() - start)
    return model.eval()


def train_vae(
    pool: Pool, *, seed: int, steps: int = 2400, batch_size: int = 16, learning_rate: float = 2e-3
) -> AutoencoderKL:
    """Reconstruction with a light KL term; ``shift_factor`` and ``scaling_factor`` make the latents unit-sized."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = models.build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0.01)
    rates = schedule(optimizer, steps, warmup=100)
    start = time.perf_counter()
    for step in range(steps):
        chosen = torch.randint(len(pool.images), (batch_size,), generator=generator)
        images = normalise(pool.images[chosen], (0.5,) * 3, (0.5,) * 3)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded - images
        divergence = posterior.kl().mean() / images[0].numel()
        loss = error.abs().mean() + error.square().mean() + 1e-4 * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if (step + 1) % 100 == 0:
            psnr = 10 * torch.log10(4 / error.detach().square().mean())
            logger.info("vae %d/%d psnr %.1f dB, %.0f s", step + 1, steps, psnr, time.perf_counter() - start)
    vae.eval()
    with torch.no_grad():
        images = normalise(pool.images[:2048], (0.5,) * 3, (0.5,) * 3)
        latents = torch.cat([vae.encode(part).latent_dist.sample(generator) for part in images.split(256)])
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    logger.info("latents: mean %.3f, deviation %.3f", latents.mean(), latents.std())
    return vae


def train_vq(
    pool: Pool,
    *,
    seed: int,
    steps: int = 1500,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    settle: int = 300,
) -> VQModel:
    """Reconstruction with a commitment term.

    For ``settle`` steps nothing is quantised. Then the codebook starts as encodings, and a code that nothing was near
    to for 100 steps becomes an encoding again: else most codes would never be used.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vq = models.build_vq()
    codebook = vq.quantize.embedding.weight
    optimizer = torch.optim.AdamW(vq.parameters(), lr=learning_rate, weight_decay=0.01)
    rates = schedule(optimizer, steps, warmup=100)
    used = torch.zeros(len(codebook), dtype=torch.bool)
    start = time.perf_counter()
    for step in range(steps):
        chosen = torch.randint(len(pool.images), (batch_size,), generator=generator)
        images = normalise(pool.images[chosen], (0.5,) * 3, (0.5,) * 3)
        encoded = vq.encode(images).latents
        if step >= settle and (step - settle) % 100 == 0 and step < 0.75 * steps:
            vectors = encoded.detach().movedim(1, -1).flatten(0, -2)
            with torch.no_grad():
                codebook[~used] = vectors[torch.randint(len(vectors), (int((~used).sum()),), generator=generator)]
            used.zero_()
        quantised, commitment, (_, _, ids) = vq.quantize(encoded)
        used[ids] = step >= settle
        told, commitment = (encoded, 0 * commitment) if step < settle else (quantised, commitment)
        error = vq.decoder(vq.post_quant_conv(told)) - images
        loss = error.abs().mean() + error.square().mean() + commitment
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if (step + 1) % 100 == 0:
            psnr = 10 * torch.log10(4 / error.detach().square().mean())
            seconds, codes = time.perf_counter() - start, len(ids.unique())
            logger.info("vq %d/%d psnr %.1f dB, %d codes in a batch, %.0f s", step + 1, steps, psnr, codes, seconds)
    return vq.eval()
