"""The discrete denoiser: masks, its loss against a second implementation, what learns, sizes, and unmasking."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from llava_genhancer import recipes
from llava_genhancer.enhance.conditions import Condition
from llava_genhancer.enhance.denoisers.masked import MaskedDenoiser, Sincos, draw_masks
from llava_genhancer.enhance.enhancer import build_enhancer
from llava_genhancer.enhance.stages import build_stage
from llava_genhancer.enhance.train import EnhanceTrainer, enhance
from llava_genhancer.enhance.vq import VqTarget, load_vq_target
from llava_genhancer.errors import InputError

PAPER = recipes.get_recipe("openai-l14-224-masked")
CODES, SIDE = 32, 4
N = SIDE**2
READOUTS = ("every", "last")


@pytest.fixture(scope="module")
def target(tiny_vq: Path) -> VqTarget:
    return load_vq_target(str(tiny_vq))


def denoiser_of(recipe: recipes.Recipe) -> MaskedDenoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MaskedDenoiser(recipe, CODES, SIDE)


def batch_of(recipe: recipes.Recipe, batch: int, tokens: int = 1) -> tuple[Tensor, Condition, Tensor]:
    """Token ids, a condition, and masks of different sizes."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(CODES, (batch, N), generator=generator)
    txt = torch.randn(batch, tokens, recipe.txt_dim, generator=generator)
    masked = torch.rand(batch, N, generator=generator) < torch.linspace(0.3, 0.9, batch)[:, None]
    return ids, Condition(None, txt), masked


# --- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 98), (0.75, 147), (0.9, 176), (1.0, 196), (0.001, 1)])
def test_a_fixed_ratio_hides_a_fixed_number(ratio: float, count: int) -> None:
    assert (draw_masks(50, 196, (ratio, ratio)).sum(1) == count).all()


def test_a_range_is_drawn_evenly_and_per_image() -> None:
    torch.manual_seed(0)
    masks = draw_masks(20_000, 100, (0.5, 0.9))
    counts = masks.sum(1)
    assert (int(counts.min()), int(counts.max())) == (50, 90)
    inner = torch.bincount(counts, minlength=101)[51:90] / 20_000
    assert (inner - 1 / 40).abs().max() < 0.005, "every count between the ends is as likely"
    assert (masks.float().mean(0) - 0.7).abs().max() < 0.02, "every position is hidden as often"


def test_masks_come_from_the_global_rng(masked_recipe_of) -> None:
    recipe = masked_recipe_of()
    denoiser, (ids, condition, _) = denoiser_of(recipe), batch_of(recipe, 3)
    torch.manual_seed(5)
    drawn = denoiser(ids, condition)
    torch.manual_seed(5)
    assert torch.equal(denoiser(ids, condition, masked=draw_masks(3, N, (0.5, 0.9))), drawn)


# --- the loss ------------------------------------------------------------------------------------------------------


def plain_loss(denoiser: MaskedDenoiser, ids: Tensor, txt: Tensor, masked: Tensor) -> Tensor:
    """One image's loss, from the weights alone: its unmasked tokens are cut out, so that nothing needs a mask.

    ids (N,), txt (L, D), masked (N,).
    """
    weights, heads = denoiser.state_dict(), denoiser.layers[0].heads

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))

    def layer(x: Tensor, known: Tensor, name: str) -> Tensor:
        """``x`` attends to ``known`` and the condition."""
        told = norm(txt, "norm_told")
        queries = linear(norm(x, f"{name}.norm_attention"), f"{name}.to_q")
        keys, values = linear(torch.cat([norm(known, f"{name}.norm_attention"), told]), f"{name}.to_kv").chunk(2, -1)
        mixed = []
        for q, k, v in zip(*(y.chunk(heads, -1) for y in (queries, keys, values)), strict=True):
            scores = (q @ k.T / math.sqrt(q.shape[-1])).exp()
            mixed.append(scores / scores.sum(-1, keepdim=True) @ v)
        x = x + linear(torch.cat(mixed, -1), f"{name}.to_out")
        h = linear(norm(x, f"{name}.norm_mlp"), f"{name}.mlp.0")
        return x + linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), f"{name}.mlp.2")

    table, place = weights["token.weight"], weights["position.table.weight"]
    seen, hidden = table[ids[~masked]] + place[~masked], table[-1] + place[masked]
    for i in range(len(denoiser.layers)):
        if denoiser.readout == "every" or i == len(denoiser.layers) - 1:
            hidden = layer(hidden, seen, f"layers.{i}")
        seen = layer(seen, seen, f"layers.{i}")
    scores = linear(norm(hidden, "norm_out"), "to_logits")
    chances = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return -chances[torch.arange(len(scores)), ids[masked]].log().mean()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("readout", READOUTS)
