"""Conditions: which tokens are told (Fig. 5), where they enter, and that each way reaches the loss."""

import pytest
import torch

from llava_genhancer import recipes
from llava_genhancer.enhance.backbones import load_backbone
from llava_genhancer.enhance.conditions import Projector
from llava_genhancer.enhance.enhancer import build_enhancer
from llava_genhancer.errors import InputError

B, N, D = 3, 10, 8


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(B, 1 + N, D, generator=torch.Generator().manual_seed(0))


def projector(recipe_of, **changes) -> Projector:
    return Projector(recipe_of(**changes), D)


@pytest.mark.parametrize("folder", ["tiny_clip", "tiny_siglip", "tiny_siglip2"])
@torch.no_grad()
def test_tokens_are_the_global_one_and_the_last_layers(recipe_of, folder, request) -> None:
    """Against the full model's own outputs; CLIP's locals by its norm and projection, written out here."""
    from transformers import AutoModel

    path = request.getfixturevalue(folder)
    backbone = load_backbone(recipe_of(backbone=str(path))).eval()
    side = backbone.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    tokens = backbone.tokens(pixels)
    assert tokens.shape == (2, 1 + (side // backbone.patch_size) ** 2, backbone.token_dim)
    assert torch.allclose(tokens[:, 0], backbone(pixels), atol=1e-6)
    if folder == "tiny_siglip2":
        return  # its inputs are patches; that they are cut right is the global token's test
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    hidden = model.vision_model(pixels).last_hidden_state
    if folder == "tiny_clip":
        norm = model.vision_model.post_layernorm
        hidden = torch.nn.functional.layer_norm(hidden[:, 1:], (hidden.shape[-1],), norm.weight, norm.bias, norm.eps)
        hidden = hidden @ model.visual_projection.weight.T
    assert torch.allclose(tokens[:, 1:], hidden, atol=1e-5)


def test_the_global_token_alone(recipe_of, tokens) -> None:
    told = projector(recipe_of)
    assert not told.needs_locals
    condition = told(tokens[:, :1])
    assert condition.vec.shape == (B, 32)
    assert condition.txt.shape == (B, 1, 32)
    assert torch.equal(told(tokens).txt, condition.txt)


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.1, 1), (0.5, 5), (0.8, 8), (1.0, 10)])
def test_a_share_of_the_local_tokens(recipe_of, tokens, ratio: float, count: int) -> None:
    told = projector(recipe_of, condition="locals", local_ratio=ratio).train()
    chosen = told.choose(tokens)
    assert chosen.shape == (B, 1 + count, D)
    assert torch.equal(chosen[:, 0], tokens[:, 0])
    for image, kept in zip(tokens, chosen, strict=True):
        places = [int((image == token).all(-1).nonzero()) for token in kept]
        assert len(set(places)) == 1 + count, "without replacement no token comes twice"
        assert places[0] == 0


def test_locals_are_drawn_anew_in_training_and_spread_evenly_in_pictures(recipe_of, tokens) -> None:
    told = projector(recipe_of, condition="locals", local_count=4)
    torch.manual_seed(0)
    draws = torch.stack([told.train().choose(tokens) for _ in range(200)])
    assert not torch.equal(draws[0], draws[1])
    share = torch.stack([(draws == tokens[:, i, None]).all(-1).any(-1).float().mean() for i in range(1, 1 + N)])
    assert torch.allclose(share, torch.full((N,), 0.4), atol=0.06), "every place alike"
    still = told.eval().choose(tokens)
    assert torch.equal(still, told.choose(tokens))
    assert torch.equal(still, tokens[:, [0, 1, 4, 7, 10]])
    torch.manual_seed(0)
    assert torch.equal(draws[0], told.train().choose(tokens)), "from the global RNG, so that a resumed run goes on"


def test_with_replacement_as_many_as_asked_for(recipe_of, tokens) -> None:
    told = projector(recipe_of, condition="locals", local_count=76, local_replacement=True).train()
    chosen = told.choose(tokens)
    assert chosen.shape == (B, 77, D)
    assert ((chosen[:, 1:, None] == tokens[:, None, 1:]).all(-1).sum(-1) == 1).all()


def test_pooled_locals(recipe_of, tokens) -> None:
    chosen = projector(recipe_of, condition="pooled").choose(tokens)
    assert torch.allclose(chosen[:, 1], tokens[:, 1:].sum(1) / N, atol=1e-6)
    assert chosen.shape == (B, 2, D)


@pytest.mark.parametrize("into", ["vec", "txt", "both"])
def test_each_way_in_carries_the_condition_to_the_loss(recipe_of, tiny_target, into: str) -> None:
    """The loss depends on what the backbone saw, and every weight of the projector learns."""
    recipe = recipe_of(condition_into=into)
    enhancer = build_enhancer(recipe, tiny_target).eval()
    assert {n.split(".")[0] for n, _ in enhancer.projector.named_parameters()} == {
        f"to_{way}" for way in (("vec", "txt") if into == "both" else (into,))
    }
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    latents = torch.randn(2, 8, 8, 8, generator=generator)
    draws = {"noise": torch.randn(2, 16, 32, generator=generator), "t": torch.tensor([0.3, 0.9])}
    enhancer.requires_grad_(True)
    loss = enhancer(pixels, latents, draws=draws)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in enhancer.projector.parameters())
    with torch.no_grad():
        assert enhancer(pixels.flip(0), latents, draws=draws) != loss
        assert enhancer.rebuild(pixels, torch.Generator().manual_seed(0)).shape == latents.shape


def test_a_linear_projector(recipe_of, tokens) -> None:
    told = projector(recipe_of, projector="linear", condition="locals")
    weight, bias = told.to_txt.weight, told.to_txt.bias
    assert torch.allclose(told(tokens).txt, tokens @ weight.T + bias, atol=1e-6)


def test_many_condition_tokens_train_the_flow_denoiser(recipe_of, tiny_target) -> None:
    enhancer = build_enhancer(recipe_of(condition="locals", local_ratio=0.5), tiny_target).train()
    loss = enhancer(torch.randn(2, 3, 32, 32), torch.randn(2, 8, 8, 8))
    assert torch.isfinite(loss)


def test_local_tokens_need_a_way_for_tokens() -> None:
    with pytest.raises(InputError, match="condition_into=vec carries the global token alone"):
        recipes.override(recipes.Recipe(), {"condition": "locals", "condition_into": "vec"})
