"""Counts against the real classes on the meta device, against FlopCounterMode, and against the measured facts."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_genhancer import costs, recipes

PAPER = recipes.get_recipe("openai-l14-224")
LARGE = costs.KNOWN_BACKBONES[PAPER.backbone]
SMALL = dataclasses.replace(
    PAPER,
    denoiser_layers=1,
    denoiser_single_layers=2,
    denoiser_heads=4,
    denoiser_head_dim=32,
    denoiser_rope_axes=(8, 12, 12),
    vec_dim=64,
    txt_dim=96,
)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def flops(run) -> int:
    # Plain matmuls in attention: whether a fused kernel's work is counted depends on torch's version.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def towers(name: str):
    """A known backbone's config as the real class."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    b = costs.KNOWN_BACKBONES[name]
    vision = {"hidden_size": b.width, "num_hidden_layers": b.layers, "intermediate_size": b.mlp}
    vision |= {"num_attention_heads": 16, "patch_size": b.patch, "image_size": b.image_size}
    text = {"hidden_size": b.text_width, "num_hidden_layers": b.text_layers, "intermediate_size": b.text_mlp}
    text |= {"num_attention_heads": 16, "vocab_size": b.vocabulary, "max_position_embeddings": b.text_positions}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if b.kind == "clip":
        config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=b.projection)
        return CLIPModel, config
    return SiglipModel, SiglipConfig(vision_config=vision, text_config=text)


@pytest.mark.parametrize(
    ("double", "single", "billions"), [(1, 2, 0.687), (2, 4, 1.310), (3, 6, 1.933), (4, 8, 2.556), (19, 38, 11.901)]
)
def test_denoiser_sizes_of_tables_5_and_7(double: int, single: int, billions: float) -> None:
    recipe = dataclasses.replace(PAPER, denoiser_layers=double, denoiser_single_layers=single)
    assert round(costs.denoiser_parameters(recipe) / 1e9, 3) == billions


@pytest.mark.parametrize("recipe", [PAPER, SMALL], ids=["paper", "small"])
def test_denoiser_and_projector_match_the_classes(recipe: recipes.Recipe) -> None:
    from llava_genhancer.enhance.conditions import Projector
    from llava_genhancer.enhance.denoisers.flow import FlowDenoiser

    with torch.device("meta"):
        denoiser = FlowDenoiser(recipe, 16, 28)
        projector = Projector(recipe, 768)
    assert costs.denoiser_parameters(recipe) == count(denoiser)
    assert costs.projector_parameters(recipe, LARGE) == count(projector)
    if recipe is PAPER:
        assert count(denoiser) == 1_310_154_816


@pytest.mark.parametrize("layers", [2, 4, 6, 8])
def test_the_masked_denoisers_of_table_5_match_the_class(layers: int) -> None:
    from llava_genhancer.enhance.denoisers.masked import MaskedDenoiser

    recipe = recipes.override(recipes.get_recipe("siglip-so400m-384-masked"), {"denoiser_layers": layers})
    with torch.device("meta"):
        denoiser = MaskedDenoiser(recipe, costs.VQ_F16.codes, 24)
    assert costs.denoiser_parameters(recipe, costs.VQ_F16, 384) == count(denoiser)


@pytest.mark.parametrize("mode", ["forward", "train", "frozen"])
def test_masked_denoiser_flops_match_a_count(mode: str) -> None:
    from llava_genhancer.enhance.conditions import Condition
    from llava_genhancer.enhance.denoisers.masked import MaskedDenoiser

    sizes = {"denoiser_layers": 3, "denoiser_heads": 4, "denoiser_head_dim": 32, "txt_dim": 128}
    recipe = recipes.override(recipes.get_recipe("tiny-masked"), sizes)
    vq, batch, text = dataclasses.replace(costs.VQ_F16, codes=64), 3, 5
    denoiser = MaskedDenoiser(recipe, 64, 4).requires_grad_(mode == "train")
    told = torch.randn(batch, text, 128, requires_grad=mode != "forward")

    def run() -> None:
        loss = denoiser(torch.randint(64, (batch, 16)), Condition(None, told))
        if mode != "forward":
            loss.backward()

    assert batch * costs.denoiser_flops(recipe, 64, vq, mode, text=text) == pytest.approx(flops(run), rel=0.02)
    if mode == "forward":
        assert batch * costs.denoiser_flops(recipe, 64, vq, text=text) == flops(run)


