"""One finetune, two folders: same weights, same tokens, what other programs read in them; and back again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_llama import write_llama

from llava_genhancer import cli, engine, recipes, run
from llava_genhancer.errors import InputError
from llava_genhancer.llava.chat import answer, chat, load_llava
from llava_genhancer.llava.conversation import IMAGE_TOKEN_INDEX, Turn, encode_prompt
from llava_genhancer.llava.dataset import ImageView, load_image_processor
from llava_genhancer.llava.export import export_step, import_llava
from llava_genhancer.llava.model import build_llava
from llava_genhancer.llava.recipes import LlavaRecipe
from llava_genhancer.llava.tokenizer import load_tokenizer
from llava_genhancer.llava.train import finetune, pretrain

QUESTION = "what colour is the ball?"
IMAGE_ID, WORDS, ROWS = 380, 380, 384


def recipe_from(fields: dict, **changes) -> LlavaRecipe:
    return recipes.override(LlavaRecipe(name="test"), {**fields, **changes})


def train_run(fields: dict, run_dir: Path, **changes) -> tuple[LlavaRecipe, Path]:
    recipe = recipe_from(fields, **{"pretrain.max_steps": 2, "finetune.max_steps": 2, **changes})
    pretrain(recipe, run_dir)
    return recipe, finetune(recipe, run_dir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, llava_fields: dict) -> tuple[LlavaRecipe, Path]:
    """A full finetune of two steps, and its folder."""
    return train_run(llava_fields, tmp_path_factory.mktemp("run"))


def trained_model(recipe: LlavaRecipe, folder: Path):
    model = build_llava(recipe, "finetune")
    engine.load_trained(model, folder / "weights.safetensors")
    return model.eval()


def prompt(recipe: LlavaRecipe, question: str = QUESTION, patches: int = 16) -> torch.Tensor:
    """Ids as in training, the image's place as long as the image."""
    ids = encode_prompt([Turn(f"<image>\n{question}", None)], "v1", load_tokenizer(recipe.llm))
    long = [x for i in ids for x in ([i] * patches if i == IMAGE_TOKEN_INDEX else [i])]
    return torch.tensor([long])


def picture(llava_data: dict, name: str = "7.png") -> Image.Image:
    return Image.open(llava_data["images"] / name).convert("RGB")


@pytest.mark.parametrize("form", ["hf", "llava"])
@torch.no_grad()
def test_both_forms_say_what_the_trained_model_says(trained, llava_data, form) -> None:
    recipe, folder = trained
    ours = trained_model(recipe, folder)
    model, processor = load_llava(folder / form)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=picture(llava_data), text=text, return_tensors="pt")
    ids = prompt(recipe)
    assert torch.equal(inputs["input_ids"], ids.masked_fill(ids == IMAGE_TOKEN_INDEX, IMAGE_ID))
    pixels = inputs["pixel_values"]
    logits = model(**inputs).logits
    assert logits.shape[-1] == ROWS
    assert torch.allclose(logits[..., :WORDS], ours.logits(ids, pixels), atol=1.5e-6)
    expected = ours.generate(ids, pixels, do_sample=False, max_new_tokens=24)
    got = model.generate(**inputs, do_sample=False, max_new_tokens=24)[:, ids.shape[1] :]
    assert torch.equal(got, expected)
    assert len(set(got[0].tolist())) > 3, "a model that repeats one token would agree with anything"


