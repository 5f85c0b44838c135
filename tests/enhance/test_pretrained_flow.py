"""A pretrained FLUX as denoiser (Table 7): its size, its weights, frozen halves, and what does not fit."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from llava_genhancer import recipes
from llava_genhancer.architectures import FLUX_CONFIG
from llava_genhancer.enhance.conditions import Condition
from llava_genhancer.enhance.denoisers.flow import FlowDenoiser, new_transformer, patchify
from llava_genhancer.enhance.stages import build_stage
from llava_genhancer.enhance.targets import VaeTarget
from llava_genhancer.errors import InputError


def test_parameters_of_table_7() -> None:
    recipe = recipes.get_recipe("openai-l14-224-flux")
    with torch.device("meta"):
        ours = new_transformer(recipe, 16)
        theirs = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(FLUX_CONFIG))
    assert sum(p.numel() for p in ours.parameters()) == 11_901_408_320
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


def test_the_loss_is_what_diffusers_own_module_gives(flux_of, flux_folder, tiny_target) -> None:
    recipe = flux_of()
    denoiser = FlowDenoiser.from_recipe(recipe, tiny_target, 32)
    flux = FluxTransformer2DModel.from_pretrained(flux_folder / "transformer", torch_dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(3, 8, 8, 8, generator=g), torch.randn(3, 16, 32, generator=g)
    told = Condition(torch.randn(3, 96, generator=g), torch.randn(3, 5, 96, generator=g))
    t = torch.tensor([0.2, 0.5, 0.9])
    clean = patchify(latents)
    ids = torch.tensor([[0.0, row, column] for row in range(4) for column in range(4)])
    with torch.no_grad():
        said = flux(
            hidden_states=clean + t[:, None, None] * (noise - clean),
            encoder_hidden_states=told.txt,
            pooled_projections=told.vec,
            timestep=t,
            guidance=torch.full((3,), recipe.guidance),
            img_ids=ids,
            txt_ids=torch.zeros(5, 3),
        ).sample
        loss = denoiser(latents, told, noise=noise, t=t)
    assert float(loss) == pytest.approx(float((said - (noise - clean)).square().mean()), rel=1e-4)


def test_frozen_it_stays_in_half_precision_and_lets_gradients_through(flux_of, tiny_target) -> None:
    half = build_stage(flux_of(denoiser_dtype="bfloat16"), 1, tiny_target).train()
    whole = build_stage(flux_of(), 1, tiny_target).train()
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for n, p in half.named_parameters() if not n.startswith("denoiser.")} == {torch.float32}
    learning = {n for n, p in half.named_parameters() if p.requires_grad}
    heads = {
        f"projector.{way}.{i}.{kind}" for way in ("to_vec", "to_txt") for i in (0, 1, 3) for kind in ("weight", "bias")
    }
    assert learning == heads
    g = torch.Generator().manual_seed(0)
    pixels, latents = torch.randn(2, 3, 32, 32, generator=g), torch.randn(2, 8, 8, 8, generator=g)
    draws = {"noise": torch.randn(2, 16, 32, generator=g), "t": torch.tensor([0.3, 0.8])}
    losses = [enhancer(pixels, latents, draws=draws) for enhancer in (half, whole)]
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=0.02)
    losses[0].backward()
    assert all(p.grad is not None for n, p in half.named_parameters() if n in learning)


def test_it_may_learn_from_where_it_was(flux_of, flux_folder, tiny_target) -> None:
    recipe = flux_of(**{"stage1.trains": "projector,denoiser"})
    enhancer = build_stage(recipe, 1, tiny_target)
    saved = FluxTransformer2DModel.from_pretrained(flux_folder / "transformer").state_dict()
    loaded = enhancer.denoiser.transformer.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    learning = {n for n, p in enhancer.named_parameters() if p.requires_grad}
    assert {n for n in learning if n.startswith("denoiser.")} == {f"denoiser.transformer.{n}" for n in saved}


def test_another_size_is_refused_with_what_to_say(flux_of, recipe_of, flux_folder, tiny_target) -> None:
    recipe = recipe_of(denoiser_weights=str(flux_folder), denoiser_layers=3)
    with pytest.raises(InputError, match="add --denoiser_layers 1 --vec_dim 96 --txt_dim 96"):
        FlowDenoiser.from_recipe(recipe, tiny_target, 32)
    other = VaeTarget(tiny_target.module)
    other.channels = 4
    with pytest.raises(InputError, match="latents of 8 channels, and vae"):
        FlowDenoiser.from_recipe(flux_of(), other, 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"denoiser_dtype": "bfloat16", "stage1.trains": "projector,denoiser"}, "for a frozen denoiser"),
        ({"denoiser_dtype": "bfloat16", "denoiser_weights": None}, "needs denoiser_weights"),
    ],
)
def test_half_precision_that_would_be_trained_is_refused(flux_of, changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        flux_of(**changes)


def test_a_folder_without_it_and_a_pickle_are_refused(flux_of, tiny_target, tmp_path: Path) -> None:
    (tmp_path / "flux.ckpt").write_bytes(b"")
    for path, words in ((tmp_path, "no transformer/config.json"), (tmp_path / "flux.ckpt", "only FLUX.1's")):
        with pytest.raises(InputError, match=words):
            FlowDenoiser.from_recipe(flux_of(denoiser_weights=str(path)), tiny_target, 32)