def test_stable_diffusions_unet_is_counted() -> None:
    """The size its config is known for, and a convolution and an attention counted by hand at two resolutions."""
    small, large = (costs.count_unet("stabilityai/stable-diffusion-2-1-base", side, 77) for side in (64, 96))
    assert small.parameters == 865_910_724
    # Weights meet each position alike but for the condition's and the time's; self-attention grows with its square.
    assert large.linear / small.linear == pytest.approx(96**2 / 64**2, rel=0.01)
    assert large.attention / small.attention == pytest.approx(96**4 / 64**4, rel=0.02)


def test_draws_and_contrast_cost_more_passes() -> None:
    diva, dcr = (recipes.get_recipe(f"tiny-{paradigm}") for paradigm in ("diva", "dcr"))
    assert costs.denoiser_passes(diva) == 2
    assert costs.denoiser_passes(dcr) == dcr.per_device_batch_size + 1


def test_a_frozen_denoiser_in_bfloat16_takes_half() -> None:
    flux = recipes.get_recipe("openai-l14-224-flux")
    assert costs.denoiser_parameters(flux) == 11_901_408_320
    whole, half = (
        costs.memory(dataclasses.replace(flux, denoiser_dtype=dtype), 1, LARGE).device["frozen weights"]
        for dtype in ("float32", "bfloat16")
    )
    assert whole - half == 2 * 11_901_408_320


@pytest.mark.parametrize(
    ("name", "fields"),
    [("tiny", {}), ("tiny-masked", {}), ("tiny-flux", {}), ("tiny-flux", {"denoiser_dtype": "bfloat16"}),
     ("tiny-diva", {}), ("tiny-diva", {"denoiser_dtype": "bfloat16"}), ("tiny-dcr", {"denoiser_dtype": "bfloat16"})],
)  # fmt: skip
def test_bytes_are_counted_by_the_dtype_that_the_loader_gives(name: str, fields: dict) -> None:
    from llava_genhancer.enhance.stages import build_stage
    from llava_genhancer.enhance.targets import load_target

    recipe = recipes.override(recipes.get_recipe(name), fields)
    facts = costs.facts_of(recipe)
    assert facts is not None
    target = load_target(recipe)
    for stage in (1, 2):
        if recipe.stage(stage).max_steps:
            parameters = list(build_stage(recipe, stage, target, []).parameters())
            real = sum(p.numel() * p.element_size() for p in parameters)
            assert costs.built_bytes(recipe, stage, *facts) == real
            trained = sum(4 * p.numel() for p in parameters if p.requires_grad)
            # Without DeepSpeed or autocast a device holds what was built, in ZeRO-0's fp32 too.
            for zero in (costs.Zero(), costs.Zero(0)):
                device = costs.memory(recipe, stage, *facts, zero=zero).device
                assert (device["weights"], device["frozen weights"]) == (trained, real - trained)


@pytest.mark.parametrize("attention", [False, True])
@torch.no_grad()
def test_a_vq_gans_parameters_and_flops_match_diffusers(attention: bool) -> None:
    from diffusers import VQModel

    kind = "AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D"
    model = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", kind),
        up_block_types=(kind.replace("DownEncoder", "UpDecoder"), "UpDecoderBlock2D"),
        layers_per_block=2,
        latent_channels=16,
        vq_embed_dim=8,
        num_vq_embeddings=50,
        mid_block_add_attention=True,
    )
    facts = costs.vae_facts(dict(model.config))
    assert costs.vae_parameters(facts) == count(model)
    images = torch.zeros(2, 3, 32, 32)
    lookup = 2 * 2 * 16**2 * 8 * 50
    assert 2 * costs.vae_encoder_flops(32, facts) == pytest.approx(
        flops(lambda: model.encode(images)) + lookup, rel=1e-3
    )


def test_the_known_vq_gan_is_tamings() -> None:
    """Its encoder's and decoder's size as its authors' configuration gives it, built by diffusers."""
    from diffusers import VQModel

    with torch.device("meta"):
        model = VQModel(
            block_out_channels=(128, 128, 256, 256, 512),
            down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=256,
            vq_embed_dim=256,
            num_vq_embeddings=16_384,
            mid_block_add_attention=True,
        )
    assert costs.vae_parameters(costs.VQ_F16) == count(model)
    assert costs.vae_facts(dict(model.config)) == costs.VQ_F16