@pytest.mark.parametrize("template", ["v1", "llama_2", "mistral"])
@pytest.mark.parametrize("legacy", [True, False])
def test_the_processor_writes_what_training_wrote(tiny_llama, tiny_clip, tmp_path, legacy, template) -> None:
    """Two turns, images in the middle: a text at once here, piece by piece around images there."""
    from transformers import AutoProcessor

    from llava_genhancer.llava.checkpoint import Checkpoint, raw_config
    from llava_genhancer.llava.hf import write_hf_companions

    llm = write_llama(tmp_path / "llm", legacy=legacy)
    checkpoint = Checkpoint(
        llm_config=raw_config(str(llm)), companions=str(llm), tower=str(tiny_clip), language={}, projector={},
        conversation=template, image_mode="pad", vision_feature_layer=-2, dtype=torch.float32,
    )  # fmt: skip
    write_hf_companions(checkpoint, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    turns = [
        Turn(f"<image>\n{QUESTION}", "red"),
        Turn("<image> is left of <image>, yes?", "no"),
        Turn("how many?", None),
    ]
    ids = encode_prompt(turns, template, load_tokenizer(str(llm)))
    expected = [x for i in ids for x in ([IMAGE_ID] * 16 if i == IMAGE_TOKEN_INDEX else [i])]
    messages = []
    for question, said in turns:
        messages.append({"role": "user", "content": question})
        messages += [{"role": "assistant", "content": said}] if said else []
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    got = processor(images=[Image.new("RGB", (32, 32))] * 3, text=text)["input_ids"]
    assert got[0] == expected


def test_a_byte_level_tokenizer_and_an_end_of_its_own(llava_fields, llava_data, tmp_path) -> None:
    """Qwen's kind: no begin token, no sentencepiece model, answers end in <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    llm = write_llama(tmp_path / "llm", model_type="qwen2")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (llm / name).unlink()
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator([QUESTION], trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(llm)
    changes = {"llm": str(llm), "finetune.conversation": "chatml", "finetune.max_steps": 1, "max_length": 400}
    recipe, folder = train_run(llava_fields, tmp_path / "run", **changes)

    image = words.get_vocab_size()
    ids = encode_prompt([Turn(f"<image>\n{QUESTION}", None)], "chatml", load_tokenizer(recipe.llm))
    expected = [x for i in ids for x in ([image] * 16 if i == IMAGE_TOKEN_INDEX else [i])]
    model, processor = load_llava(folder / "hf")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    assert processor(images=picture(llava_data), text=text)["input_ids"][0] == expected
    assert model.generation_config.eos_token_id == [2, 0]  # <|im_end|> by chance also the configuration's end
    assert answer(model, processor, picture(llava_data), [message], 4) is not None
    assert run.read_json(folder / "llava" / "config.json")["model_type"] == "llava_qwen"
    model, processor = load_llava(folder / "llava")
    assert processor.apply_chat_template([message], add_generation_prompt=True) == text
    assert model.config.image_token_index == image


def test_only_the_hf_form_where_the_original_has_no_class(llava_fields, tmp_path) -> None:
    llm = write_llama(tmp_path / "llm", model_type="qwen3")
    recipe, folder = train_run(llava_fields, tmp_path / "run", llm=str(llm), **{"finetune.max_steps": 1})
    assert (folder / "hf" / "config.json").exists()
    assert not (folder / "llava").exists()
    assert not (folder.parent / "llava-pretrain" / "llava").exists()
    assert finetune(recipe, folder.parent) == folder


def test_the_processor_pads_as_training_did(trained, llava_data) -> None:
    recipe, folder = trained
    _, processor = load_llava(folder / "hf")
    view = ImageView(load_image_processor(recipe.tower), "pad")
    for name in ("0.png", "19.png"):  # 40 x 30 and 59 x 30
        got = processor.image_processor(picture(llava_data, name), return_tensors="pt")["pixel_values"][0]
        # transformers resizes with torchvision, training with PIL: a grey level or so of 255 apart.
        assert (got - view(picture(llava_data, name))).abs().max() < 3 / 255 / 0.26


def test_no_generation_ever_emits_the_new_rows(trained, llava_data) -> None:
    """Even where their logits are the largest of all."""
    _, folder = trained
    model, processor = load_llava(folder / "hf")
    with torch.no_grad():
        model.lm_head.weight[WORDS:] = 100 * torch.randn(ROWS - WORDS, model.lm_head.weight.shape[1])
    inputs = processor(images=picture(llava_data), text="USER: <image>\n? ASSISTANT:", return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, do_sample=False, max_new_tokens=20, suppress_tokens=None)[0, start:]
    assert (free >= WORDS).any()
    kept = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, start:]
    assert not (kept >= WORDS).any()


def test_keys_and_configurations(trained, tiny_clip, tiny_llama) -> None:
    _, folder = trained
    llm = load_file(tiny_llama / "model.safetensors")
    vision = {n for n in load_file(tiny_clip / "model.safetensors") if n.startswith("vision_model.")}
    hf, original = (load_file(folder / form / "model.safetensors") for form in ("hf", "llava"))
    projector = {(i, k) for i in (1, 2) for k in ("weight", "bias")}
    assert hf.keys() == (
        {f"vision_tower.{n}" for n in vision}
        | {f"language_model.{n}" for n in llm}
        | {f"multi_modal_projector.linear_{i}.{k}" for i, k in projector}
    )
    assert original.keys() == set(llm) | {f"model.mm_projector.{2 * i - 2}.{k}" for i, k in projector}
    assert all(v.dtype == torch.float32 for v in (*hf.values(), *original.values()))
    assert all(torch.equal(original[n], hf[f"language_model.{n}"][: len(original[n])]) for n in llm)
    widened = {n for n in llm if hf[f"language_model.{n}"].shape != llm[n].shape}
    assert widened == {"model.embed_tokens.weight", "lm_head.weight"}

    config = run.read_json(folder / "llava" / "config.json")
    expected = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(tiny_clip),
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "rope_theta": 500.0,
        "vocab_size": WORDS,
        "torch_dtype": "float32",
    }
    assert {k: config[k] for k in expected} == expected
    assert (folder / "llava" / "tokenizer.model").read_bytes() == (tiny_llama / "tokenizer.model").read_bytes()
    config = run.read_json(folder / "hf" / "config.json")
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (IMAGE_ID, ROWS)


def test_generation_configs_can_be_saved(trained, tmp_path) -> None:
    """Vicuna's has a temperature without sampling, on which save_pretrained fails."""
    from transformers import GenerationConfig

    _, folder = trained
    assert "temperature" in run.read_json(Path(trained[0].llm) / "generation_config.json")
    for form in ("hf", "llava"):
        config = GenerationConfig.from_pretrained(folder / form)
        config.save_pretrained(tmp_path)
        assert (config.bos_token_id, config.eos_token_id, config.temperature) == (1, 2, None)


def test_the_pretrained_projector(trained) -> None:
    _, folder = trained
    pretrained = folder.parent / "llava-pretrain"
    state = torch.load(pretrained / "llava" / "mm_projector.bin", weights_only=True)
    weights = load_file(pretrained / "weights.safetensors")
    assert state.keys() == {f"model.mm_projector.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    for i in (0, 2):
        name = f"multi_modal_projector.linear_{i // 2 + 1}.weight"
        assert torch.equal(state[f"model.mm_projector.{i}.weight"], weights[name])
    assert run.read_json(pretrained / "llava" / "config.json")["mm_projector_type"] == "mlp2x_gelu"


def test_lora_is_merged(llava_fields, tmp_path) -> None:
    fields = {"lora_rank": 4, "lora_alpha": 16.0, "finetune.learning_rate": 1e-2}
    recipe, folder = train_run(llava_fields, tmp_path, **fields)
    ours = trained_model(recipe, folder)
    model, _ = load_llava(folder / "llava")
    ids, pixels = prompt(recipe), torch.randn(1, 3, 32, 32)
    got = model(input_ids=ids.masked_fill(ids == IMAGE_TOKEN_INDEX, IMAGE_ID), pixel_values=pixels).logits
    expected = ours.logits(ids, pixels)
    assert torch.allclose(got[..., :WORDS], expected, atol=5e-5)
    for name, parameter in ours.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    assert (ours.logits(ids, pixels) - expected).abs().max() > 1e-2, "the adapters do something"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "smollm3"])
