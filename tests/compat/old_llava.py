"""Runs in old LLaVA's environment, beside llava-torch's own trainer.

python old_llava.py llm FOLDER              a tiny Llama of random weights for the tokenizer in FOLDER
python old_llava.py train [ARGUMENTS]       llava.train.train as its authors start it, untouched
python old_llava.py look CHECKPOINT INPUTS.safetensors OUTPUTS.safetensors [register]
                                            what the checkpoint sees and says, by LLaVA's own loading
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def llm(folder: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    tokenizer = LlamaTokenizer(f"{folder}/tokenizer.model")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def train(*arguments: str) -> None:
    from llava.train.train import train

    sys.argv = ["train.py", *arguments]
    train()


@torch.no_grad()
def look(checkpoint: str, inputs_file: str, outputs_file: str, registered: str = "") -> None:
    if registered:
        from llava_genhancer.tower import register

        register()
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from PIL import Image

    tokenizer, model, processor, _ = load_pretrained_model(
        checkpoint, None, "llava-tiny", device_map="cpu", device="cpu"
    )
    tower = model.get_vision_tower()
    assert next(tower.parameters()).dtype == torch.float16  # as LLaVA puts it
    inputs = load_file(inputs_file)
    image = Image.fromarray(inputs["image"].numpy())
    pixels = process_images([image], processor, model.config).half()
    chat = conv_templates["v1"].copy()
    chat.append_message(chat.roles[0], "<image>\nWhat is this?")
    chat.append_message(chat.roles[1], None)
    ids = tokenizer_image_token(chat.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    said = model.generate(ids, images=pixels, image_sizes=[image.size], do_sample=False, max_new_tokens=8)
    classes = [f"{type(x).__module__}.{type(x).__name__}" for x in (tower, processor)]

    tower.is_loaded = False  # half kept eleven bits: read the weights again as they are
    tower.load_model()
    outputs = {"features": tower.float()(inputs["pixel_values"]), "processed": pixels.float(), "tokens": said}
    save_file({k: v.contiguous() for k, v in outputs.items()}, outputs_file)
    arguments = torch.load(Path(checkpoint) / "training_args.bin", weights_only=False)
    print(json.dumps({"classes": classes, "arguments": f"{type(arguments).__module__}.{type(arguments).__name__}"}))


if __name__ == "__main__":
    {"llm": llm, "train": train, "look": look}[sys.argv[1]](*sys.argv[2:])