def test_the_loss_against_a_second_implementation(masked_recipe_of, readout: str, tokens: int) -> None:
    recipe = masked_recipe_of(denoiser_layers=3, masked_readout=readout)
    denoiser = denoiser_of(recipe)
    with torch.no_grad():
        for parameter in denoiser.parameters():  # norms and biases that do something
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    ids, condition, masked = batch_of(recipe, 4, tokens)
    expected = torch.stack([plain_loss(denoiser, *rows) for rows in zip(ids, condition.txt, masked, strict=True)])
    assert torch.allclose(denoiser(ids, condition, masked), expected.mean(), rtol=1e-5)
    assert expected.std() > 0.05, "the test would see no mistake in the masks if all were alike"


def test_a_batch_may_be_split(masked_recipe_of) -> None:
    """Ranks and micro-batches take the mean of their losses, whatever each image's share of masked tokens."""
    recipe = masked_recipe_of()
    denoiser, (ids, condition, masked) = denoiser_of(recipe), batch_of(recipe, 4)
    halves = [denoiser(ids[part], Condition(None, condition.txt[part]), masked[part]) for part in ([0, 1], [2, 3])]
    assert torch.allclose(torch.stack(halves).mean(), denoiser(ids, condition, masked))


@pytest.mark.parametrize("readout", READOUTS)
def test_hidden_tokens_are_hidden(masked_recipe_of, readout: str) -> None:
    recipe = masked_recipe_of(denoiser_layers=2, masked_readout=readout)
    denoiser, (ids, condition, masked) = denoiser_of(recipe), batch_of(recipe, 3)
    scores = denoiser.logits(ids, masked, condition)
    other = torch.where(masked, (ids + 1) % CODES, ids)
    assert torch.equal(denoiser.logits(other, masked, condition), scores)
    shown = torch.where(masked, ids, (ids + 1) % CODES)
    moved = (denoiser.logits(shown, masked, condition) - scores).abs().sum(-1)
    assert (moved[masked] > 0).all(), "what is shown reaches every hidden position"
    told = denoiser.logits(ids, masked, Condition(None, condition.txt.flip(0)))
    assert ((told - scores).abs().sum(-1) > 0)[[0, 2]].all(), "and so does the condition"


def test_one_layer_reads_out_in_it(masked_recipe_of) -> None:
    losses = []
    for readout in READOUTS:
        recipe = masked_recipe_of(denoiser_layers=1, masked_readout=readout)
        losses.append(denoiser_of(recipe)(*batch_of(recipe, 3)))
    assert torch.equal(*losses)


