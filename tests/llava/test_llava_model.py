"""The model: what learns, the loss against one computed sample by sample, empty images, dtypes, refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llava_batches import pack
from safetensors.torch import load_file, save_file
from small_llama import write_llama

from llava_genhancer import recipes
from llava_genhancer.errors import InputError
from llava_genhancer.llava.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_genhancer.llava.model import Llava, build_llava, load_tower
from llava_genhancer.llava.recipes import LlavaRecipe

PROJECTOR = {f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
LINEAR = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def recipe_from(fields: dict, **changes) -> LlavaRecipe:
    return recipes.override(LlavaRecipe(name="test"), {**fields, **changes})


def batch(model: Llava, images: list[int], lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor | None]:
    """Random samples with that many images each, images first, padded on the right."""
    g = torch.Generator().manual_seed(seed)
    patches, side = model.config.image_seq_length, model.config.vision_config.image_size
    rows = []
    for count, length in zip(images, lengths, strict=True):
        words = torch.randint(3, 380, (length,), generator=g)
        image = torch.full((patches,), IMAGE_TOKEN_INDEX)
        parts = [words[:2]] + [x for i in range(count) for x in (image, words[2 + i : 3 + i])] + [words[2 + count :]]
        rows.append(torch.cat(parts))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX).clone()
    labels[:, :4] = IGNORE_INDEX
    labels[labels == IMAGE_TOKEN_INDEX] = IGNORE_INDEX
    pixels = torch.randn(sum(images), 3, side, side, generator=g) if sum(images) else None
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def loss_by_hand(model: Llava, inputs: dict) -> torch.Tensor:
    """Sample by sample, position by position, without padding, from the parts' public outputs."""
    embed = model.language_model.get_input_embeddings()
    features = iter([])
    if inputs["pixel_values"] is not None:
        states = model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        p = model.multi_modal_projector
        hidden = F.gelu(states @ p.linear_1.weight.T + p.linear_1.bias)
        features = iter((hidden @ p.linear_2.weight.T + p.linear_2.bias).flatten(0, 1))
    losses = []
    for ids, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
        length = max(i for i, label in enumerate(labels) if label != IGNORE_INDEX) + 1
        vectors = [next(features) if i == IMAGE_TOKEN_INDEX else embed.weight[i] for i in ids[:length]]
        logits = model.language_model(inputs_embeds=torch.stack(vectors)[None]).logits[0]
        scores = logits.log_softmax(-1)
        losses += [-scores[at - 1, label] for at, label in enumerate(labels[:length]) if label != IGNORE_INDEX and at]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("images", [[1, 1, 1], [1, 0, 2], [0, 0, 0]])
def test_loss_and_gradients_equal_an_independent_splice(llava_fields, images) -> None:
    model = build_llava(recipe_from(llava_fields), "finetune")
    inputs = batch(model, images, [9, 14, 12])
    loss = model(**inputs)
    expected = loss_by_hand(model, inputs)
    assert torch.allclose(loss, expected, atol=2e-6, rtol=0)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(loss, list(parameters.values()))
    theirs = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        assert torch.allclose(a, torch.zeros_like(a) if b is None else b, atol=1e-5), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [[1, 1, 1], [1, 0, 2], [0, 0, 0], [2]])
