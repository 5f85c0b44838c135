"""Runs in old LLaVA's environment: what its code and transformers 4.37.2 make of an exported LLaVA.

python read_llava.py FOLDER INPUTS.safetensors OUTPUTS.safetensors

FOLDER holds ``hf/`` and ``llava/``. Writes logits, loss and greedy tokens; ``saved-llava/`` in FOLDER is the original
form as the original code itself saves it.
"""

import json
import sys

import torch
import transformers
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration


def keys(info: dict) -> dict:
    """What loading missed or could not place."""
    return {k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def processor_loads(folder: str) -> bool:
    """Whether this transformers takes the exported processor, whose padding it cannot do."""
    try:
        AutoProcessor.from_pretrained(folder)
    except TypeError:
        return False
    return True


@torch.no_grad()
def main(folder: str, inputs_file: str, outputs_file: str) -> None:
    inputs = load_file(inputs_file)
    text = bytes(inputs["text"].tolist()).decode()

    name = get_model_name_from_path(f"{folder}/llava")
    tokenizer, half, processor, _ = load_pretrained_model(f"{folder}/llava", None, name, device="cpu", device_map="cpu")
    pixels = process_images([Image.fromarray(inputs["image"].numpy())], processor, half.config).float()
    prompt = tokenizer_image_token(text, tokenizer, return_tensors="pt")[None]
    said_in_half = half.generate(prompt, images=pixels.half(), do_sample=False, max_new_tokens=4)

    model, info = LlavaLlamaForCausalLM.from_pretrained(f"{folder}/llava", output_loading_info=True)
    model.get_vision_tower().load_model()
    model.eval()
    outputs = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"].bool(),
        labels=inputs["labels"],
        images=inputs["pixel_values"],
    )
    said = model.generate(prompt, images=pixels, do_sample=False, max_new_tokens=16)

    hf, hf_info = LlavaForConditionalGeneration.from_pretrained(f"{folder}/hf", output_loading_info=True)
    words = AutoTokenizer.from_pretrained(f"{folder}/hf")(text, return_tensors="pt")
    said_by_hf = hf.generate(**words, pixel_values=pixels, do_sample=False, max_new_tokens=16)

    model.save_pretrained(f"{folder}/saved-llava")
    tokenizer.save_pretrained(f"{folder}/saved-llava")
    results = {
        "logits": outputs.logits,
        "loss": outputs.loss[None],
        "processed": pixels,
        "prompt": prompt,
        "said": said[:, 1:],  # the original code puts the begin token in front
        "said_in_half": said_in_half[:, 1:],
        "said_by_hf": said_by_hf[:, words["input_ids"].shape[1] :],
    }
    save_file({k: v.contiguous() for k, v in results.items()}, outputs_file)
    report = {"transformers": transformers.__version__, "llava": keys(info), "hf": keys(hf_info)}
    print(json.dumps({**report, "processor_loads": processor_loads(f"{folder}/hf")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
