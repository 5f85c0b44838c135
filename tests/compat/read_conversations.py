"""Runs in old LLaVA's environment: its own reading of conversations, order of samples, and view of images, as JSON.

python read_conversations.py QUESTIONS.json ANSWERS.json
"""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from llava import conversation
from llava.mm_utils import process_images
from llava.train import train
from llava.train.llava_trainer import LengthGroupedSampler
from PIL import Image
from safetensors.torch import save_file


def read(tokenizer, version, entry):
    """ids and labels of an entry of the JSON, by the steps of LazySupervisedDataset."""
    conversation.default_conversation = conversation.conv_templates[version]
    sources = copy.deepcopy([entry["conversations"]])
    has_image = "image" in entry
    if has_image:
        settings = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
        sources = train.preprocess_multimodal(sources, settings)
    both = train.preprocess(sources, tokenizer, has_image=has_image)
    return [list(map(int, both[name][0])) for name in ("input_ids", "labels")]


def modality_lengths(entries):
    """The property of LazySupervisedDataset that its sampler asks."""
    return train.LazySupervisedDataset.modality_lengths.fget(SimpleNamespace(list_data_dict=entries))


def main(questions_file, answers_file):
    questions = json.loads(Path(questions_file).read_text())
    answers = {"transformers": transformers.__version__, "read": []}
    tokenizers = {
        folder: transformers.AutoTokenizer.from_pretrained(
            folder, model_max_length=2048, padding_side="right", use_fast=False
        )
        for folder in questions["tokenizers"]
    }
    for tokenizer in tokenizers.values():
        tokenizer.pad_token = tokenizer.unk_token
        answers["read"].append([read(tokenizer, version, entry) for version, entry in questions["cases"]])
    answers["texts"] = [
        transformers.AutoTokenizer.from_pretrained(folder, use_fast=fast)(texts).input_ids
        for folder, fast, texts in questions["texts"]
    ]
    answers["lengths"] = modality_lengths([entry for _, entry in questions["cases"]])
    answers["orders"] = []
    for lengths, batch_size, chunks, seed in questions["orders"]:
        torch.manual_seed(seed)
        answers["orders"].append(list(LengthGroupedSampler(batch_size, chunks, lengths, group_by_modality=True)))
    processor = transformers.CLIPImageProcessor.from_pretrained(questions["processor"])
    images = [Image.open(path).convert("RGB") for path in questions["images"]]
    views = {
        mode: torch.stack([process_images([i], processor, SimpleNamespace(image_aspect_ratio=mode))[0] for i in images])
        for mode in ("pad", "square")
    }
    save_file({mode: view.contiguous() for mode, view in views.items()}, answers_file + ".safetensors")
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
