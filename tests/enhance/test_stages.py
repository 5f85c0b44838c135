"""The stage tables: exactly what learns, what only lets gradients through, and what a stage's file may hold."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_genhancer.enhance.enhancer import Enhancer
from llava_genhancer.enhance.stages import build_stage, trainable_names
from llava_genhancer.errors import InputError

LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
PROJECTOR = {
    f"projector.{head}.{i}.{kind}" for head in ("to_vec", "to_txt") for i in (0, 1, 3) for kind in ("weight", "bias")
}


def encoder(tower: str, layers: int) -> set[str]:
    return {f"backbone.{tower}.encoder.layers.{i}.{name}" for i in range(layers) for name in LAYERS}


# Every linear layer of the two-layer vision tower, and of the one-layer text tower.
VISION, TEXT = encoder("vision_model", 2), encoder("text_model", 1)
PROJECTIONS = {
    "vision": {"backbone.visual_projection"},
    "all": {"backbone.visual_projection", "backbone.text_projection"},
}


def lora(adapted: set[str], *, bias: bool) -> set[str]:
    """LoRA's names on top of linear layers; CLIP's projections have no bias."""
    pairs = {f"{name}.lora_{x}.default.weight" for name in adapted for x in "AB"}
    return pairs | {f"{n}.base_layer.bias" for n in adapted if bias and not n.endswith("_projection")}


def learning(enhancer: Enhancer) -> set[str]:
    return {n for n, p in enhancer.named_parameters() if p.requires_grad}


def denoiser_names(enhancer: Enhancer) -> set[str]:
    return {f"denoiser.{n}" for n in enhancer.denoiser.state_dict()}


def step(enhancer: Enhancer) -> None:
    """One SGD step on noise."""
    generator = torch.Generator().manual_seed(0)
    side = enhancer.backbone.image_size
    tokens = enhancer.denoiser.token_shape
    latent = round(tokens[0] ** 0.5) * 2
    pixels = torch.randn(2, 3, side, side, generator=generator)
    latents = torch.randn(2, tokens[1] // 4, latent, latent, generator=generator)
    enhancer.train()
    draws = {"noise": torch.randn(2, *tokens, generator=generator), "t": torch.tensor([0.3, 0.6])}
    enhancer(pixels, latents, draws=draws).backward()
    torch.optim.SGD([p for p in enhancer.parameters() if p.requires_grad], lr=1.0).step()


# --- names ---------------------------------------------------------------------------------------------------------


def test_stage_1_learns_projector_and_denoiser(recipe_of, tiny_target) -> None:
    enhancer = build_stage(recipe_of(), 1, tiny_target)
    assert learning(enhancer) == PROJECTOR | denoiser_names(enhancer)
    assert not any("lora" in n for n, _ in enhancer.named_parameters())
    assert not any("logit_scale" in n for n, _ in enhancer.named_parameters())


def test_stage_2_only(recipe_of, tiny_target) -> None:
    enhancer = build_stage(recipe_of(), 2, tiny_target)
    assert learning(enhancer) == lora(VISION | PROJECTIONS["vision"], bias=True)


def test_stage_2_all(recipe_of, tiny_target) -> None:
    enhancer = build_stage(recipe_of(**{"stage2.trains": "backbone,projector,denoiser"}), 2, tiny_target)
    expected = lora(VISION | PROJECTIONS["vision"], bias=True) | PROJECTOR | denoiser_names(enhancer)
    assert learning(enhancer) == expected


def test_lora_without_biases(recipe_of, tiny_target) -> None:
    enhancer = build_stage(recipe_of(lora_bias="none"), 2, tiny_target)
    assert learning(enhancer) == lora(VISION | PROJECTIONS["vision"], bias=False)


def test_lora_on_both_towers_as_the_reference_has_it(recipe_of, tiny_target) -> None:
    enhancer = build_stage(recipe_of(lora_scope="all"), 2, tiny_target)
    assert learning(enhancer) == lora(VISION | TEXT | PROJECTIONS["all"], bias=True)


def test_full_fine_tuning(recipe_of, tiny_target, tiny_clip) -> None:
    from transformers import CLIPModel

    enhancer = build_stage(recipe_of(lora_rank=0), 2, tiny_target)
    vision = {n for n, _ in CLIPModel.from_pretrained(tiny_clip).named_parameters() if n.startswith("vis")}
    assert learning(enhancer) == {f"backbone.{n}" for n in vision}


def test_lora_on_siglip_spares_the_fused_attention(recipe_of, tiny_target, tiny_siglip) -> None:
    enhancer = build_stage(recipe_of(backbone=str(tiny_siglip)), 2, tiny_target)
    pooling = {f"backbone.vision_model.head.mlp.{name}" for name in ("fc1", "fc2")}
    assert learning(enhancer) == lora(VISION | pooling, bias=True)


@pytest.mark.parametrize("trains", ["backbone,projector,denoiser", "backbone"])
def test_end_to_end_and_single_part_tables(recipe_of, tiny_target, trains: str) -> None:
    """Fig. 6: everything in one stage; LoRA is then there from stage 1 on."""
    recipe = recipe_of(**{"stage1.trains": trains})
    enhancer = build_stage(recipe, 1, tiny_target)
    assert learning(enhancer) == trainable_names(enhancer, recipe, 1)
    assert lora(VISION | PROJECTIONS["vision"], bias=True) <= learning(enhancer)
    assert learning(build_stage(recipe, 2, tiny_target)) == lora(VISION | PROJECTIONS["vision"], bias=True)


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
@pytest.mark.parametrize(("stage", "rank"), [(1, 16), (2, 16), (2, 0)])
def test_all_that_learns_gets_a_gradient(
    recipe_of, tiny_target, tiny_clip, tiny_siglip, tiny_siglip2, kind: str, stage: int, rank: int
) -> None:
    """A parameter without one would hang DDP, and nothing frozen may have one."""
    folder = {"clip": tiny_clip, "siglip": tiny_siglip, "siglip2": tiny_siglip2}[kind]
    enhancer = build_stage(recipe_of(backbone=str(folder), lora_rank=rank), stage, tiny_target)
    step(enhancer)
    for name, parameter in enhancer.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_stage_2_only_trains_lora_through_a_frozen_denoiser(recipe_of, tiny_target) -> None:
    enhancer = build_stage(recipe_of(lora_dropout=0.0), 2, tiny_target)
    before = {n: p.detach().clone() for n, p in enhancer.named_parameters()}
    step(enhancer)
    changed = {n for n, p in enhancer.named_parameters() if not torch.equal(p, before[n])}
    # A's gradient passes through B, which starts at zero: B and the biases move first.
    assert changed == {n for n in learning(enhancer) if "lora_A" not in n}
    assert all(p.grad is None for part in (enhancer.denoiser, enhancer.projector) for p in part.parameters())
    step(enhancer)
    moved = {n for n, p in enhancer.named_parameters() if not torch.equal(p, before[n])}
    assert moved == learning(enhancer)


def test_the_gradient_comes_from_the_denoiser(recipe_of, tiny_target) -> None:
    """With the denoiser deaf to its condition, no gradient is left for the backbone."""
    enhancer = build_stage(recipe_of(), 2, tiny_target)
    with torch.no_grad():
        for name, parameter in enhancer.denoiser.named_parameters():
            if name.endswith(("text_embedder.linear_1.weight", "context_embedder.weight")):
                parameter.zero_()
    step(enhancer)
    gradients = [p.grad for p in enhancer.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in gradients)


def test_a_frozen_backbone_keeps_no_graph(recipe_of, tiny_target) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    assert not build_stage(recipe_of(), 1, tiny_target).tokens(pixels).requires_grad
    assert build_stage(recipe_of(), 2, tiny_target).tokens(pixels).requires_grad


# --- seeds and files -----------------------------------------------------------------------------------------------


def test_initialisation_depends_on_the_seed_alone(recipe_of, tiny_target) -> None:
    seen: list[int] = []

    def state(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(len(seen))  # whatever the process drew before
        seen.append(seed)
        before = torch.get_rng_state()
        state = build_stage(recipe_of(seed=seed), 2, tiny_target).state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        return state

    first, again, other = state(1), state(1), state(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first if n.startswith("denoiser"))
    assert any(not torch.equal(first[n], other[n]) for n in first if "lora_A" in n)


def save_learning(enhancer: Enhancer, file: Path, leave_out: str = "") -> Path:
    state = {n: p.detach().clone() for n, p in enhancer.named_parameters() if p.requires_grad and n != leave_out}
    save_file(state, file)
    return file


def test_stage_2_starts_from_stage_1(recipe_of, tiny_target, tmp_path) -> None:
    first = build_stage(recipe_of(), 1, tiny_target)
    step(first)
    second = build_stage(recipe_of(), 2, tiny_target, [save_learning(first, tmp_path / "weights.safetensors")])
    for name, value in first.state_dict().items():
        if name.startswith(("projector.", "denoiser.")):
            assert torch.equal(second.state_dict()[name], value)


@pytest.mark.parametrize("leave_out", ["projector.to_vec.1.bias", "denoiser.transformer.x_embedder.weight"])
def test_a_stage_file_with_a_gap_is_refused(recipe_of, tiny_target, tmp_path, leave_out: str) -> None:
    """Otherwise stage 2 would go on from random weights."""
    file = save_learning(build_stage(recipe_of(), 1, tiny_target), tmp_path / "weights.safetensors", leave_out)
    with pytest.raises(InputError, match=leave_out):
        build_stage(recipe_of(), 2, tiny_target, [file])


def test_a_stage_file_of_another_recipe_is_refused(recipe_of, tiny_target, tmp_path) -> None:
    file = save_learning(build_stage(recipe_of(vec_dim=16), 1, tiny_target), tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="another recipe"):
        build_stage(recipe_of(), 2, tiny_target, [file])


def test_a_damaged_stage_file_is_refused(recipe_of, tiny_target, tmp_path) -> None:
    file = save_learning(build_stage(recipe_of(), 1, tiny_target), tmp_path / "weights.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot be read .* remove it and repeat"):
        build_stage(recipe_of(), 2, tiny_target, [file])
