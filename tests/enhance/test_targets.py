"""Target tokenizers: three layouts of one VAE, latents as FLUX scales them, and one line for what cannot be read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_genhancer.architectures import FLUX_VAE_CONFIG
from llava_genhancer.enhance import targets
from llava_genhancer.enhance.backbones import load_full_model
from llava_genhancer.enhance.targets import VaeTarget, check_vae, load_vae_target
from llava_genhancer.enhance.vq import load_vq_target
from llava_genhancer.errors import InputError


@pytest.fixture(scope="module")
def small_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX's VAE with narrow layers: four levels, attention in the middle, 16 channels, shift and scale."""
    folder = tmp_path_factory.mktemp("flux") / "vae"
    config = {**json.loads((FLUX_VAE_CONFIG / "config.json").read_text()), "block_out_channels": [8, 8, 16, 16]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL.from_config({**config, "norm_num_groups": 4}).save_pretrained(folder)
    return folder


def bfl_state(vae: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers VAE's weights under the names and shapes of Black Forest Labs' ``ae.safetensors``."""
    layer = {"conv_shortcut": "nin_shortcut"}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    state = {}
    for name, value in vae.items():
        half, *path = name.split(".")
        kind = path[-1]
        match path:
            case ["down_blocks", i, "resnets", j, module, _]:
                new = f"down.{i}.block.{j}.{layer.get(module, module)}"
            case ["down_blocks", i, "downsamplers", _, _, _]:
                new = f"down.{i}.downsample.conv"
            case ["up_blocks", i, "resnets", j, module, _]:  # the lowest resolution has the highest number
                new = f"up.{3 - int(i)}.block.{j}.{layer.get(module, module)}"
            case ["up_blocks", i, "upsamplers", _, _, _]:
                new = f"up.{3 - int(i)}.upsample.conv"
            case ["mid_block", "resnets", j, module, _]:
                new = f"mid.block_{int(j) + 1}.{module}"
            case ["mid_block", "attentions", _, module, *_]:
                new = f"mid.attn_1.{attention[module]}"
                if value.ndim == 2:  # 1x1 convolutions there
                    value = value[:, :, None, None]
            case [module, _]:
                new = module.replace("conv_norm_out", "norm_out")
            case _:
                raise AssertionError(name)
        state[f"{half}.{new}.{kind}"] = value
    return state


def pictures(size: int = 32) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(params=["folder", "subfolder", "single file"])
def layout(request, small_flux: Path, tmp_path: Path, monkeypatch) -> Path:
    """The same VAE in each layout that is read."""
    if request.param == "folder":
        return small_flux
    if request.param == "subfolder":
        shutil.copytree(small_flux, tmp_path / "FLUX" / "vae")
        return tmp_path / "FLUX"
    monkeypatch.setattr(targets, "FLUX_VAE_CONFIG", small_flux)  # the shipped one is of full size
    state = bfl_state(load_file(small_flux / "diffusion_pytorch_model.safetensors"))
    save_file({n: v.contiguous() for n, v in state.items()}, tmp_path / "ae.safetensors")
    return tmp_path / "ae.safetensors"


@torch.no_grad()
def test_every_layout_is_the_same_vae(layout: Path, small_flux: Path) -> None:
    target = load_vae_target(str(layout), posterior="mean")
    vae = AutoencoderKL.from_pretrained(small_flux).eval()
    images = pictures()
    z = vae.encode(images.float() / 127.5 - 1).latent_dist.mean
    latents = target.encode(images)
    assert latents.shape == (2, 16, 4, 4)
    assert torch.allclose(latents, 0.3611 * (z - 0.1159), atol=1e-6)
    rebuilt = target.decode(latents)
    expected = ((vae.decode(z).sample + 1) / 2).clamp(0, 1) * 255
    assert rebuilt.dtype == torch.uint8
    assert (rebuilt.float() - expected).abs().max() <= 0.51
    assert (target.channels, target.downscale, target.latent_side(224)) == (16, 8, 28)


def test_the_shipped_config_is_flux() -> None:
    """16 channels at an eighth of the side; 83.8 million parameters, counted block by block."""
    config = AutoencoderKL.load_config(FLUX_VAE_CONFIG)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    assert (vae.config.scaling_factor, vae.config.shift_factor, vae.config.latent_channels) == (0.3611, 0.1159, 16)

    def conv(a: int, b: int, k: int = 3) -> int:
        return a * b * k * k + b

    def block(a: int, b: int) -> int:
        return 2 * a + conv(a, b) + 2 * b + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    middle = 2 * block(512, 512) + 2 * 512 + 4 * conv(512, 512, 1)
    down = [(128, 128), (128, 128), (128, 256), (256, 256), (256, 512), *[(512, 512)] * 3]
    up = [*[(512, 512)] * 6, (512, 256), *[(256, 256)] * 2, (256, 128), *[(128, 128)] * 2]
    encoder = conv(3, 128) + sum(block(*x) for x in down) + conv(128, 128) + conv(256, 256) + conv(512, 512)
    decoder = conv(16, 512) + sum(block(*x) for x in up) + 2 * conv(512, 512) + conv(256, 256)
    ends = 2 * 512 + conv(512, 32) + 2 * 128 + conv(128, 3)
    assert sum(p.numel() for p in vae.parameters()) == encoder + decoder + 2 * middle + ends
    assert bfl_state(vae.state_dict()).keys() >= {
        "encoder.down.0.block.0.norm1.weight",
        "decoder.up.3.upsample.conv.bias",
    }


# --- latents -------------------------------------------------------------------------------------------------------


def test_the_posterior_is_sampled_from_the_global_rng(small_flux: Path) -> None:
    target = load_vae_target(str(small_flux))
    distribution = target.module.encode(pictures().float() / 127.5 - 1).latent_dist
    torch.manual_seed(1)
    first, second = target.encode(pictures()), target.encode(pictures())
    torch.manual_seed(1)
    z = distribution.mean + distribution.std * torch.randn(distribution.mean.shape)
    assert torch.allclose(first, 0.3611 * (z - 0.1159), atol=1e-6)
    assert not torch.equal(first, second)
    mean = VaeTarget(target.module, "mean")
    assert torch.equal(mean.encode(pictures()), mean.encode(pictures()))


def test_a_vae_without_shift_or_scale(tiny_target: VaeTarget) -> None:
    mean = VaeTarget(tiny_target.module, "mean")
    z = mean.module.encode(pictures().float() / 127.5 - 1).latent_dist.mean
    assert torch.allclose(mean.encode(pictures()), z * mean.module.config.scaling_factor)


def test_the_vae_is_frozen_and_latents_are_fp32(small_flux: Path) -> None:
    target = load_vae_target(str(small_flux), dtype=torch.bfloat16)
    assert {p.dtype for p in target.module.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in target.module.parameters())
    assert not target.module.training
    assert target.encode(pictures()).dtype == torch.float32


def test_training_needs_no_decoder(small_flux: Path) -> None:
    target = load_vae_target(str(small_flux), posterior="mean")
    latents, size = target.encode(pictures()), sum(p.numel() for p in target.module.parameters())
    target.drop_decoder()
    assert torch.equal(target.encode(pictures()), latents)
    assert sum(p.numel() for p in target.module.parameters()) < size / 2


def test_sizes_that_do_not_fit(small_flux: Path) -> None:
    with pytest.raises(InputError, match="image_size=232 is not a multiple of 16"):
        load_vae_target(str(small_flux)).latent_side(232)


# --- bad paths -----------------------------------------------------------------------------------------------------


def _write(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def _cut(folder: Path) -> Path:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return folder


def _gap(folder: Path) -> Path:
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["encoder.conv_in.weight"]
    save_file(state, file)
    return folder


def _single_gap(folder: Path) -> Path:
    state = bfl_state(load_file(folder / "diffusion_pytorch_model.safetensors"))
    del state["encoder.conv_in.weight"]
    save_file({n: v.contiguous() for n, v in state.items()}, folder / "ae.safetensors")
    return folder / "ae.safetensors"


def _no_weights(folder: Path) -> Path:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    return folder


def _a_vq_model(folder: Path) -> Path:
    from diffusers import VQModel

    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder / "vq")
    return folder / "vq"


def _other_width(folder: Path) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "block_out_channels": [8, 8, 16, 32]}))
    return folder


def _no_config(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder


def _a_unet(folder: Path) -> Path:
    save_file({"unet.weight": torch.zeros(2)}, folder / "unet.safetensors")
    return folder / "unet.safetensors"


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda f: f / "nothing", "does not exist"),
    "no config": (_no_config, "no config.json there"),
    "a pickle": (_write("vae.pt", b"x"), "only .safetensors single files are read"),
    "no safetensors": (_write("ae.safetensors", b"x" * 100), "cannot be loaded"),
    "weights of another model": (_a_unet, "cannot be loaded"),
    "cut weights": (_cut, "cannot be loaded"),
    "a weight is missing": (_gap, "encoder.conv_in.weight"),
    "no weights": (_no_weights, "cannot be loaded"),
    "another class": (_a_vq_model, "cannot be loaded"),
    "a single file with a gap": (_single_gap, "cannot be loaded"),
    "another width": (_other_width, "cannot be loaded"),
    "config is no JSON": (lambda f: _write("config.json", b"{")(f).parent, "cannot be loaded"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_vae_is_one_line(small_flux: Path, tmp_path: Path, monkeypatch, case: str) -> None:
    monkeypatch.setattr(targets, "FLUX_VAE_CONFIG", small_flux)
    make, words = BAD[case]
    name = str(make(Path(shutil.copytree(small_flux, tmp_path / "vae"))))
    with pytest.raises(InputError) as caught:
        load_vae_target(name)
    message = str(caught.value)
    assert words in message
    assert name in message
    assert "\n" not in message


def test_a_hub_id_without_a_hub() -> None:
    with pytest.raises(InputError, match="a hub id this machine can reach"):
        load_vae_target("nobody/such-a-vae")


def test_paths_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        check_vae("~/no/such/ae.safetensors")
    with pytest.raises(InputError, match=r"no config\.json there"):
        check_vae(str(tmp_path))


@pytest.mark.parametrize("part", ["backbone", "vae", "vq"])
def test_broken_weights_are_named_before_they_become_a_bad_loss(part, tiny_clip, tiny_vae, tiny_vq, tmp_path) -> None:
    source = {"backbone": tiny_clip, "vae": tiny_vae, "vq": tiny_vq}[part]
    load = {"backbone": load_full_model, "vae": load_vae_target, "vq": load_vq_target}[part]
    folder = Path(shutil.copytree(source, tmp_path / part))
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    name = next(n for n in sorted(state) if n.startswith(("text_model.", "decoder.")))  # no loss reaches it
    state[name].view(-1)[0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{part} {folder}: {name} is not finite"):
        load(str(folder))