@pytest.mark.parametrize("lora", [0, 4])
def test_tied_embeddings_are_trained_exported_and_read_back(
    llava_fields, llava_data, tmp_path, model_type, lora
) -> None:
    """Llama-3.2-1B's, Qwen2-0.5B's and SmolLM's kind, whole or by LoRA: stopped, resumed, the same greedy tokens."""
    llm = write_llama(tmp_path / "llm", model_type=model_type, tied=True)
    if model_type == "smollm3":  # tied by its class's default
        config = run.read_json(llm / "config.json")
        config.pop("tie_word_embeddings", None)
        run.write_json(llm / "config.json", config)
    changes = {"llm": str(llm), "lora_rank": lora, "lora_alpha": 8.0, "finetune.save_steps": 1}
    recipe, folder = train_run(llava_fields, tmp_path / "run", **changes)
    weights = (folder / "weights.safetensors").read_bytes()
    for gone in ("result.json", "weights.safetensors"):
        (folder / gone).unlink()
    shutil.rmtree(folder / "checkpoint-2")
    shutil.rmtree(folder / "hf")
    finetune(recipe, folder.parent)  # from checkpoint-1
    assert (folder / "weights.safetensors").read_bytes() == weights

    ours, ids = trained_model(recipe, folder), prompt(recipe)
    assert not any("lm_head" in n for n in load_file(folder / "weights.safetensors"))
    forms = ["hf"] if model_type == "smollm3" else ["hf", "llava"]
    import_from = folder / forms[-1]
    if "llava" in forms:
        import_llava(import_from, tmp_path / "imported")
    for path in [folder / form for form in forms] + ([tmp_path / "imported"] if "llava" in forms else []):
        assert not any("lm_head" in n for n in load_file(path / "model.safetensors"))
        model, processor = load_llava(path)
        assert model.config.tie_word_embeddings
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        inputs = processor(images=picture(llava_data), text=text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
            expected = ours.logits(ids, inputs["pixel_values"])
        assert torch.allclose(logits[..., :WORDS], expected, atol=5e-5)
        said = ours.generate(ids, inputs["pixel_values"], do_sample=False, max_new_tokens=12)
        got = model.generate(**inputs, do_sample=False, max_new_tokens=12)[:, ids.shape[1] :]
        assert torch.equal(got, said)


def test_a_bf16_siglip_llava_with_tied_embeddings(llava_fields, tmp_path) -> None:
    from llava_genhancer.toyworld.models import save_siglip

    tower = save_siglip(tmp_path / "siglip")
    llm = write_llama(tmp_path / "llm", tied=True)
    changes = {"tower": str(tower), "llm": str(llm), "precision": "bf16", "max_length": 400}
    recipe, folder = train_run(llava_fields, tmp_path / "run", **changes)
    for form in ("hf", "llava"):
        state = load_file(folder / form / "model.safetensors")
        assert {v.dtype for v in state.values()} == {torch.bfloat16}
        assert not any("lm_head" in n for n in state)
    model, processor = load_llava(folder / "hf")
    assert model.config.vision_feature_select_strategy == "full"
    image = Image.new("RGB", (50, 40), (200, 30, 30))
    inputs = processor(images=image, text="USER: <image>\n? ASSISTANT:", return_tensors="pt").to(dtype=torch.bfloat16)
    view = ImageView(load_image_processor(recipe.tower), "pad")
    assert (inputs["pixel_values"][0].float() - view(image)).abs().max() < 3 / 255 / 0.5 + 0.01
    patches = model.config.image_seq_length
    assert (inputs["input_ids"] == IMAGE_ID).sum() == patches
    ours = trained_model(recipe, folder).bfloat16().float()  # compared in fp32, of the same rounded weights
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_ID, IMAGE_TOKEN_INDEX)
    pixels = inputs["pixel_values"].float()
    got = model.float()(input_ids=inputs["input_ids"], pixel_values=pixels).logits
    assert torch.allclose(got[..., :WORDS], ours.logits(ids, pixels), atol=2e-5)


