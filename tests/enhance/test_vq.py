"""VQ targets: three layouts against a plain VQ-GAN, what pickles may do (nothing), one line for what is not read."""

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from plain_vqgan import LLAMAGEN, TAMING, PlainVqGan
from safetensors.torch import save_file
from torch import Tensor

from llava_genhancer import recipes
from llava_genhancer.enhance.targets import check_target, load_target
from llava_genhancer.enhance.vq import VqTarget, check_vq, load_vq_target, vq_from_state
from llava_genhancer.errors import InputError

# f = 16 in five levels, as taming's and LlamaGen's have it.
SMALL = {"widths": (32, 32, 32, 32, 64), "channels": 24, "code_width": 8, "codes": 64}


@pytest.fixture(scope="module")
def taming() -> PlainVqGan:
    return PlainVqGan(TAMING, **SMALL)


@pytest.fixture(scope="module")
def llamagen() -> PlainVqGan:
    return PlainVqGan(LLAMAGEN, **SMALL)


def pictures(size: int = 64) -> Tensor:
    """Smooth noise: neighbouring encodings differ."""
    small = torch.rand(2, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(small, scale_factor=4) * 255).to(torch.uint8)


def agrees(target: VqTarget, plain: PlainVqGan, unit: bool) -> None:
    """The same ids, and the same pictures of them."""
    with torch.no_grad():
        images = pictures()
        ids = target.encode(images)
        assert ids.dtype == torch.long
        assert torch.equal(ids, plain.ids(images.float() / 127.5 - 1, unit))
        assert len(ids.unique()) > 8, "the test would see no mistake if all were alike"
        expected = ((plain.pixels(ids, unit) + 1) / 2).clamp(0, 1) * 255
        rebuilt = target.decode(ids)
    assert rebuilt.dtype == torch.uint8
    assert rebuilt.float().std() > 5
    assert (rebuilt.float() - expected).abs().max() <= 0.51


# --- layouts -------------------------------------------------------------------------------------------------------


def test_a_diffusers_folder_is_its_own_quantiser(tiny_vq: Path) -> None:
    target, vq = load_vq_target(str(tiny_vq)), VQModel.from_pretrained(tiny_vq).eval()
    images = pictures(32)
    with torch.no_grad():
        quantised, _, (_, _, ids) = vq.quantize(vq.encode(images.float() / 127.5 - 1).latents)
        expected = (vq.decode(quantised, force_not_quantize=True).sample + 1).clamp(0, 2) * 127.5
    assert torch.equal(target.encode(images), ids.view(2, 64))
    assert (target.decode(ids.view(2, 64)).float() - expected).abs().max() <= 0.51
    assert (target.codes, target.downscale, target.token_side(224)) == (32, 4, 56)