def test_packed_samples_give_the_loss_and_gradients_of_padded_ones(llava_fields, images, attention) -> None:
    """By our attention and by transformers' own mask, with and without recomputing in the backward pass."""
    fields = {**llava_fields, "attention": attention}
    padded, packed = (
        build_llava(recipe_from(fields, **{"finetune.packing": packing}), "finetune") for packing in (False, True)
    )
    assert packed.language_model.config._attn_implementation == {"sdpa": "sdpa_by_sample"}.get(attention, attention)
    inputs = batch(padded, images, [9, 14, 12][: len(images)])
    row = pack(inputs)
    assert row["input_ids"].shape == (1, sum(row["lengths"]))
    for _ in range(2):
        losses, gradients = [], []
        for each, given in ((padded, inputs), (packed, row)):
            each.zero_grad()
            losses.append(each(**given, items=torch.tensor(7.0)))
            losses[-1].backward()
            gradients.append({n: p.grad.clone() for n, p in each.named_parameters() if p.requires_grad})
        assert torch.allclose(*losses, rtol=1e-5, atol=0)
        scale = max(g.abs().max() for g in gradients[0].values())
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, gradients[1][name], atol=float(1e-5 * scale), rtol=1e-5), name
        packed.train().language_model.gradient_checkpointing_enable({"use_reentrant": False})


def test_flash_attention_is_told_where_samples_end(llava_fields, monkeypatch) -> None:
    """Its kernel needs a GPU; in its place, with its arguments, attention by the book, one sample at a time."""
    from transformers import modeling_flash_attention_utils as library

    bounds = []

    def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal):
        assert causal and dropout_p == 0 and cu_seqlens_q.dtype == torch.int32  # noqa: PT018
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        bounds.append(cu_seqlens_q.tolist())
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # grouped queries
        out = torch.zeros_like(q)
        for start, end in zip(bounds[-1], bounds[-1][1:], strict=False):
            scores = torch.einsum("ihd,jhd->hij", q[start:end], k[start:end]) * softmax_scale
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), float("-inf"))
            out[start:end] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[start:end])
        return out

    model = build_llava(recipe_from(llava_fields, attention="sdpa"), "finetune")
    inputs = batch(model, [1, 0, 2], [9, 14, 12])
    expected = model(**inputs)
    monkeypatch.setattr(library, "_loaded_implementation", None)
    monkeypatch.setattr(library, "_lazy_imports", lambda *args, **kwargs: (None, kernel, None, None, None))
    model.language_model.config._attn_implementation = "flash_attention_2"
    row = pack(inputs)
    assert torch.allclose(model(**row), expected, rtol=1e-5, atol=0)
    ends = [0, *torch.tensor(row["lengths"]).cumsum(0).tolist()]
    assert bounds == [ends] * model.config.text_config.num_hidden_layers


def test_a_window_shorter_than_a_sample_is_not_packed(llava_fields, tiny_llama, tmp_path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "llm")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(
        json.dumps({**config, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64})
    )
    fields = {**llava_fields, "llm": str(tmp_path / "llm"), "finetune.packing": True, "attention": "sdpa"}
    with pytest.raises(InputError, match="looks back 64 tokens only, and max_length=160 is more"):
        build_llava(recipe_from(fields), "finetune")
    build_llava(recipe_from(fields, max_length=64), "finetune")


def test_a_text_only_batch_gives_the_projector_a_gradient_of_zero(llava_fields) -> None:
    """None would leave the other ranks waiting for it."""
    model = build_llava(recipe_from(llava_fields), "pretrain")
    model(**batch(model, [0, 0], [8, 8])).backward()
    gradients = [p.grad for n, p in model.named_parameters() if n in PROJECTOR]
    assert all(g is not None and not g.any() for g in gradients)


def test_padding_and_items(llava_fields) -> None:
    model = build_llava(recipe_from(llava_fields), "pretrain").eval()
    inputs = batch(model, [1, 0], [9, 14])
    more = {
        **inputs,
        "input_ids": F.pad(inputs["input_ids"], (0, 7), value=3),
        "labels": F.pad(inputs["labels"], (0, 7), value=IGNORE_INDEX),
    }
    assert torch.allclose(model(**inputs), model(**more), atol=1e-6)
    count = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
    assert torch.allclose(model(**inputs, items=2 * count) * 2, model(**inputs))
    nothing = {**inputs, "labels": torch.full_like(inputs["labels"], IGNORE_INDEX)}
    assert model(**nothing).item() == 0