@pytest.mark.parametrize("name", costs.KNOWN_BACKBONES)
def test_towers_match_the_classes(name: str) -> None:
    from llava_genhancer.enhance.backbones import VisionBackbone

    cls, config = towers(name)
    known = costs.KNOWN_BACKBONES[name]
    assert costs.backbone_facts(config) == known
    with torch.device("meta"):
        model = cls(config)
        vision = model.vision_model
    projection = getattr(model, "visual_projection", None)
    assert costs.full_model_parameters(known) == count(model)
    assert costs.vision_parameters(known) == count(vision) + (count(projection) if projection is not None else 0)
    if known.image_size % known.patch == 0:
        assert VisionBackbone(model, [0.5] * 3, [0.5] * 3).token_dim == known.token_dim


def test_every_named_recipe_is_known() -> None:
    named = [recipes.get_recipe(n) for n in recipes.RECIPES]
    assert all(r.backbone in costs.KNOWN_BACKBONES for r in named if not r.backbone.startswith("toyworld:"))


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14", "google/siglip-so400m-patch14-224"])
@pytest.mark.parametrize("scope", ["vision", "all"])
def test_lora_matches_what_peft_injects(name: str, scope: str) -> None:
    from llava_genhancer.enhance.backbones import VisionBackbone, add_lora, trainable_backbone_names

    cls, config = towers(name)
    recipe = dataclasses.replace(PAPER, lora_scope=scope)
    known = costs.KNOWN_BACKBONES[name]
    # Two layers are enough: LoRA counts are linear in them.
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 2
    known = dataclasses.replace(known, layers=2, text_layers=2)
    with torch.device("meta"):
        model = cls(config)
        backbone = VisionBackbone(model, [0.5] * 3, [0.5] * 3)
        if scope == "all":
            backbone.text_model = model.text_model
            backbone.text_projection = getattr(model, "text_projection", None)
        add_lora(backbone, recipe)
    learns = set(trainable_backbone_names(backbone, recipe))
    assert costs.lora_parameters(recipe, known) == sum(p.numel() for n, p in backbone.named_parameters() if n in learns)
    tower_and_adapters = costs.engine_parameters(recipe, 2, known) - costs.projector_parameters(recipe, known)
    scales = 0 if scope == "vision" else 1 if known.kind == "clip" else 2  # the full model's logit scale and bias
    assert tower_and_adapters - costs.denoiser_parameters(recipe) == count(backbone) + scales


def test_vae_matches_the_class() -> None:
    import json

    from diffusers import AutoencoderKL

    from llava_genhancer.architectures import FLUX_VAE_CONFIG

    config = json.loads((FLUX_VAE_CONFIG / "config.json").read_text())
    assert costs.vae_facts(config) == costs.FLUX_VAE
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
        pixels = torch.empty(1, 3, 224, 224)
    assert costs.vae_parameters() == count(vae)
    with torch.no_grad():
        counted = flops(lambda: vae.encode(pixels))
    assert costs.vae_encoder_flops(224) == pytest.approx(counted, rel=0.01)


def test_vae_of_another_shape() -> None:
    from diffusers import AutoencoderKL

    config = {
        "block_out_channels": [16, 32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    facts = costs.vae_facts(config)
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
        pixels = torch.empty(1, 3, 32, 32)
    assert facts.downscale == 4
    assert costs.vae_parameters(facts) == count(vae)
    with torch.no_grad():
        assert costs.vae_encoder_flops(32, facts) == pytest.approx(flops(lambda: vae.encode(pixels)), rel=0.01)


@pytest.mark.parametrize("mode", ["forward", "train", "frozen"])
def test_denoiser_flops_match_a_count(mode: str) -> None:
    from llava_genhancer.enhance.conditions import Projector
    from llava_genhancer.enhance.denoisers.flow import FlowDenoiser

    vae, batch = costs.Vae(latent_channels=4), 3
    denoiser = FlowDenoiser(SMALL, 4, 16).requires_grad_(mode == "train")
    projector = Projector(SMALL, 768).requires_grad_(mode == "train")

    def run() -> None:
        token = torch.randn(batch, 768, requires_grad=mode == "frozen")
        loss = denoiser(
            torch.randn(batch, 4, 16, 16),
            projector(token[:, None]),
            noise=torch.randn(batch, 64, 16),
            t=torch.rand(batch),
        )
        if mode != "forward":
            loss.backward()

    ours = costs.denoiser_flops(SMALL, 128, vae, mode) + costs.projector_flops(SMALL, LARGE, mode)
    assert batch * ours == pytest.approx(flops(run), rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"condition": "locals", "local_ratio": 0.5},
        {"condition": "locals", "local_count": 5, "condition_into": "txt", "projector": "linear"},
        {"condition": "pooled"},
        {"condition_into": "vec"},
    ],
)
def test_what_other_conditions_cost(changes: dict) -> None:
    """Parameters and FLOPs of projector and denoiser under each condition, against the modules themselves."""
    from llava_genhancer.enhance.conditions import Projector
    from llava_genhancer.enhance.denoisers.flow import FlowDenoiser

    recipe, vae, batch = recipes.override(SMALL, changes), costs.Vae(latent_channels=4), 3
    eye = dataclasses.replace(LARGE, image_size=56)  # 4 x 4 patches
    denoiser, projector = FlowDenoiser(recipe, 4, 16), Projector(recipe, 768)
    assert sum(p.numel() for p in projector.parameters()) == costs.projector_parameters(recipe, eye)
    condition = projector(torch.randn(batch, 1 + 16, 768))
    told = 1 if condition.txt is None else condition.txt.shape[1]
    assert told == costs.condition_tokens(recipe, eye)

    def run() -> None:
        denoiser(torch.randn(batch, 4, 16, 16), projector(torch.randn(batch, 17, 768)))

    with torch.no_grad():
        counted = flops(run)
    ours = costs.denoiser_flops(recipe, 128, vae, text=told) + costs.projector_flops(recipe, eye)
    assert batch * ours == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("learns", [False, True])
