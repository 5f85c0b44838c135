"""Stable Diffusion's UNet as denoiser: its loss by hand, its condition, what learns, DIVA's recipe, its sampler."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, TrainerCallback

from llava_genhancer import recipes
from llava_genhancer.architectures import SD_UNET_CONFIG
from llava_genhancer.enhance.conditions import Condition
from llava_genhancer.enhance.denoisers.unet import UNetDenoiser
from llava_genhancer.enhance.enhancer import build_enhancer
from llava_genhancer.enhance.stages import build_stage
from llava_genhancer.enhance.targets import VaeTarget
from llava_genhancer.enhance.train import EnhanceTrainer, enhance, optimizer
from llava_genhancer.errors import InputError

WIDTH, TOKENS = 96, 77


@pytest.fixture(scope="module")
def v_sd(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder, whose UNet is said to predict v."""
    folder = tmp_path_factory.mktemp("models") / "v"
    shutil.copytree(tiny_sd, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    return folder


def denoiser_of(recipe: recipes.Recipe, target: VaeTarget) -> UNetDenoiser:
    return UNetDenoiser.from_recipe(recipe, target, 32).requires_grad_(False)


def batch_of(count: int, tokens: int = 1) -> tuple[Tensor, Condition, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(count, 8, 8, 8, generator=g) for _ in range(2))
    told = Condition(None, torch.randn(count, tokens, WIDTH, generator=g))
    return latents, told, {"noise": noise, "t": torch.randint(1000, (count,), generator=g)}


def prompt_states(folder: Path) -> Tensor:
    """What Stable Diffusion's pipeline encodes for an empty prompt."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    ids = tokenizer([""], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return encoder(ids)[0]


# --- sizes ---------------------------------------------------------------------------------------------------------


def test_parameters_of_stable_diffusion_2_1() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SD_UNET_CONFIG))
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724


# --- loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_what_diffusers_own_scheduler_and_unet_give(
    unet_recipe_of, tiny_target, tiny_sd, v_sd, kind: str
) -> None:
    folder = {"epsilon": tiny_sd, "v_prediction": v_sd}[kind]
    denoiser = denoiser_of(unet_recipe_of(denoiser_weights=str(folder)), tiny_target)
    latents, told, draws = batch_of(4)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    noisy = scheduler.add_noise(latents, draws["noise"], draws["t"])
    truth = draws["noise"] if kind == "epsilon" else scheduler.get_velocity(latents, draws["noise"], draws["t"])
    with torch.no_grad():
        said = unet(noisy, draws["t"], encoder_hidden_states=prompt_states(folder) + told.txt).sample
    expected = float((said - truth).square().mean())
    assert float(denoiser(latents, told, **draws)) == pytest.approx(expected, rel=1e-5)


def test_noise_and_steps_come_from_the_global_rng_and_cover_the_schedule(unet_recipe_of, tiny_target) -> None:
    denoiser, (latents, told, _) = denoiser_of(unet_recipe_of(), tiny_target), batch_of(3)
    torch.manual_seed(5)
    drawn = denoiser(latents, told)
    torch.manual_seed(5)
    t = torch.randint(1000, (3,))
    assert torch.equal(denoiser(latents, told, noise=torch.randn(3, 8, 8, 8), t=t), drawn)
    steps = denoiser.sample_t(20_000, torch.device("cpu"))
    assert (int(steps.min()), int(steps.max())) == (0, 999)
    assert abs(float(steps.float().mean()) - 499.5) < 8


def test_the_schedule_stays_exact_when_an_engine_casts_the_model(unet_recipe_of, tiny_target, tiny_sd) -> None:
    denoiser = denoiser_of(unet_recipe_of(), tiny_target).bfloat16()
    exact = DDIMScheduler.from_pretrained(tiny_sd / "scheduler").alphas_cumprod
    t = torch.arange(1000)
    x_t, _ = denoiser.path(torch.ones(1000, 1, 1, 1), torch.zeros(1000, 1, 1, 1), t)
    assert torch.equal(x_t.flatten(), exact.sqrt())
    assert len(x_t.unique()) == 1000


# --- condition -----------------------------------------------------------------------------------------------------


def test_visual_tokens_join_the_empty_prompt_as_in_diva(unet_recipe_of, tiny_target, tiny_sd) -> None:
    denoiser, empty = denoiser_of(unet_recipe_of(), tiny_target), prompt_states(tiny_sd)
    one, same, more = (torch.randn(2, n, WIDTH) for n in (1, TOKENS, 37))
    assert torch.allclose(denoiser.context(Condition(None, one)), empty + one, atol=1e-6)
    assert torch.allclose(denoiser.context(Condition(None, same)), empty + same, atol=1e-6)
    assert torch.allclose(denoiser.context(Condition(None, more)), empty.mean(1, keepdim=True) + more, atol=1e-6)
    names = {n for n, _ in denoiser.named_parameters()}
    assert all(n.startswith("unet.") for n in names), "the text encoder is dropped"


# --- DIVA ----------------------------------------------------------------------------------------------------------

DIVA = {
    "condition": "locals",
    "local_count": 76,
    "local_replacement": True,
    "projector": "linear",
    "vae_posterior": "mean",
    "draws_per_image": 2,
    "lora_rank": 0,
    "optimizer": "sgd",
    "weight_decay": 0.0,
    "stage1.max_steps": 0,
    "stage2.trains": "backbone,projector",
    "stage2.lr_scheduler": "cosine",
}


def test_each_draw_sees_local_tokens_of_its_own(unet_recipe_of, tiny_target) -> None:
    enhancer = build_stage(unet_recipe_of(**DIVA), 2, tiny_target).train()
    seen = {}

    def spy(target: Tensor, condition: Condition, **draws: Tensor) -> Tensor:
        seen["told"] = condition.txt
        return original(target, condition, **draws)

    original = enhancer.denoiser.forward
    enhancer.denoiser.forward = spy  # type: ignore[method-assign]
    latents, _, _ = batch_of(3)
    pixels = torch.randn(3, 3, 32, 32)
    _, _, draws = batch_of(6)
    loss = enhancer(pixels, latents, draws=draws)
    first, second = seen["told"].chunk(2)
    assert first.shape == (3, TOKENS, WIDTH)
    assert torch.allclose(first[:, 0], second[:, 0], atol=1e-6), "the CLS is the same"
    assert not torch.allclose(first[:, 1:], second[:, 1:])
    # The mean of the two draws' losses, each computed alone.
    halves = [
        enhancer.denoiser.__class__.forward(
            enhancer.denoiser, latents, Condition(None, told), **{n: d.chunk(2)[i] for n, d in draws.items()}
        )
        for i, told in enumerate((first, second))
    ]
    assert float(loss.detach()) == pytest.approx(float(torch.stack(halves).mean().detach()), rel=1e-5)


def test_diva_trains_the_whole_eye_and_the_projector_through_a_frozen_unet(
    unet_recipe_of, tiny_target, tiny_clip
) -> None:
    from transformers import CLIPModel

    recipe = unet_recipe_of(**DIVA)
    enhancer = build_stage(recipe, 2, tiny_target).train()
    learning = {n: p for n, p in enhancer.named_parameters() if p.requires_grad}
    vision = {n for n, _ in CLIPModel.from_pretrained(tiny_clip).named_parameters() if n.startswith("vis")}
    assert set(learning) == {f"backbone.{n}" for n in vision} | {f"projector.to_txt.{n}" for n in ("weight", "bias")}
    latents, _, _ = batch_of(3)
    enhancer(torch.randn(3, 3, 32, 32), latents).backward()
    assert all(p.grad is not None and p.grad.any() for p in learning.values())
    assert all(p.grad is None for p in enhancer.denoiser.parameters())
    kind, values = optimizer(recipe, recipe.stage2) or (None, {})
    assert kind is torch.optim.SGD
    assert values["momentum"] == 0.9


def test_named_recipes_are_the_papers() -> None:
    recipe = recipes.get_recipe("openai-l14-224-diva")
    assert recipe.denoiser_weights == recipe.vae == "stabilityai/stable-diffusion-2-1-base"
    assert (recipe.target_size, recipe.txt_dim, recipe.global_batch_size) == (512, 1024, 640)
    table = recipe.stage2
    assert (table.max_steps, table.warmup_steps, table.learning_rate) == (4600, 23, 1e-4)
    assert recipe.stage1.max_steps == 0
    told = {
        name: (r.condition, r.local_count, r.local_replacement)
        for name in recipes.RECIPES
        for r in [recipes.get_recipe(f"{name}-diva")]
    }
    assert told["openai-l14-336"] == ("locals", 76, True)
    assert told["metaclip-h14-224"] == ("locals", None, False)
    assert told["siglip-so400m-384"] == ("pooled", None, False)


class Crash(BaseException):
    """Stands for kill -9: nothing of ours may catch it."""


class Bomb(TrainerCallback):
    """Ends the process in the middle of a stage."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 3:
            raise Crash


def test_diva_resumes_bit_identically_and_its_pictures_are_drawn(unet_recipe_of, tmp_path: Path, monkeypatch) -> None:
    """48 px for the UNet beside 32 px for the backbone: one crop, shrunk for the eye."""
    recipe = unet_recipe_of(**DIVA, target_size=48, **{"stage2.max_steps": 4, "stage2.save_steps": 2})
    enhance(recipe, tmp_path / "whole")
    original = EnhanceTrainer.__init__

    def init(self, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Bomb())

    with monkeypatch.context() as patch:
        patch.setattr(EnhanceTrainer, "__init__", init)
        with pytest.raises(Crash):
            enhance(recipe, tmp_path / "cut")
    torch.manual_seed(12345)
    enhance(recipe, tmp_path / "cut")
    for name in ("stage2/weights.safetensors", "tower/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    from PIL import Image

    assert Image.open(tmp_path / "cut" / "stage2" / "samples" / "step-000004.png").size == (3 * 48, 48)


# --- sampler -------------------------------------------------------------------------------------------------------


def test_ddim_finds_the_data_of_a_perfect_denoiser(unet_recipe_of, tiny_target, monkeypatch) -> None:
    """For one data point per condition the true noise at x is (x - sqrt(a) clean) / sqrt(1 - a)."""
    denoiser = denoiser_of(unet_recipe_of(sample_ode_steps=10), tiny_target)
    clean, told, _ = batch_of(3)

    def predict(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        a = denoiser.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x - a.sqrt() * clean) / (1 - a).sqrt()

    monkeypatch.setattr(denoiser, "predict", predict)
    sampled = denoiser.sample(told, torch.Generator().manual_seed(0))
    # The last step ends at the schedule's first alpha, not at 1 (set_alpha_to_one is false).
    assert torch.allclose(sampled, clean, atol=0.15)
    assert float((sampled - clean).std()) < 0.05


def test_pictures_repeat_and_leave_training_as_it_was(unet_recipe_of, tiny_target) -> None:
    enhancer = build_enhancer(unet_recipe_of(), tiny_target).train()
    before = torch.get_rng_state()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    first, again = (enhancer.rebuild(pixels, torch.Generator().manual_seed(0)) for _ in range(2))
    assert first.shape == (2, 8, 8, 8)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"denoiser_weights": None}, "needs denoiser_weights"),
        ({"denoiser_weights": "/nowhere"}, "does not exist"),
        ({"txt_dim": 64}, "txt_dim=64 must be 96"),
        ({"vae_posterior": "mean", "target_size": 36}, "not a multiple of 8"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(unet_recipe_of, tiny_target, changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_enhancer(unet_recipe_of(**changes), tiny_target)


@pytest.mark.parametrize("part", ["unet", "scheduler", "tokenizer", "text_encoder"])
def test_a_folder_that_lacks_a_part_is_refused(unet_recipe_of, tiny_target, tiny_sd, tmp_path, part: str) -> None:
    shutil.copytree(tiny_sd, tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / part)
    with pytest.raises(InputError, match=f"{part}/"):
        denoiser_of(unet_recipe_of(denoiser_weights=str(tmp_path / "sd")), tiny_target)


def test_another_vae_is_refused(unet_recipe_of, tiny_target) -> None:
    other = VaeTarget(tiny_target.module)
    other.channels = 4
    with pytest.raises(InputError, match="name the VAE of the same folder"):
        denoiser_of(unet_recipe_of(), other)


def test_recomputed_activations_change_nothing(unet_recipe_of, tiny_target) -> None:
    latents, told, draws = batch_of(2)
    gradients = []
    for again in (False, True):
        denoiser = denoiser_of(unet_recipe_of(gradient_checkpointing=again), tiny_target).train()
        txt = told.txt.clone().requires_grad_()
        denoiser(latents, Condition(None, txt), **draws).backward()
        gradients.append(txt.grad)
    assert torch.equal(*gradients)