def test_what_learns(llava_fields) -> None:
    layers = [f"language_model.model.layers.{i}.{name}" for i in (0, 1) for name in LINEAR]
    norms = [
        f"language_model.model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")
    ]
    others = [f"language_model.{n}.weight" for n in ("model.embed_tokens", "model.norm", "lm_head")]
    expected = {
        ("pretrain", 0): PROJECTOR,
        ("pretrain", 4): PROJECTOR,
        ("finetune", 0): PROJECTOR | {f"{n}.weight" for n in layers} | {*norms, *others},
        ("finetune", 4): PROJECTOR | {f"{n}.lora_{x}.default.weight" for n in layers for x in "AB"},
    }
    for (step, rank), names in expected.items():
        model = build_llava(recipe_from(llava_fields, lora_rank=rank), step)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == names


@pytest.mark.parametrize(("step", "rank"), [("pretrain", 0), ("finetune", 0), ("finetune", 4)])
def test_only_what_learns_is_fp32_under_bf16(llava_fields, step, rank) -> None:
    recipe = recipe_from(llava_fields, precision="bf16", lora_rank=rank)
    model = build_llava(recipe, step)
    assert all((p.dtype == torch.float32) == p.requires_grad for p in model.parameters())
    model = build_llava(recipe, step, bf16_everywhere=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_building_is_a_function_of_the_seed(llava_fields) -> None:
    torch.manual_seed(1)
    a = build_llava(recipe_from(llava_fields, lora_rank=2), "finetune").state_dict()
    before = torch.random.get_rng_state()
    b = build_llava(recipe_from(llava_fields, lora_rank=2), "finetune").state_dict()
    c = build_llava(recipe_from(llava_fields, lora_rank=2, seed=1), "finetune").state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert {n for n in a if not torch.equal(a[n], c[n])} >= {n for n in a if "lora_A" in n or "linear_1.weight" in n}


def test_the_tower_stays_in_evaluation_mode(llava_fields) -> None:
    model = build_llava(recipe_from(llava_fields), "finetune").train()
    assert model.language_model.training
    assert not any(m.training for m in model.vision_tower.modules())


@pytest.mark.parametrize(
    ("kind", "tied"), [("mistral", False), ("qwen2", True), ("qwen3", False), ("smollm3", True), ("llama", True)]
)
def test_the_family(llava_fields, tmp_path, kind, tied) -> None:
    """Every kind trains its own weights through the same splice, tied embeddings counted once."""
    llm = write_llama(tmp_path / kind, model_type=kind, tied=tied)
    model = build_llava(recipe_from(llava_fields, llm=str(llm)), "finetune")
    inputs = batch(model, [1, 0], [9, 12])
    assert torch.allclose(model(**inputs), loss_by_hand(model, inputs), atol=2e-6)
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert ("language_model.lm_head.weight" in learns) is not tied
    lora = build_llava(recipe_from(llava_fields, llm=str(llm), lora_rank=2), "finetune")
    adapted = {n.split(".lora_")[0].split(".", 4)[4] for n, p in lora.named_parameters() if ".lora_" in n}
    assert adapted == set(LINEAR)


def test_siglip_shows_every_patch(llava_fields, tmp_path) -> None:
    from transformers import SiglipModel

    from llava_genhancer.toyworld.models import save_siglip

    folder = save_siglip(tmp_path / "siglip")
    model = build_llava(recipe_from(llava_fields, tower=str(folder)), "pretrain")
    side = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, side, side)
    full = SiglipModel.from_pretrained(folder)
    states = full.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert states.shape[1] == model.config.image_seq_length
    assert torch.allclose(model.image_features(pixels), model.multi_modal_projector(states), atol=1e-6)


def test_rotary_frequencies_are_never_rounded(llava_fields) -> None:
    model = build_llava(recipe_from(llava_fields, precision="bf16"), "pretrain", bf16_everywhere=True)
    before = {n: b.clone() for n, b in model.named_buffers()}
    assert any("inv_freq" in n for n in before)
    model.bfloat16()
    after = dict(model.named_buffers())
    assert all(after[n].dtype == b.dtype and torch.equal(after[n], b) for n, b in before.items())
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}