def test_recomputed_activations_are_the_same(masked_recipe_of) -> None:
    gradients = []
    for checkpointing in (False, True):
        recipe = masked_recipe_of(denoiser_layers=2, gradient_checkpointing=checkpointing)
        denoiser, (ids, condition, masked) = denoiser_of(recipe).train(), batch_of(recipe, 2)
        condition.txt.requires_grad_()
        denoiser(ids, condition, masked).backward()
        gradients.append([condition.txt.grad, *(p.grad for p in denoiser.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_loss_is_fp32_under_autocast(masked_recipe_of) -> None:
    recipe = masked_recipe_of()
    denoiser, (ids, condition, masked) = denoiser_of(recipe), batch_of(recipe, 2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = denoiser(ids, condition, masked)
        ids = denoiser.sample(condition, torch.Generator().manual_seed(0))
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, denoiser(batch_of(recipe, 2)[0], condition, masked), rtol=0.02)
    low = denoiser.bfloat16()(ids, Condition(None, condition.txt.bfloat16()), masked)
    assert low.dtype == torch.float32


# --- sizes and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "millions"), [(2, 59.0), (4, 84.1), (6, 109.3), (8, 134.5)])
def test_sizes_of_table_5(layers: int, millions: float) -> None:
    """Our width of 1024 with 16 384 codes on 14 x 14 tokens; the paper gives the layers and no width."""
    recipe = recipes.override(PAPER, {"denoiser_layers": layers})
    with torch.device("meta"):
        denoiser = MaskedDenoiser(recipe, 16_384, 14)
    d, codes, tokens = 1024, 16_384, 196
    layer = 4 * d * d + d + (8 * d * d + 5 * d) + 2 * 2 * d  # attention, MLP, two norms
    tables = (codes + 1) * d + tokens * d + d * codes + codes
    assert sum(p.numel() for p in denoiser.parameters()) == tables + layers * layer + 2 * 2 * d
    assert round(sum(p.numel() for p in denoiser.parameters()) / 1e6, 1) == millions
    assert denoiser.width == d == recipe.txt_dim


def test_positions_of_sines(masked_recipe_of) -> None:
    table = Sincos(4, 16).table
    grid = table.view(4, 4, 16)
    assert torch.equal(grid[:, :1, :8].expand(4, 4, 8), grid[:, :, :8]), "half of the channels tell the row"
    assert torch.equal(grid[:1, :, 8:].expand(4, 4, 8), grid[:, :, 8:]), "half the column"
    size = 0.02 * math.sqrt(2)
    assert torch.allclose(grid[2, 3, 0], size * torch.tensor(2.0).sin())
    assert torch.allclose(grid[2, 3, 8 + 4], size * torch.tensor(3.0).cos())
    assert torch.pdist(table).min() > 0.1 * size
    fixed = denoiser_of(masked_recipe_of(masked_positions="sincos"))
    assert not any(n.startswith("position") for n in fixed.state_dict()), "nothing to learn, nothing to store"
    learned = {n for n, _ in denoiser_of(masked_recipe_of()).named_parameters()}
    assert learned - {n for n, _ in fixed.named_parameters()} == {"position.table.weight"}


def wb(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


LAYER = wb("norm_attention", "norm_mlp", "to_out", "mlp.0", "mlp.2") | {"to_q.weight", "to_kv.weight"}
DENOISER = {f"layers.{i}.{n}" for i in range(2) for n in LAYER} | wb("norm_told", "norm_out", "to_logits")
DENOISER |= {"token.weight", "position.table.weight"}
PROJECTOR = wb("projector.to_txt.0", "projector.to_txt.1", "projector.to_txt.3")


def step(enhancer, target: VqTarget) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    enhancer.train()
    torch.manual_seed(0)
    enhancer(enhancer.backbone.normalise(images), target.encode(images)).backward()


@pytest.mark.parametrize(
    "changes", [{}, {"masked_readout": "last"}, {"mask_ratio": "1,1"}, {"masked_positions": "sincos"}]
)
def test_stage_1_learns_projector_and_denoiser_and_all_of_them(masked_recipe_of, target, changes: dict) -> None:
    """A parameter without a gradient would stop a distributed training."""
    enhancer = build_stage(masked_recipe_of(denoiser_layers=2, **changes), 1, target)
    learning = {n: p for n, p in enhancer.named_parameters() if p.requires_grad}
    expected = PROJECTOR | {f"denoiser.{n}" for n in DENOISER}
    assert set(learning) == expected - ({"denoiser.position.table.weight"} if "masked_positions" in changes else set())
    step(enhancer, target)
    assert not {n for n, p in learning.items() if p.grad is None or not p.grad.any()}


def test_stage_2_learns_the_backbone_through_a_frozen_denoiser(masked_recipe_of, target) -> None:
    enhancer = build_stage(masked_recipe_of(denoiser_layers=2), 2, target)
    learning = {n: p for n, p in enhancer.named_parameters() if p.requires_grad}
    assert learning
    assert all(n.startswith("backbone.") and ("lora_" in n or n.endswith(".base_layer.bias")) for n in learning)
    step(enhancer, target)
    assert not {n for n, p in learning.items() if p.grad is None}
    assert any(p.grad.any() for n, p in learning.items() if "lora_B" in n)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"txt_dim": 64}, "txt_dim=64 must be denoiser_heads x denoiser_head_dim = 32"),
        ({"denoiser_layers": 0}, "needs a layer"),
        ({"denoiser_heads": 3, "denoiser_head_dim": 2, "txt_dim": 6, "masked_positions": "sincos"}, "that 4 divides"),
        ({"unmask_temperature": -1.0}, "must not be negative"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(masked_recipe_of, changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        masked_recipe_of(**changes)


def test_an_image_size_that_the_vq_cannot_tile_is_refused(masked_recipe_of, target) -> None:
    with pytest.raises(InputError, match="not a multiple of 4"):
        MaskedDenoiser.from_recipe(masked_recipe_of(), target, 30)


# --- iterative unmasking -------------------------------------------------------------------------------------------


class Seen(list):
    """What a sampler's ``logits`` was asked, answered by fixed scores (B, N, V)."""

    def __init__(self, scores: Tensor):
        self.scores = scores

    def __call__(self, ids: Tensor, masked: Tensor, condition: Condition) -> Tensor:
        self.append((ids.clone(), masked.clone()))
        return self.scores


@pytest.mark.parametrize("steps", [1, 4, 40])
def test_unmasking_follows_a_cosine_and_never_takes_back(masked_recipe_of, monkeypatch, steps: int) -> None:
    recipe = masked_recipe_of(sample_ode_steps=steps)
    denoiser = denoiser_of(recipe)
    seen = Seen(torch.randn(3, N, CODES))
    monkeypatch.setattr(denoiser, "logits", seen)
    ids = denoiser.sample(batch_of(recipe, 3)[1], torch.Generator().manual_seed(0))
    counts = [masked.sum(1).tolist() for _, masked in seen]
    assert counts == [[int(N * math.cos(math.pi / 2 * k / steps))] * 3 for k in range(steps)]
    for (_, before), (after, masked) in zip(seen, [*seen[1:], (ids, torch.zeros(3, N, dtype=bool))], strict=True):
        assert not (masked & ~before).any()
        assert torch.equal(after[~masked], ids[~masked]), "a token that was kept stays"
    assert 0 <= ids.min() <= ids.max() < CODES


def test_tokens_are_drawn_as_likely_as_scored(masked_recipe_of, monkeypatch) -> None:
    recipe = masked_recipe_of(sample_ode_steps=1)
    denoiser = denoiser_of(recipe)
    scores = torch.randn(CODES)
    monkeypatch.setattr(denoiser, "logits", Seen(scores.expand(2000, N, CODES)))
    ids = denoiser.sample(batch_of(recipe, 2000)[1], torch.Generator().manual_seed(0))
    shares = torch.bincount(ids.flatten(), minlength=CODES) / ids.numel()
    assert (shares - scores.softmax(0)).abs().max() < 0.006


def test_without_temperature_the_surest_come_first(masked_recipe_of, monkeypatch) -> None:
    recipe = masked_recipe_of(sample_ode_steps=16, unmask_temperature=0.0)
    denoiser = denoiser_of(recipe)
    truth = torch.randint(CODES, (1, N))
    order = torch.randperm(N)
    sureness = 30.0 + order.float()  # all but certain, and growing with the order
    seen = Seen(torch.nn.functional.one_hot(truth, CODES).float() * sureness[:, None] / 4)
    monkeypatch.setattr(denoiser, "logits", seen)
    ids = denoiser.sample(batch_of(recipe, 1)[1], torch.Generator().manual_seed(0))
    assert torch.equal(ids, truth)
    for _, masked in seen[1:]:
        assert sureness[masked[0]].max() < sureness[~masked[0]].min()


def test_pictures_repeat_and_leave_training_as_it_was(masked_recipe_of, target) -> None:
    enhancer = build_enhancer(masked_recipe_of(), target).train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    first, again, other = (enhancer.rebuild(pixels, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == (2, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert enhancer.training
    assert target.decode(first).shape == (2, 3, 32, 32)


# --- a training ----------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for kill -9: nothing of ours may catch it."""


def test_a_training_resumes_bit_identically_and_exports(masked_recipe_of, tmp_path: Path, monkeypatch) -> None:
    recipe = masked_recipe_of()
    enhance(recipe, tmp_path / "whole")

    class Bomb(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if (Path(args.output_dir).name, state.global_step) in {("stage1", 7), ("stage2", 6)}:
                raise Crash

    original = EnhanceTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Bomb())

    for stage in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(EnhanceTrainer, "__init__", init)
            with pytest.raises(Crash):
                enhance(recipe, tmp_path / "cut", stages=(stage,))
        torch.manual_seed(12345)  # whatever the next process's RNG is
        enhance(recipe, tmp_path / "cut", stages=(stage,))
    for name in ("stage1/weights.safetensors", "stage2/weights.safetensors", "tower/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for stage, last in (("stage1", 12), ("stage2", 8)):
        pictures = {p.name for p in (tmp_path / "cut" / stage / "samples").iterdir()}
        assert {"originals.png", "step-000000.png", f"step-{last:06}.png"} <= pictures
