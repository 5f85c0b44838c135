"""Small forks of our own, each picking its tower class by the rule of the real one.

Most classes only remember their call; the ``real`` ones load a CLIP, with what forks of forks add to LLaVA's class.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

CLASSES = {
    "clip": """
        from transformers import CLIPVisionModel


        class CLIPVisionTower:
            model = CLIPVisionModel
            config = SimpleNamespace(hidden_size=1)

            def __init__(self, name, args=None, **kwargs):
                self.name, self.kwargs = name, kwargs

            def forward(self, hidden):
                return hidden[:, 1:]
        """,
    "real": """
        import torch
        from transformers import CLIPVisionModel


        class CLIPVisionTower(torch.nn.Module):
            def __init__(self, name, args, delay_load=False):
                super().__init__()
                self.name, self.layer = name, args.mm_vision_select_layer
                self.feature = getattr(args, "mm_vision_select_feature", "patch")
                self.vision_tower = CLIPVisionModel.from_pretrained(name)
                self.config = self.vision_tower.config

            @torch.no_grad()
            def forward(self, images, return_cls_token=False):
                states = self.vision_tower(images, output_hidden_states=True).hidden_states
                sliced = [states[0], states[2]] if self.feature.startswith("slicefour_") else [states[self.layer]]
                return torch.cat(sliced, dim=-1)[:, 0 if return_cls_token else 1 :]
        """,
    "pair": """
        from transformers import CLIPVisionModel


        class CLIPVisionTower:
            model = CLIPVisionModel
            config = SimpleNamespace(hidden_size=1)

            def __init__(self, name, args=None, **kwargs):
                self.name, self.kwargs = name, kwargs

            def forward(self, hidden):
                if hidden is None:
                    return None, None
                return hidden[:, 1:], hidden
        """,
    "own-siglip": """
        class SigLipVisionModel:
            pass


        class SigLipVisionTower:
            model = SigLipVisionModel
            config = SimpleNamespace(hidden_size=1)

            def __init__(self, name, args=None, **kwargs):
                self.name, self.kwargs = name, kwargs
        """,
    "siglip": """
        from transformers import SiglipVisionModel


        class SiglipVisionTower:
            model = SiglipVisionModel
            config = SimpleNamespace(hidden_size=1)

            def __init__(self, name, args=None, **kwargs):
                self.name, self.kwargs = name, kwargs

            def forward(self, hidden):
                return hidden
        """,
}
_CUT = "return hidden[:, 1:] if self.select == 'patch' else hidden if self.select == 'cls_patch' else None"
CLASSES["siglip-cut"] = CLASSES["siglip"].replace("return hidden", _CUT)
CLASSES["siglip-always-cut"] = CLASSES["siglip"].replace("return hidden", "return hidden[:, 1:]")
CLASSES["needs-sizes"] = CLASSES["siglip"].replace("(self, hidden)", "(self, hidden, sizes)")
CLASSES["needs-sizes"] = (
    CLASSES["needs-sizes"]
    .replace("SiglipVisionModel", "MyOwnVisionModel")
    .replace("from transformers import MyOwnVisionModel", "MyOwnVisionModel = object")
)
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
ROSS = BUNNY.replace('"sig" in', '"clip" in').replace('elif "clip" in', 'elif "siglip" in')
ROSS = ROSS.replace("Siglip", "X").replace("CLIP", "Siglip").replace("X", "CLIP")
BY_WORD = BY_EXISTENCE.replace("os.path.exists(name)", '"clip" in name')  # LISA, GLaMM
PARROT = """

def build_vision_tower(vision_tower_cfg, **kwargs):
    name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
    if "/clip-vit" in name:
        return CLIPVisionTower(name, args=vision_tower_cfg, **kwargs)
    elif "/siglip-so400m" in name:
        return SigLipVisionTower(name, args=vision_tower_cfg, **kwargs)
    else:
        raise ValueError(f"Unknown vision tower: {name}")