@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_select_layer(llava_fields, tiny_clip, layer) -> None:
    from transformers import CLIPModel

    model = build_llava(recipe_from(llava_fields, vision_feature_layer=layer), "pretrain")
    pixels = torch.randn(1, 3, 32, 32)
    states = CLIPModel.from_pretrained(tiny_clip).vision_model(pixel_values=pixels, output_hidden_states=True)
    expected = model.multi_modal_projector(states.hidden_states[layer][:, 1:])
    assert torch.allclose(model.image_features(pixels), expected, atol=1e-6)


def without(folder: Path, copy: Path, name: str) -> Path:
    """A copy of a model folder that lacks one weight."""
    shutil.copytree(folder, copy)
    state = load_file(copy / "model.safetensors")
    del state[name]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_weights_that_would_be_random_are_an_error(llava_fields, tiny_llama, tiny_clip, tmp_path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    llm = without(tiny_llama, tmp_path / "llm", name)
    with pytest.raises(InputError, match=f"first: {name}.*would be random"):
        build_llava(recipe_from(llava_fields, llm=str(llm)), "pretrain")
    tower = without(tiny_clip, tmp_path / "tower", "vision_model.embeddings.patch_embedding.weight")
    with pytest.raises(InputError, match="would be random"):
        build_llava(recipe_from(llava_fields, tower=str(tower)), "pretrain")


def test_a_tower_of_ours_is_verified(tiny_clip, tmp_path) -> None:
    from transformers import CLIPModel

    from llava_genhancer.tower.export import save_tower

    tower = save_tower(CLIPModel.from_pretrained(tiny_clip), tmp_path / "t", source=str(tiny_clip), marker={})
    load_tower(str(tower), torch.float32)
    data = bytearray((tower / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tower / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="not the file that was exported"):
        load_tower(str(tower), torch.float32)


def test_damaged_parts_are_one_line(llava_fields, tiny_llama, tmp_path) -> None:
    from llava_genhancer.llava.tokenizer import load_tokenizer

    llm = tmp_path / "llm"
    shutil.copytree(tiny_llama, llm)
    for name in ("model.safetensors", "tokenizer.model"):
        (llm / name).write_bytes(b"junk" * 50)
    with pytest.raises(InputError, match="weights cannot be loaded"):
        build_llava(recipe_from(llava_fields, llm=str(llm)), "pretrain")
    with pytest.raises(InputError, match="is not a sentencepiece"):
        load_tokenizer(str(llm))
    (llm / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="has no tokenizer: its folder needs"):
        load_tokenizer(str(llm))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llm": "/no/llm"}, "llm /no/llm cannot be loaded"),
        ({"tower": "/no/tower"}, "tower /no/tower cannot be loaded"),
        ({"vision_feature_layer": 9}, "the tower has 2 layers"),
    ],
)
def test_parts_that_are_not_there(llava_fields, changes, words) -> None:
    with pytest.raises(InputError, match=words):
        build_llava(recipe_from(llava_fields, **changes), "pretrain")


def test_parts_of_the_wrong_kind(llava_fields, tiny_clip, tiny_llama, tmp_path) -> None:
    with pytest.raises(InputError, match="is a 'clip' model: needed is one of llama, mistral"):
        build_llava(recipe_from(llava_fields, llm=str(tiny_clip)), "pretrain")
    with pytest.raises(InputError, match="is a 'llama' model: needed is a CLIP or SigLIP folder"):
        build_llava(recipe_from(llava_fields, tower=str(tiny_llama)), "pretrain")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"})[:-2])
    with pytest.raises(InputError, match="cannot be loaded"):
        build_llava(recipe_from(llava_fields, llm=str(tmp_path)), "pretrain")
