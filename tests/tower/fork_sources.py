"""Small forks of our own, each choosing its tower by the rule of the real one; the classes only remember their call."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

CLASSES = {
    "clip": """
        from transformers import CLIPVisionModel


        class CLIPVisionTower:
            model = CLIPVisionModel

            def __init__(self, name, args=None, **kwargs):
                self.name, self.kwargs = name, kwargs

            def forward(self, hidden):
                return hidden[:, 1:]
        """,
    "siglip": """
        from transformers import SiglipVisionModel


        class SiglipVisionTower:
            model = SiglipVisionModel

            def __init__(self, name, args=None, **kwargs):
                self.name, self.kwargs = name, kwargs

            def forward(self, hidden):
                return hidden
        """,
}
CLASSES["siglip-cut"] = CLASSES["siglip"].replace("return hidden", "return hidden[:, 1:]")
CLASSES["clip-eva"] = CLASSES["clip"] + (
    "\n            def load_model(self):\n                return 'eva' in self.name.lower()\n"
)
IMPORTS = "import os\n\nfrom .towers import CLIPVisionTower\n"
BOTH = "import os\n\nfrom .towers import CLIPVisionTower, SiglipVisionTower\n"
BY_EXISTENCE = """

def build_vision_tower(vision_tower_cfg, **kwargs):
    name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
    if os.path.exists(name) or name.startswith("openai") or name.startswith("laion"):
        return CLIPVisionTower(name, args=vision_tower_cfg, **kwargs)
    raise ValueError(f"Unknown vision tower: {name}")
"""
IMAGE_BY_EXISTENCE = BY_EXISTENCE.replace("vision_tower", "image_tower")
BY_PREFIX = """

def build_image_tower(image_tower_cfg, **kwargs):
    name = getattr(image_tower_cfg, "mm_image_tower", getattr(image_tower_cfg, "image_tower", None))
    if name.startswith("openai") or name.startswith("laion"):
        return CLIPVisionTower(name, args=image_tower_cfg, cache_dir="./cache_dir", **kwargs)
    if name.startswith("google"):
        return SiglipVisionTower(name, args=image_tower_cfg, cache_dir="./cache_dir", **kwargs)
    raise ValueError(f"Unknown image tower: {name}")
"""
NEXT = BY_EXISTENCE.replace(
    "    raise",
    "    elif 'siglip' in name:\n        return SiglipVisionTower(name, vision_tower_cfg, **kwargs)\n    raise",
)
CAMBRIAN = """

def build_vision_tower(vision_tower_cfg, **kwargs):
    raise AssertionError("never called in training")


def build_vision_tower_aux_list(vision_tower_cfg, **kwargs):
    names = vision_tower_cfg.vision_tower_aux_list
    lengths = vision_tower_cfg.vision_tower_aux_token_len_list
    towers = []
    for name, length in zip(names, lengths):
        config = copy.deepcopy(vision_tower_cfg)
        name += "-interp{}".format(length)
        if "openai/clip" in name.lower():
            logger.info(f"loading {name}")
            towers.append(CLIPVisionTower(name, args=config, **kwargs))
        else:
            raise ValueError(f"Unknown vision tower: {name}")
    return towers
"""
BUNNY = """

def build_vision_tower(vision_tower_cfg, **kwargs):
    name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
    if "sig" in name.lower():
        return SiglipVisionTower(name, args=vision_tower_cfg, **kwargs)
    elif "clip" in name.lower():
        return CLIPVisionTower(name, args=vision_tower_cfg, **kwargs)
    else:
        raise ValueError(f"Unknown vision tower: {name}")
"""
VILA = """