def test_backbone_flops_match_a_count(kind: str, learns: bool) -> None:
    from llava_genhancer.enhance.backbones import VisionBackbone, add_lora, trainable_backbone_names

    name = {"clip": "openai/clip-vit-large-patch14", "siglip": "google/siglip-so400m-patch14-224"}[kind]
    known = dataclasses.replace(
        costs.KNOWN_BACKBONES[name],
        width=64,
        layers=2,
        mlp=256,
        patch=8,
        image_size=64,
        projection=96 * (kind == "clip"),
    )
    cls, config = towers(name)
    for key, value in {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "num_attention_heads": 2,
    }.items():
        setattr(config.vision_config, key, value)
    config.vision_config.patch_size, config.vision_config.image_size = 8, 64
    config.text_config.num_hidden_layers = 0
    if kind == "clip":
        config.projection_dim = 96
    backbone = VisionBackbone(cls(config), [0.5] * 3, [0.5] * 3).requires_grad_(False)
    recipe = dataclasses.replace(PAPER, lora_rank=4)
    if learns:
        add_lora(backbone, recipe)
        names = set(trainable_backbone_names(backbone, recipe))
        for n, p in backbone.named_parameters():
            p.requires_grad_(n in names)

    def run() -> None:
        token = backbone(torch.randn(2, 3, 64, 64))
        if learns:
            token.sum().backward()

    ours = costs.backbone_flops(recipe, known, "frozen" if learns else "forward", lora=learns)
    assert 2 * ours == pytest.approx(flops(run), rel=0.08)


def test_the_counted_facts() -> None:
    """The figures counted on the reference's modules, GFLOP per image and TFLOP per micro-batch of 16."""
    g = 1e9
    for size, forward, encoder in ((224, 271.5, 208.6), (336, 616, 473), (384, 810, 620)):
        assert costs.denoiser_flops(PAPER, size) / g == pytest.approx(forward, rel=0.005)
        assert costs.vae_encoder_flops(size) / g == pytest.approx(encoder, rel=0.005)
    assert costs.denoiser_flops(PAPER, 224, mode="train") / g == pytest.approx(814.5, rel=0.005)
    assert costs.denoiser_flops(PAPER, 224, mode="frozen") / g == pytest.approx(545.8, rel=0.005)
    assert costs.backbone_flops(PAPER, LARGE) / g == pytest.approx(162, rel=0.005)
    for stage, teraflops in ((1, 18.96), (2, 17.3)):
        counted = 16 * sum(costs.step_flops(PAPER, stage, LARGE).values()) / 1e12
        assert counted == pytest.approx(teraflops, rel=0.03)


def test_states_by_zero_stage_match_the_facts() -> None:
    """21.3 GB of states unsharded; 7.3, 5.0 and 2.7 GB per GPU over 8."""
    for level, ranks, gigabytes in ((1, 1, 21.3), (1, 8, 7.3), (2, 8, 5.0), (3, 8, 2.7)):
        device = costs.memory(PAPER, 1, LARGE, zero=costs.Zero(level), ranks=ranks).device
        states = device["weights"] + device["gradients"] + device["optimizer"]
        assert states / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_activations_match_the_facts() -> None:
    for size, gibibytes in ((224, 3.5), (336, 8.8), (384, 12.1)):
        recipe = dataclasses.replace(PAPER, image_size=size)
        assert costs.activation_bytes(recipe, 1, LARGE) / costs.GIB == pytest.approx(gibibytes, rel=0.02)


