"""Exported LLaVAs in the original code and in old transformers (`make test-compat`): keys, logits, loss, tokens."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_llama import write_llama

from llava_genhancer import recipes
from llava_genhancer.llava.chat import load_llava
from llava_genhancer.llava.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Turn, encode_prompt
from llava_genhancer.llava.export import collect, import_llava
from llava_genhancer.llava.hf import write_hf
from llava_genhancer.llava.model import Llava, build_llava
from llava_genhancer.llava.original import write_llava
from llava_genhancer.llava.recipes import LlavaRecipe
from llava_genhancer.llava.tokenizer import load_tokenizer

PYTHON = os.environ.get("LLAVA_GENHANCER_COMPAT_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs old LLaVA's environment: make test-compat")
ROOT = Path(__file__).parents[2]
QUESTION = "what colour is the ball?"
IMAGES = [1, 0, 2]  # of the batch's samples
PATCHES, WORDS = 16, 380


def expanded(ids: list[int]) -> list[int]:
    """Every image's place as long as the image."""
    return [x for i in ids for x in ([i] * PATCHES if i == IMAGE_TOKEN_INDEX else [i])]


def batches() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same samples as the original code takes them, images one token, and as ours does."""
    g = torch.Generator().manual_seed(0)
    rows, pixels, shown = [], [], []
    for count in IMAGES:
        words = torch.randint(3, WORDS, (11,), generator=g).tolist()
        rows.append([1, *([IMAGE_TOKEN_INDEX] * count), *words])
        shown += [torch.randn(3, 32, 32, generator=g) for _ in range(count)]
        pixels += shown[-count:] if count else [torch.zeros(3, 32, 32)]  # the original wants one for every sample

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(v) for v in values], batch_first=True, padding_value=fill)

    def labels(row: list[int]) -> list[int]:
        return [IGNORE_INDEX if i < len(row) - 6 else token for i, token in enumerate(row)]

    old = {"input_ids": padded(rows, 0), "labels": padded([labels(r) for r in rows], IGNORE_INDEX)}
    old |= {"attention_mask": padded([[1] * len(r) for r in rows], 0), "pixel_values": torch.stack(pixels)}
    long = [expanded(r) for r in rows]
    new = {"input_ids": padded(long, 0), "labels": padded([labels(r) for r in long], IGNORE_INDEX)}
    return old, new | {"pixel_values": torch.stack(shown), "mask": padded([[1] * len(r) for r in long], 0)}


def exported(folder: Path, llm: Path, tower: Path) -> tuple[LlavaRecipe, Llava]:
    """A LLaVA with a random projector, both forms written from its trained weights."""
    fields = {"llm": str(llm), "tower": str(tower), "precision": "fp32"}
    recipe = recipes.override(LlavaRecipe(name="test"), fields)
    model = build_llava(recipe, "finetune").eval()
    state = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    save_file(state, folder / "weights.safetensors")
    checkpoint = collect(recipe, "finetune", folder / "weights.safetensors")
    for name, write in (("hf", write_hf), ("llava", write_llava)):
        (folder / name).mkdir()
        write(checkpoint, folder / name)
    return recipe, model


@torch.no_grad()
@pytest.mark.parametrize(
    ("legacy", "tied"),
    [(True, False), (False, False), (True, True)],  # Vicuna 1.5's tokenizer is not legacy; Llama 3.2 1B is tied
)
def test_the_original_code_reads_what_we_export(tiny_clip: Path, tmp_path: Path, legacy: bool, tied: bool) -> None:
    recipe, model = exported(tmp_path, write_llama(tmp_path / "llm", legacy=legacy, tied=tied), tiny_clip)
    old, new = batches()
    prompt = encode_prompt([Turn(f"<image>\n{QUESTION}", None)], "v1", load_tokenizer(recipe.llm))
    hf, processor = load_llava(tmp_path / "hf")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    picture = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    inputs = {**old, "image": picture, "text": torch.tensor(list(text.encode()))}
    save_file(inputs, tmp_path / "inputs.safetensors")
    command = [str(PYTHON), str(Path(__file__).with_name("read_llava.py")), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    files = [str(tmp_path / f"{name}.safetensors") for name in ("inputs", "outputs")]
    done = subprocess.run([*command, *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

    report = json.loads(done.stdout.splitlines()[-1])
    assert report["transformers"] == "4.37.2"
    nothing: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert report["hf"] == nothing
    assert not report["processor_loads"], "it would crop or distort in silence: the processor needs transformers 4.50"
    # The original builds its tower later, from the tower's own folder.
    assert report["llava"] == nothing
    theirs = load_file(tmp_path / "outputs.safetensors")

    assert theirs["prompt"][0].tolist() == prompt
    logits = model.logits(new["input_ids"], new["pixel_values"])
    valid = new["mask"].bool()
    assert logits.shape == theirs["logits"].shape
    assert (logits - theirs["logits"])[valid].abs().max() < 3e-6 * logits.abs().max()
    loss = model(new["input_ids"], new["labels"], new["pixel_values"])
    assert abs(float(loss - theirs["loss"][0])) < 2e-6

    shown = processor(images=Image.fromarray(picture.numpy()), text=text, return_tensors="pt")
    assert torch.allclose(shown["pixel_values"], theirs["processed"], atol=1e-6)
    ids = torch.tensor([expanded(prompt)])
    said = model.generate(ids, theirs["processed"], do_sample=False, max_new_tokens=16)
    hf_said = hf.generate(**shown, do_sample=False, max_new_tokens=16)[:, ids.shape[1] :]
    assert len(set(said[0].tolist())) > 3
    for tokens in (hf_said, theirs["said"], theirs["said_by_hf"]):
        assert torch.equal(tokens, said)
    assert torch.equal(theirs["said_in_half"], said[:, :4])

    # And back: a checkpoint that the original code saved, its tower's weights inside.
    state = load_file(tmp_path / "saved-llava" / "model.safetensors")
    assert any(".vision_tower." in name for name in state)
    import_llava(tmp_path / "saved-llava", tmp_path / "imported")
    ours, again = (load_file(tmp_path / n / "model.safetensors") for n in ("hf", "imported"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[n], again[n]) for n in ours)