def test_a_pipeline_keeps_its_vq_in_a_subfolder(tiny_vq: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_vq, tmp_path / "pipeline" / "vqvae")
    ids = load_vq_target(str(tmp_path / "pipeline")).encode(pictures(32))
    assert torch.equal(ids, load_vq_target(str(tiny_vq)).encode(pictures(32)))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_taming_checkpoints(taming: PlainVqGan, tmp_path: Path, suffix: str) -> None:
    """As Lightning writes them, the discriminator and the perceptual loss beside the model."""
    leftovers = {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.perceptual_loss.lin0.bias": torch.zeros(1)}
    file, state = tmp_path / f"last{suffix}", {**taming.state, **leftovers}
    if suffix == ".ckpt":
        torch.save({"epoch": 1, "global_step": 2, "state_dict": state}, file)
    else:
        save_file(state, file)
    target = load_vq_target(str(file))
    assert (target.codes, target.downscale) == (64, 16)
    agrees(target, taming, unit=False)


@pytest.mark.parametrize("wrapper", ["model", "ema", None])
def test_llamagens_lookup_compares_directions(llamagen: PlainVqGan, tmp_path: Path, wrapper: str | None) -> None:
    state = {**llamagen.state, "quantize.codebook_used": torch.zeros(65536)}
    old = {"model": {n: torch.zeros_like(v) for n, v in state.items()}} if wrapper == "ema" else {}
    torch.save({**old, wrapper: state, "steps": 3} if wrapper else state, tmp_path / "vq_ds16_c2i.pt")
    target = load_vq_target(str(tmp_path / "vq_ds16_c2i.pt"))
    agrees(target, llamagen, unit=True)
    images = pictures().float() / 127.5 - 1
    assert not torch.equal(llamagen.ids(images, unit=True), llamagen.ids(images, unit=False))


def test_files_older_than_torch_1_6(taming: PlainVqGan, tmp_path: Path) -> None:
    torch.save({"state_dict": taming.state}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    agrees(load_vq_target(str(tmp_path / "old.ckpt")), taming, unit=False)


@pytest.mark.parametrize(
    ("names", "code_width", "codes"), [(TAMING, 256, 1024), (TAMING, 256, 16384), (LLAMAGEN, 8, 16384)]
)
def test_the_published_sizes(names: dict, code_width: int, codes: int) -> None:
    """128 channels x (1, 1, 2, 2, 4), 256 latent channels; on the meta device nothing is computed."""
    size = {"widths": (128, 128, 256, 256, 512), "channels": 256, "code_width": code_width, "codes": codes}
    plain = PlainVqGan(names, **size, device="meta")
    with torch.device("meta"):
        vq, unit = vq_from_state(plain.state)
    assert unit == (names is LLAMAGEN)
    assert sum(p.numel() for p in vq.parameters()) == sum(v.numel() for v in plain.state.values())
    target = VqTarget(vq)
    assert (target.codes, target.downscale) == (codes, 16)
    assert [target.token_side(size) ** 2 for size in (224, 336, 384)] == [196, 441, 576]


# --- frozen, light, exact ------------------------------------------------------------------------------------------


def test_the_vq_is_frozen_and_its_lookup_stays_in_fp32(tiny_vq: Path) -> None:
    target = load_vq_target(str(tiny_vq), dtype=torch.bfloat16)
    assert {p.dtype for p in target.module.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in target.module.parameters())
    assert not target.module.training
    assert torch.equal(target.codebook, VQModel.from_pretrained(tiny_vq).quantize.embedding.weight)
    same = target.encode(pictures(32)) == load_vq_target(str(tiny_vq)).encode(pictures(32))
    assert same.float().mean() > 0.8
    assert target.decode(target.encode(pictures(32))).dtype == torch.uint8


def test_training_needs_no_decoder(tiny_vq: Path) -> None:
    target = load_vq_target(str(tiny_vq))
    ids, size = target.encode(pictures(32)), sum(p.numel() for p in target.module.parameters())
    target.drop_decoder()
    assert torch.equal(target.encode(pictures(32)), ids)
    assert sum(p.numel() for p in target.module.parameters()) < size / 2


def test_sizes_that_do_not_fit(tiny_vq: Path) -> None:
    with pytest.raises(InputError, match="image_size=30 is not a multiple of 4, which this VQ-GAN needs"):
        load_vq_target(str(tiny_vq)).token_side(30)


def test_the_recipe_chooses_the_target(tiny_vq: Path, tiny_vae: Path) -> None:
    masked = recipes.override(recipes.get_recipe("tiny-masked"), {"vq": str(tiny_vq)})
    assert isinstance(load_target(masked), VqTarget)
    assert not isinstance(load_target(recipes.override(recipes.Recipe(), {"vae": str(tiny_vae)})), VqTarget)
    with pytest.raises(InputError, match=r"vq gone\.ckpt does not exist"):
        check_target(recipes.override(masked, {"vq": "gone.ckpt"}))


# --- pickles -------------------------------------------------------------------------------------------------------


class Call:
    """Pickled as a call of any function."""

    def __init__(self, function: Callable, *args: object):
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


def test_lightnings_callbacks_are_neither_needed_nor_run(taming: PlainVqGan, tmp_path: Path, monkeypatch) -> None:
    """taming's checkpoints name a class of a library that need not be installed."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__, "__qualname__": "ModelCheckpoint"})
    module.ModelCheckpoint = callback
    instance = callback()
    instance.best = {"path": "x"}
    content = {"callbacks": {callback: {"best_model_score": torch.tensor(1.0)}, "it": instance}}
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        torch.save({**content, "state_dict": taming.state}, tmp_path / "last.ckpt")
    agrees(load_vq_target(str(tmp_path / "last.ckpt")), taming, unit=False)


@pytest.mark.parametrize("as_module", ["builtins", "os", "shutil"])
def test_a_pickle_runs_nothing(taming: PlainVqGan, tmp_path: Path, as_module: str) -> None:
    import os

    mark = tmp_path / "mark"
    call = {
        "builtins": Call(eval, f"open({str(mark)!r}, 'w')"),
        "os": Call(os.system, f"touch {mark}"),
        "shutil": Call(shutil.copy, __file__, str(mark)),
    }[as_module]
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": taming.state, "hyper_parameters": call}, file)
    if as_module == "os":  # torch will not even name it
        with pytest.raises(InputError, match=r"save its state_dict as \.safetensors"):
            load_vq_target(str(file))
    else:
        agrees(load_vq_target(str(file)), taming, unit=False)
    torch.save(call, file)
    with pytest.raises(InputError):
        load_vq_target(str(file))
    assert not mark.exists()


# --- what is not read ----------------------------------------------------------------------------------------------


def _folder(change: Callable[[Path], None]) -> Callable[[Path, dict[str, Tensor]], Path]:
    def make(place: Path, state: dict[str, Tensor]) -> Path:
        change(place / "vq")
        return place / "vq"

    return make


def _state(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path, dict[str, Tensor]], Path]:
    def make(place: Path, state: dict[str, Tensor]) -> Path:
        changed = change(state)
        torch.save({"state_dict": state if changed is None else changed}, place / "x.ckpt")
        return place / "x.ckpt"

    return make


def without(state: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {n: v for n, v in state.items() if not n.startswith(start)}


def _bytes(name: str, data: bytes) -> Callable[[Path, dict[str, Tensor]], Path]:
    def make(place: Path, state: dict[str, Tensor]) -> Path:
        (place / name).write_bytes(data)
        return place / name

    return make


def _other_codes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_vq_embeddings": 64}))


def _cut(place: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": state}, place / "x.ckpt")
    data = (place / "x.ckpt").read_bytes()
    (place / "x.ckpt").write_bytes(data[: len(data) // 2])
    return place / "x.ckpt"


BAD: dict[str, tuple[Callable[[Path, dict[str, Tensor]], Path], str]] = {
    "missing": (lambda place, state: place / "vqgan.ckpt", "does not exist; give a diffusers VQModel folder"),
    "no config": (_folder(lambda f: (f / "config.json").unlink()), "no config.json there"),
    "no weights": (_folder(lambda f: (f / "diffusion_pytorch_model.safetensors").unlink()), "cannot be loaded"),
    "another codebook": (_folder(_other_codes), "cannot be loaded"),
    "another ending": (_bytes("vqgan.bin", b"x"), "a checkpoint file ends in .ckpt"),
    "no pickle": (_bytes("vqgan.ckpt", b"x" * 100), "cannot be loaded"),
    "an empty file": (_bytes("vqgan.pt", b""), "cannot be loaded"),
    "no safetensors": (_bytes("vqgan.safetensors", b"x" * 100), "cannot be loaded"),
    "a cut file": (_cut, "cannot be loaded"),
    "no dictionary": (_state(lambda s: [1, 2]), "no quantize.embedding.weight"),
    "Gumbel": (_state(lambda s: s.update({"quantize.embed.weight": s.pop("quantize.embedding.weight")})), "Gumbel"),
    "a gap": (_state(lambda s: without(s, "encoder.mid.block_2.conv1.bias")), "mid_block.resnets.1.conv1.bias"),
    "a gap above": (_state(lambda s: without(s, "decoder.up.4.attn.1.q.weight")), "up_blocks.0.attentions.1.to_q"),
    "a stranger": (_state(lambda s: s.update({"encoder.extra.weight": torch.zeros(2)})), "first: encoder.extra.weight"),
    "another shape": (_state(lambda s: s.update({"decoder.conv_out.bias": torch.zeros(4)})), "first: decoder.conv_out"),
    "no encoder": (
        _state(lambda s: without(s, "encoder.down")),
        "no encoder levels",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_vq_is_one_line(tiny_vq: Path, taming: PlainVqGan, tmp_path: Path, case: str) -> None:
    make, words = BAD[case]
    shutil.copytree(tiny_vq, tmp_path / "vq")
    name = str(make(tmp_path, dict(taming.state)))
    with pytest.raises(InputError) as caught:
        load_vq_target(name)
    message = str(caught.value)
    assert words in message
    assert name in message
    assert "\n" not in message


def test_a_hub_id_without_a_hub() -> None:
    with pytest.raises(InputError, match="a hub id this machine can reach"):
        load_vq_target("nobody/such-a-vq")


def test_paths_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    for name in ("~/no/such/folder", "vqgan_imagenet_f16_16384.ckpt"):
        with pytest.raises(InputError, match="does not exist"):
            check_vq(name)
    with pytest.raises(InputError, match=r"no config\.json there"):
        check_vq(str(tmp_path))
    check_vq("nobody/such-a-vq")