def test_import_is_the_way_back(trained, tmp_path, capsys) -> None:
    _, folder = trained
    with pytest.raises(SystemExit) as caught:
        cli.main(["llava", "import", str(folder / "llava"), "--output_dir", str(tmp_path / "hf")])
    assert caught.value.code == 0, capsys.readouterr().err
    ours, theirs = (
        {p.name: p.read_bytes() for p in (d).iterdir() if p.name not in ("complete.json", "config.json")}
        for d in (tmp_path / "hf", folder / "hf")
    )
    assert ours == theirs
    again, first = (run.read_json(d / "config.json") for d in (tmp_path / "hf", folder / "hf"))
    assert first == again
    assert first["text_config"]["architectures"] == ["LlamaForCausalLM"]


def as_imported(folder: Path, target: Path, **config) -> tuple[Path, dict]:
    """A copy of an original checkpoint without its weights, and the weights."""
    shutil.copytree(folder / "llava", target)
    state = load_file(target / "model.safetensors")
    for name in ("model.safetensors", "complete.json"):
        (target / name).unlink()
    run.write_json(target / "config.json", {**run.read_json(target / "config.json"), **config})
    return target, state


def test_what_others_resolve_by_is_the_language_models_own(trained, tmp_path) -> None:
    """vLLM takes the class from text_config.architectures; nothing of the original's form may be left there."""
    _, folder = trained
    extra = {
        "mm_tunable_parts": "mm_mlp", "image_grid_pinpoints": [], "tokenizer_model_max_length": 2048,
        "auto_map": {"a": "b"}, "_name_or_path": "/somebody/llava", "vision_tower_pretrained": None,
        "torch_dtype": "float16",
    }  # fmt: skip
    source, state = as_imported(folder, tmp_path / "llava", **extra)
    torch.save(state, source / "pytorch_model.bin")
    import_llava(source, tmp_path / "hf")
    for written in (tmp_path / "hf", folder / "hf"):
        config = run.read_json(written / "config.json")
        text = config["text_config"]
        assert (text["architectures"], text["model_type"]) == (["LlamaForCausalLM"], "llama")
        assert (text["torch_dtype"], config["torch_dtype"]) == ("float32", "float32")
        assert text["rope_theta"] == 500.0
        assert not [k for k in text if k.startswith(("mm_", "image_", "tokenizer_", "use_mm", "tune_mm", "freeze_mm"))]
        assert not text.keys() & (extra.keys() - {"torch_dtype"})


