"""Tower folders of the three kinds, tiny and random, exported as a run does it; forks that follow the real rules."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fork_sources import FORKS, Fork, write_fork

from llava_genhancer.tower.export import save_tower


@pytest.fixture(scope="session")
def towers(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``clip``: 32 px, 16 patches and a CLS; ``siglip``: 48 px, 36 patches; ``siglip2``: NaFlex, 32 px, 16 patches."""
    from transformers import CLIPModel, Siglip2Config, Siglip2ImageProcessor, Siglip2Model, SiglipModel

    from llava_genhancer.toyworld.models import save_siglip

    folder = tmp_path_factory.mktemp("towers")
    siglip = save_siglip(folder / "original-siglip")
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {**shared, "num_patches": 16, "patch_size": 8}
        text = {**shared, "vocab_size": 64, "max_position_embeddings": 16, "projection_size": 32}
        text |= {"pad_token_id": 1, "bos_token_id": 62, "eos_token_id": 63}
        naflex = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
    source = folder / "original-siglip2"
    naflex.save_pretrained(source)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(source)
    (source / "tokenizer.json").write_bytes((siglip / "tokenizer.json").read_bytes())
    models = {
        "clip": (CLIPModel.from_pretrained(tiny_clip), tiny_clip),
        "siglip": (SiglipModel.from_pretrained(siglip), siglip),
        "siglip2": (naflex, source),
    }
    return {
        name: save_tower(model, folder / name, source=str(original), marker={})
        for name, (model, original) in models.items()
    }


@pytest.fixture
def fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | Fork], str]]:
    """Writes one of the forks where it can be imported, and forgets it, and every hook, afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    packages: list[str] = []

    def make(name: str | Fork) -> str:
        packages.append(write_fork(FORKS[name] if isinstance(name, str) else name, tmp_path))
        importlib.invalidate_caches()
        return packages[-1]

    hooks = list(sys.meta_path)
    yield make
    sys.meta_path[:] = hooks
    for name in [n for n in sys.modules if n.split(".")[0] in packages]:
        del sys.modules[name]