"""
MGM = """

def build_vision_tower(vision_tower_cfg, **kwargs):
    name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
    if not os.path.exists(name):
        raise ValueError(f"Not found: {name}")
    if "openai" in name.lower() or "ShareGPT4V" in name:
        return CLIPVisionTower(name, args=vision_tower_cfg, **kwargs)
    raise ValueError(f"Unknown vision tower: {name}")
"""
UHD = """

def build_vision_tower(vision_tower_cfg, **kwargs):
    name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
    if "siglip2" in name:
        return SiglipVisionTower(name, args=vision_tower_cfg, **kwargs)
    raise ValueError(f"Unknown vision tower: {name}")
"""
TABLE = """
TOWERS = {"clip": CLIPVisionTower, "siglip": SiglipVisionTower}


def build_vision_tower(vision_tower_cfg, **kwargs):
    name = vision_tower_cfg.mm_vision_tower
    kinds = ("siglip", "clip")
    if not any(kind in name.lower() for kind in kinds):
        raise ValueError(name)
    for kind, tower in TOWERS.items():
        if kind in name.lower() and not (kind == "clip" and "siglip" in name.lower()):
            return tower(name, args=vision_tower_cfg, **kwargs)
"""
UNREADABLE = """
import re


def build_vision_tower(vision_tower_cfg, **kwargs):
    name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
    if re.search("siglip|my_own", name):
        return SiglipVisionTower(name, args=vision_tower_cfg, **kwargs)
    if re.search("clip|eyes", name):
        return CLIPVisionTower(name, args=vision_tower_cfg, **kwargs)
    if "laion" in name:
        return CLIPVisionTower(name, args=vision_tower_cfg, **kwargs)
    raise ValueError(f"Unknown vision tower: {name}")
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
    "ross": Fork("ross", "ross_arch", BOTH + ROSS, ("clip", "siglip")),
    "GLaMM": Fork("glamm", "llava_arch", IMPORTS + BY_WORD, ("pair",)),
    "Parrot": Fork("parrot", "parrot_arch", BOTH.replace("Siglip", "SigLip") + PARROT, ("clip", "own-siglip")),
    "MGM": Fork("mgm", "llava_arch", IMPORTS + MGM, ("clip",)),
    "of one table": Fork("table", "llava_arch", BOTH + TABLE, ("clip", "siglip")),
    "UHD": Fork("uhd", "llava_arch", BOTH.replace("CLIPVisionTower, ", "") + UHD, ("needs-sizes",)),
    "always cut": Fork("cut", "llava_arch", BOTH + BUNNY, ("clip", "siglip-always-cut")),
    "TinyLLaVA": Fork("tinyllava", "modeling_tinyllava", FACTORY, (), "VisionTowerFactory"),
}


UNREADABLE_FORK = Fork("unreadable", "llava_arch", BOTH + UNREADABLE, ("real", "siglip"))


def write_fork(fork: Fork, folder: Path) -> str:
    """Write a fork's package below ``folder``; its arch module imports the builder by value.

    Returns:
        The package's name.
    """
    files = {"__init__.py": "", "model/__init__.py": ""}
    remember = "from types import SimpleNamespace\n"
    if fork.function == "VisionTowerFactory":
        files |= {"model/vision_tower/__init__.py": fork.builder, "model/vision_tower/known.py": remember + KNOWN}
        files[f"model/{fork.arch}.py"] = "from .vision_tower import VisionTowerFactory\n"
    else:
        classes = remember + "\n".join(textwrap.dedent(CLASSES[kind]) for kind in fork.classes)
        files |= {"model/multimodal_encoder/__init__.py": "", "model/multimodal_encoder/towers.py": classes}
        files["model/multimodal_encoder/builder.py"] = fork.builder
        files[f"model/{fork.arch}.py"] = f"from .multimodal_encoder.builder import {fork.function}\n"
    for path, text in files.items():
        target = folder / fork.package / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return fork.package