def lora_folder(source: Path, state: dict) -> None:
    torch.save({}, source / "non_lora_trainables.bin")
    run.write_json(source / "adapter_config.json", {"base_model_name_or_path": "lmsys/vicuna-7b-v1.5"})
    torch.save({}, source / "adapter_model.bin")


def one_shard_lost(source: Path, state: dict) -> None:
    names = sorted(state)
    torch.save({n: state[n] for n in names[5:]}, source / "pytorch_model-00002-of-00002.bin")


def index_names_more(source: Path, state: dict) -> None:
    half = {n: state[n] for n in sorted(state)[:5]}
    save_file(half, source / "model-00001-of-00002.safetensors")
    run.write_json(
        source / "model.safetensors.index.json",
        {"weight_map": {n: f"model-0000{1 + (n not in half)}-of-00002.safetensors" for n in state}},
    )


def without(*words: str, empty: bool = False):
    def write(source: Path, state: dict) -> None:
        hit = {n for n in state if any(w in n for w in words)}
        kept = {n: v for n, v in state.items() if n not in hit}
        save_file(kept | ({n: state[n].new_empty(0) for n in hit} if empty else {}), source / "model.safetensors")

    return write


def changed(name: str, change):
    return lambda source, state: save_file(state | {name: change(state[name])}, source / "model.safetensors")


