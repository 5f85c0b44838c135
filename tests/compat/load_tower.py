"""Runs in old LLaVA's environment (transformers 4.37.2): load a tower folder as LLaVA's forks do, report as JSON.

python load_tower.py TOWER INPUTS.safetensors OUTPUTS.safetensors
"""

import json
import sys
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file


def loaded(cls, folder):
    """A model, and the keys its loading missed or could not place."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
    return model.eval(), {k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")}


@torch.no_grad()
def main(folder: str, inputs_file: str, outputs_file: str) -> None:
    from llava_genhancer.tower.export import verify_tower
    from llava_genhancer.tower.tower import VisionTower, check_names

    marker = verify_tower(folder)
    check_names(folder)
    inputs = load_file(inputs_file)
    family = "CLIP" if marker["model_type"] == "clip" else "Siglip"
    full, full_keys = loaded(getattr(transformers, f"{family}Model"), folder)
    vision, vision_keys = loaded(getattr(transformers, f"{family}VisionModel"), folder)
    processor = getattr(transformers, f"{family}ImageProcessor").from_pretrained(folder)
    seen = vision(inputs["pixel_values"], output_hidden_states=True)
    both = full(pixel_values=inputs["pixel_values"], input_ids=inputs["input_ids"])
    tower = VisionTower(folder, SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature="cls_patch"))
    outputs = {
        "hidden": seen.hidden_states[-2],
        "tower": tower(inputs["pixel_values"]),
        "image_embeds": both.image_embeds,
        "text_embeds": both.text_embeds,
        "logits_per_image": both.logits_per_image,
        "processed": torch.from_numpy(np.stack(processor(inputs["image"].numpy())["pixel_values"])),
    }
    report = {"transformers": transformers.__version__, "full": full_keys, "vision": vision_keys}
    if family == "CLIP":
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        outputs["tokens"] = torch.tensor(tokenizer(["a red critter on a table", "two"], padding=True)["input_ids"])
    save_file({k: v.contiguous() for k, v in outputs.items()}, outputs_file)
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
