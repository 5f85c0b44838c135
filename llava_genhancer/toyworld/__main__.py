"""Trains and writes the models that are shipped under ``weights/``, the Llama of ``language.py`` too.

``python -m llava_genhancer.toyworld --output DIR``: about half an hour on one core; ``training.py`` has the loops. The
shipped VQ-VAE comes from ``--only vq --images 8000``; the diffusion models have a command of their own in
``diffusion.py``.
"""

import argparse
import logging
from pathlib import Path

import torch

from llava_genhancer.files import settle_folder
from llava_genhancer.toyworld import language, models, training

logger = logging.getLogger(__name__)

TRAINED_HERE = ("clip", "vae", "vq", "llama")


def main(argv: list[str] | None = None) -> None:
    """Train the models and write them to ``--output``/clip, /vae, /vq and /llama."""
    parser = argparse.ArgumentParser(prog="python -m llava_genhancer.toyworld", description=main.__doc__)
    parser.add_argument("--output", required=True, type=Path, help="folder to write clip/, vae/, vq/ and llama/ into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=24_000, help="rendered training images for CLIP, VAE and VQ-VAE")
    parser.add_argument("--threads", type=int, default=1, help="the exact weights depend on this number too")
    parser.add_argument("--only", choices=TRAINED_HERE, help="train one of them")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(arguments.threads)
    logger.info("seed %d, %d thread(s)", arguments.seed, arguments.threads)
    chosen = [arguments.only] if arguments.only else list(TRAINED_HERE)
    if "llama" in chosen:
        language.save_llama(language.train_llama(seed=arguments.seed), arguments.output / "llama", half=True)
        settle_folder(arguments.output / "llama")
    if chosen == ["llama"]:
        return
    world = training.render_pool(arguments.images, arguments.seed)
    if "clip" in chosen:
        models.save_clip(training.train_clip(world, seed=arguments.seed), arguments.output / "clip", half=True)
    if "vae" in chosen:
        models.save_vae(training.train_vae(world, seed=arguments.seed), arguments.output / "vae", half=True)
    if "vq" in chosen:
        models.save_vae(training.train_vq(world, seed=arguments.seed), arguments.output / "vq", half=True)
    settle_folder(arguments.output)


if __name__ == "__main__":
    main()