def build_vision_tower(model_name_or_path: str, config: PretrainedConfig) -> PreTrainedModel:
    if model_name_or_path is None:
        return None
    name = model_name_or_path
    if "intern" in name.lower():
        tower = InternVisionTower(model_name_or_path, config=config)
    elif "clip" in name:
        tower = CLIPVisionTower(model_name_or_path, config)
    elif "siglip" in name:
        tower = SiglipVisionTower(model_name_or_path, config)
    else:
        raise ValueError(f"Unknown vision tower: {model_name_or_path}")
    config.mm_hidden_size = tower.config.hidden_size
    return tower
"""
FACTORY = """
import importlib

TOWERS = {}


def VisionTowerFactory(vision_tower_name):
    key, found = vision_tower_name.split(":")[0], None
    for name in TOWERS:
        if name in key.lower():
            found = TOWERS[name]
    assert found, f"{key} is not registered"
    return found


def register_vision_tower(name):
    def keep(cls):
        TOWERS[name] = cls
        return cls

    return keep


importlib.import_module(__name__ + ".known")
"""
KNOWN = "from . import register_vision_tower\n" + "".join(
    textwrap.dedent(CLASSES[kind]).replace("class ", f"@register_vision_tower('{kind.split('-')[0]}')\nclass ", 1)
    for kind in ("clip", "siglip-cut")
)


@dataclass(frozen=True)
class Fork:
    """One fork's layout."""

    package: str
    arch: str
    builder: str
    classes: tuple[str, ...]
    function: str = "build_vision_tower"


FORKS = {
    "LLaVA": Fork("llava", "llava_arch", IMPORTS + BY_EXISTENCE, ("clip",)),
    "Open-LLaVA-NeXT": Fork("llava", "llava_arch", IMPORTS + BY_EXISTENCE, ("clip",)),
    "LLaVA-NeXT": Fork("llava", "llava_arch", BOTH + NEXT, ("clip", "siglip")),
    "ShareGPT4V": Fork("share4v", "share4v_arch", IMPORTS + BY_EXISTENCE, ("clip-eva",)),
    "Video-LLaVA": Fork("videollava", "llava_arch", IMPORTS + IMAGE_BY_EXISTENCE, ("clip",), "build_image_tower"),
    "MoE-LLaVA": Fork("moellava", "llava_arch", BOTH + BY_PREFIX, ("clip", "siglip-cut"), "build_image_tower"),
    "Cambrian": Fork(
        "cambrian",
        "cambrian_arch",
        "import copy\nfrom logging import root as logger\n" + IMPORTS + CAMBRIAN,
        ("clip",),
        "build_vision_tower_aux_list",
    ),
    "Bunny": Fork("bunny", "bunny_arch", BOTH + BUNNY, ("clip", "siglip")),
    "VILA": Fork(
        "vila",
        "llava_arch",
        "from transformers import PretrainedConfig, PreTrainedModel\n" + BOTH + VILA,
        ("clip", "siglip-cut"),
    ),
    "TinyLLaVA": Fork("tinyllava", "modeling_tinyllava", FACTORY, (), "VisionTowerFactory"),
}


def write_fork(name: str, folder: Path) -> str:
    """Write a fork's package below ``folder``; its arch module imports the builder by value.

    Returns:
        The package's name.
    """
    fork = FORKS[name]
    files = {"__init__.py": "", "model/__init__.py": ""}
    if fork.function == "VisionTowerFactory":
        files |= {"model/vision_tower/__init__.py": fork.builder, "model/vision_tower/known.py": KNOWN}
        files[f"model/{fork.arch}.py"] = "from .vision_tower import VisionTowerFactory\n"
    else:
        classes = "\n".join(textwrap.dedent(CLASSES[kind]) for kind in fork.classes)
        files |= {"model/multimodal_encoder/__init__.py": "", "model/multimodal_encoder/towers.py": classes}
        files["model/multimodal_encoder/builder.py"] = fork.builder
        files[f"model/{fork.arch}.py"] = f"from .multimodal_encoder.builder import {fork.function}\n"
    for path, text in files.items():
        target = folder / fork.package / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return fork.package