BROKEN = {
    "LoRA": (lora_folder, {}, r"is a LoRA training's folder .*merge_lora_weights.py .* --model-base lmsys/vicuna"),
    "no projector": (without("mm_projector"), {}, "no projector"),
    "half a projector": (without("mm_projector.2"), {}, r"2 weights of the projector missing \(first: linear_2.bias\)"),
    "projector alone": (
        lambda f, s: torch.save({n: v for n, v in s.items() if "mm_proj" in n}, f / "mm_projector.bin"), {},
        "a projector without its language model",
    ),
    "a shard lost": (one_shard_lost, {}, "1 of 2 weight files are missing .*pytorch_model-00001-of-00002.bin"),
    "a shard lost, index": (index_names_more, {}, "1 of 2 weight files are missing .*model-00002-of-00002.safetensors"),
    "empty projector": (without("mm_projector", empty=True), {}, r"linear_\d.* is \(0,\).*zero_to_fp32"),
    "all empty": (without("", empty=True), {}, r"is \(0,\), expected"),
    "a layer lost": (without("layers.1."), {}, "9 weights of the language model missing .*layers.1."),
    "more layers than said": (without("nothing"), {"num_hidden_layers": 1}, "9 weights .* no place"),
    "another vocabulary": (without("nothing"), {"vocab_size": 390}, r"is \(380, 32\), expected \(390, 32\)"),
    "another projector": (
        changed("model.mm_projector.0.weight", lambda v: v[:, :5].clone()), {}, r"is \(32, 5\), expected \(32, 32\)",
    ),
    "integers": (changed("lm_head.weight", lambda v: v.to(torch.int8)), {}, "lm_head.weight .*torch.int8, expected"),
    "NaN": (changed("model.norm.weight", lambda v: v * torch.nan), {}, "model.norm.weight .* holds NaN or infinity"),
    "a trained tower": (without("nothing"), {"unfreeze_mm_vision_tower": True}, "unfreeze_mm_vision_tower True"),
    "a trained tower, NeXT": (without("nothing"), {"mm_tunable_parts": "mm_vision_tower,x"}, "was trained too"),
    "S2": (without("nothing"), {"s2": True}, "s2 True"),
    "an untied head": (without("nothing"), {"tie_word_embeddings": True}, "ties the embeddings .* differ"),
    "no weights": (lambda f, s: None, {}, "holds no weights"),
    "anyres": (without("nothing"), {"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
    "CLS": (without("nothing"), {"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
    "no tower": (without("nothing"), {"mm_vision_tower": None}, "must have .*mm_vision_tower"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_is_not_whole_is_never_imported(trained, llava_data, tmp_path, capsys, case) -> None:
    """One line each, in import and chat."""
    write, config, words = BROKEN[case]
    source, state = as_imported(trained[1], tmp_path / "llava", **config)
    write(source, state)
    with pytest.raises(InputError, match=words):
        import_llava(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=words):
        load_llava(source)


def test_a_projector_in_a_file_of_its_own_and_mixed_types(trained, tmp_path) -> None:
    """Language model in bf16 shards with RoPE's old buffers, projector in fp32 beside them, named without model."""
    _, folder = trained
    source, state = as_imported(folder, tmp_path / "llava")
    projector = {n: v for n, v in state.items() if "mm_projector" in n}
    torch.save({n.removeprefix("model."): v for n, v in projector.items()}, source / "mm_projector.bin")
    language = {n: v if "norm" in n else v.bfloat16() for n, v in state.items() if n not in projector}
    language["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(language)
    parts = [{n: language[n] for n in names[:7]}, {n: language[n] for n in names[7:]}]
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, source / file)
    where = {n: file for file, part in zip(files, parts, strict=True) for n in part}
    run.write_json(source / "pytorch_model.bin.index.json", {"weight_map": where})
    import_llava(source, tmp_path / "hf")
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "hf", folder / "hf"))
    assert ours.keys() == theirs.keys()
    assert {v.dtype for v in ours.values()} == {torch.bfloat16}
    assert all(torch.equal(ours[n], theirs[n].bfloat16()) for n in ours)


def test_an_hf_folder_whose_weights_do_not_fit_is_one_line(trained, tmp_path) -> None:
    _, folder = trained
    shutil.copytree(folder / "hf", tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    name = "multi_modal_projector.linear_1.weight"
    for change, words in (
        ({name: state[name].new_empty(0)}, "multi_modal_projector.linear_1.weight|mismatch"),
        ({"language_model.model.layers.2.mlp.up_proj.weight": state[name].clone()}, "has no place for|have no place"),
    ):
        save_file(state | change, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=words):
            load_llava(tmp_path / "hf")


def test_released_checkpoints_have_shards_and_a_tower_inside(trained, tmp_path, tiny_clip) -> None:
    """As LLaVA-1.5 was released: .bin shards, the tower's weights among them, its path a hub's."""
    _, folder = trained
    source = tmp_path / "llava-v1.5-tiny"
    source.mkdir()
    for path in (folder / "llava").iterdir():
        if path.suffix != ".safetensors":
            (source / path.name).write_bytes(path.read_bytes())
    config = run.read_json(source / "config.json") | {"mm_vision_tower": "openai/not-here", "model_type": "llava"}
    (source / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "llava" / "model.safetensors")
    tower = {"model.vision_tower.vision_tower.vision_model.x": torch.zeros(2)}
    names = sorted(state)
    for i, part in enumerate(({n: state[n] for n in names[:7]} | tower, {n: state[n] for n in names[7:]})):
        torch.save(part, source / f"pytorch_model-0000{i + 1}-of-00002.bin")
    with pytest.raises(InputError, match="openai/not-here cannot be loaded"):
        import_llava(source, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    import_llava(source, tmp_path / "b", tower=str(tiny_clip))
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "b", folder / "hf"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "is not a checkpoint of LLaVA-1.5's form"),
        ({"mm_projector_type": "linear"}, "mm_projector_type linear"),
        ({"mm_use_im_start_end": True}, "tokens of its own"),
    ],
)
def test_what_cannot_be_imported(trained, tmp_path, change, words) -> None:
    _, folder = trained
    config = run.read_json(folder / "llava" / "config.json") | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        import_llava(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="does not exist"):
        import_llava(tmp_path / "nowhere", tmp_path / "out")


def test_chat_answers_the_same_from_both_forms(trained, llava_data, capsys) -> None:
    _, folder = trained
    said = []
    for form in ("hf", "llava"):
        image = str(llava_data["images"] / "3.png")
        questions = ["--question", QUESTION, "--question", "how many cats are there?"]
        with pytest.raises(SystemExit) as caught:
            cli.main(["llava", "chat", str(folder / form), image, *questions, "--max_new_tokens", "12"])
        assert caught.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    model, processor = load_llava(folder / "hf")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    first = answer(model, processor, picture(llava_data, "3.png"), [message], 12)
    assert said[0].startswith(first)


@pytest.mark.parametrize(
    ("checkpoint", "image", "words"),
    [("hf", "no.png", "no.png cannot be used: file not found"), ("nothing", "3.png", "no config.json there")],
)
def test_chat_with_what_is_not_there(trained, llava_data, capsys, checkpoint, image, words) -> None:
    _, folder = trained
    with pytest.raises(SystemExit) as caught:
        cli.main(["llava", "chat", str(folder / checkpoint), str(llava_data["images"] / image), "--question", "?"])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_chat_with_damage_and_without_device(trained, llava_data, tmp_path) -> None:
    _, folder = trained
    image = llava_data["images"] / "3.png"
    with pytest.raises(InputError, match="max_new_tokens=0"):
        chat(folder / "hf", image, questions=["?"], max_new_tokens=0)
    with pytest.raises(InputError, match="device nonsense cannot be used"):
        chat(folder / "hf", image, questions=["?"], device="nonsense")
    shutil.copytree(folder / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"junk" * 50)
    with pytest.raises(InputError, match="cannot be loaded"):
        chat(tmp_path / "hf", image, questions=["?"])


def test_export_elsewhere_and_unfinished(trained, tmp_path, capsys) -> None:
    recipe, folder = trained
    with pytest.raises(SystemExit) as caught:
        cli.main(["llava", "export", str(folder.parent), "--output_dir", str(tmp_path)])
    assert caught.value.code == 0
    for form in ("hf", "llava"):
        ours, theirs = (d / form / "model.safetensors" for d in (tmp_path, folder))
        assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(InputError, match="is not finished"):
        export_step(recipe, "finetune", tmp_path)


def test_large_models_are_written_in_shards(trained, tmp_path, monkeypatch) -> None:
    from llava_genhancer.llava import checkpoint

    recipe, folder = trained
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 60_000)
    export_step(recipe, "finetune", folder, tmp_path)
    shards = list((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) > 1
    whole = load_file(folder / "hf" / "model.safetensors")
    parts = {n: v for shard in shards for n, v in load_file(shard).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[n], whole[n]) for n in whole)
    load_llava(tmp_path / "hf")
    load_llava(tmp_path / "llava")