def test_activations_cover_what_autograd_saves() -> None:
    """Counted on the meta device at full size; our estimate is the reference's, which keeps somewhat more."""
    from llava_genhancer.enhance.conditions import Condition
    from llava_genhancer.enhance.denoisers.flow import FlowDenoiser

    with torch.device("meta"):
        denoiser = FlowDenoiser(PAPER, 16, 28).to(torch.bfloat16)
        condition = Condition(torch.empty(16, 768), torch.empty(16, 1, 4096))
        latents, noise, t = torch.empty(16, 16, 28, 28), torch.empty(16, 196, 64), torch.empty(16)
    own = {p.untyped_storage()._cdata for p in denoiser.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        denoiser(latents, condition, noise=noise, t=t)
    counted = sum(storage.nbytes() for storage in saved.values())
    estimate = costs.activation_bytes(PAPER, 1, LARGE)
    assert 0.75 * estimate < counted < 1.35 * estimate


def test_sharding_and_offload_move_memory() -> None:
    def total(zero: costs.Zero, ranks: int = 8, **changes: object) -> float:
        return costs.memory(dataclasses.replace(PAPER, **changes), 1, LARGE, zero=zero, ranks=ranks).total

    z1, z2, z3 = (total(costs.Zero(level)) for level in (1, 2, 3))
    assert z1 > z2 > z3
    assert total(costs.Zero(2), gradient_checkpointing=True) < z2
    assert total(costs.Zero(2), per_device_batch_size=32) > z2
    offloaded = costs.memory(PAPER, 1, LARGE, zero=costs.Zero(3, True, True), ranks=8)
    assert offloaded.total < z3
    assert offloaded.host["optimizer"] == pytest.approx(12 * costs.trained_parameters(PAPER, 1, LARGE) / 8)


def test_disk_counts_checkpoints_tower_and_snapshots() -> None:
    parts = costs.disk_bytes(PAPER, LARGE)
    trained = costs.trained_parameters(PAPER, 1, LARGE)
    assert parts["stage 1 checkpoints"] == 2 * 12 * trained
    assert parts["one more while saving"] == 12 * trained
    assert parts["tower"] == 4 * costs.full_model_parameters(LARGE)
    learns = costs.trained_parameters(PAPER, 2, LARGE)
    assert parts["stage 2 weights"] == 4 * learns * (1 + len(PAPER.stage2.snapshot_steps))
    only_second = dataclasses.replace(PAPER, stage1=dataclasses.replace(PAPER.stage1, max_steps=0))
    assert "stage 1 checkpoints" not in costs.disk_bytes(only_second, LARGE)


def test_a_cache_takes_frozen_work_out_of_the_steps() -> None:
    plain, cached = PAPER, dataclasses.replace(PAPER, cache_crops=4)
    for stage, gone in ((1, ("target encoding", "backbone")), (2, ("target encoding",))):
        without, with_cache = (costs.step_flops(r, stage, LARGE) for r in (plain, cached))
        assert with_cache == {name: 0 if name in gone else flops for name, flops in without.items()}
    frozen = costs.step_flops(plain, 1, LARGE)
    once = costs.fill_flops(cached, LARGE, images=10)
    assert once == pytest.approx(10 * 4 * (frozen["target encoding"] + frozen["backbone"]))
    # The facts' cached floors: 13.03 TFLOP per micro-batch of 16 in stage 1, 13.9 in stage 2.
    for stage, teraflops in ((1, 13.03), (2, 13.9)):
        counted = 16 * sum(costs.step_flops(cached, stage, LARGE).values()) / 1e12
        assert counted == pytest.approx(teraflops, rel=0.03)


def test_a_cache_without_a_frozen_backbone_holds_targets_alone() -> None:
    cached = dataclasses.replace(PAPER, cache_crops=1)
    assert set(costs.cache_records(cached, LARGE)) == {"targets", "tokens"}
    skipped = dataclasses.replace(cached, stage1=dataclasses.replace(PAPER.stage1, max_steps=0))
    assert set(costs.cache_records(skipped, LARGE)) == {"targets"}
    assert costs.fill_flops(skipped, LARGE) == costs.vae_encoder_flops(224)
