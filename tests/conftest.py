"""Shared ground: one thread per process, no hub, and tiny models of the real classes as ordinary folders."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def strict_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval lets Pillow fill up truncated images, in every test that shares a process with its own."""
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer CLIPModel folder, 32 px, with processor and tokenizer."""
    from transformers import CLIPModel

    from llava_genhancer.toyworld.models import build_clip_config, save_clip
    from llava_genhancer.toyworld.tokenizer import write_tokenizer

    folder = tmp_path_factory.mktemp("models") / "clip"
    words = len(write_tokenizer(folder))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = build_clip_config(words, width=32, layers=2, text_layers=1, image_size=32)
        return save_clip(CLIPModel(config), folder)


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AutoencoderKL folder, f = 4, 4 channels."""
    from llava_genhancer.toyworld.models import build_vae, save_vae

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return save_vae(build_vae(), tmp_path_factory.mktemp("models") / "vae")


@pytest.fixture(scope="session")
def tiny_vq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random VQModel folder, f = 4, 32 codes of 6 channels."""
    from diffusers import VQModel

    folder = tmp_path_factory.mktemp("models") / "vq"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vq = VQModel(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            norm_num_groups=4,
            latent_channels=6,
            num_vq_embeddings=32,
        )
        torch.nn.init.normal_(vq.quantize.embedding.weight)
        vq.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small JPEGs of smooth random colour."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        pixels = torch.rand(3, 5, 5, generator=generator)[None]
        pixels = torch.nn.functional.interpolate(pixels, size=(40, 48), mode="bicubic").clamp(0, 1)[0]
        array = (pixels * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(array).save(folder / f"{i:03}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def tiny_fields(tiny_clip: Path, tiny_vae: Path, images_folder: Path) -> dict[str, object]:
    """Recipe fields of a run that takes seconds: 12 + 8 steps of the whole method."""
    return {
        "backbone": str(tiny_clip),
        "vae": str(tiny_vae),
        "data": str(images_folder),
        "denoiser_layers": 1,
        "denoiser_single_layers": 1,
        "denoiser_heads": 2,
        "denoiser_head_dim": 16,
        "denoiser_rope_axes": "4,6,6",
        "vec_dim": 32,
        "txt_dim": 32,
        "global_batch_size": 8,
        "per_device_batch_size": 4,
        "num_workers": 0,
        "precision": "fp32",
        "sample_images": 3,
        "sample_ode_steps": 2,
        "stage1.learning_rate": 1e-3,
        "stage1.max_steps": 12,
        "stage1.save_steps": 5,
        "stage1.sample_steps": 6,
        "stage1.log_steps": 2,
        "stage2.learning_rate": 1e-3,
        "stage2.max_steps": 8,
        "stage2.save_steps": 4,
        "stage2.sample_steps": 4,
        "stage2.log_steps": 2,
        "stage2.snapshot_steps": "4",
    }


@pytest.fixture(scope="session")
def masked_fields(tiny_fields: dict[str, object], tiny_vq: Path) -> dict[str, object]:
    """The same run with the discrete denoiser."""
    from llava_genhancer.recipes import READ_BY

    unread = {name for name, readers in READ_BY.items() if "masked" not in readers}
    fields = {name: value for name, value in tiny_fields.items() if name not in unread}
    return {**fields, "denoiser": "masked", "condition_into": "txt", "vq": str(tiny_vq)}


@pytest.fixture(scope="session")
def llava_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA's ``hf/`` and ``llava/``, as a run's ``llava-finetune`` holds them."""
    from small_llava import write_llava_folders

    return write_llava_folders(tmp_path_factory.mktemp("run") / "llava-finetune")
