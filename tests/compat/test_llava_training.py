"""The original LLaVA (llava-torch) pretrains, finetunes and answers on our towers (`make test-compat`).

Untouched with a CLIP tower; started through `llava_genhancer.launch` with a SigLIP tower, which it cannot load itself.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

PYTHON = os.environ.get("LLAVA_GENHANCER_COMPAT_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs old LLaVA's environment: make test-compat")
HERE = Path(__file__).parent
TOLERANCE = 1e-5  # largest absolute difference, fp32
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(HERE.parents[1]),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "PATH": f"{Path(PYTHON or '').parent}:{os.environ['PATH']}",  # DeepSpeed looks for ninja there
}
UNTOUCHED = [str(HERE / "old_llava.py"), "train"]
LAUNCHED = ["-m", "llava_genhancer.launch", "llava.train.train"]
STEPS = 4


def call(*command: str | Path) -> str:
    done = subprocess.run(
        [str(PYTHON), *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a sentencepiece vocabulary that has Llama's special tokens, and bytes for all else."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("llm") / "tiny-llama"
    folder.mkdir()
    text = "a chat between a curious user and an assistant what is this red blue green ball cube on the table"
    words = text.split()
    (folder / "words.txt").write_text("\n".join(" ".join(words[i:] + words[:i]) for i in range(len(words))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        minloglevel=2,
    )
    call(HERE / "old_llava.py", "llm", folder)
    return folder


@pytest.fixture(scope="module")
def data(images_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA's two JSONs: captions, and conversations of which every third has no image."""
    folder = tmp_path_factory.mktemp("data")
    captions, talks = [], []
    for i, image in enumerate(sorted(p.name for p in images_folder.iterdir())[:24]):
        said = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": f"a red ball {i}"}]
        captions.append({"id": str(i), "image": image, "conversations": said})
        alone = [{"from": "human", "value": "Is a cube blue?"}, {"from": "gpt", "value": "on the table"}]
        talks.append({"id": str(i), "conversations": alone} if i % 3 == 0 else captions[-1])
    (folder / "pretrain.json").write_text(json.dumps(captions))
    (folder / "finetune.json").write_text(json.dumps(talks))
    return folder


def arguments(stage: str, llm: Path, tower: Path, data: Path, images: Path, output: Path) -> list[str]:
    """scripts/v1_5's arguments, for a CPU and a few steps."""
    fields = {
        "model_name_or_path": llm,
        "vision_tower": tower,
        "data_path": data / f"{stage}.json",
        "image_folder": images,
        "output_dir": output / f"llava-tiny-{stage}",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "bf16": True,
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "model_max_length": 256,
        "gradient_checkpointing": True,
        "lazy_preprocess": True,
        "report_to": "none",
        "logging_steps": 1,
    }
    if stage == "pretrain":
        fields |= {"version": "plain", "tune_mm_mlp_adapter": True}
    else:
        projector = output / "llava-tiny-pretrain" / "mm_projector.bin"
        fields |= {"version": "v1", "pretrain_mm_mlp_adapter": projector, "image_aspect_ratio": "pad"}
        fields |= {"group_by_modality_length": True}
    return [part for name, value in fields.items() for part in (f"--{name}", str(value))]


@torch.no_grad()
@pytest.mark.parametrize(("family", "start"), [("CLIP", UNTOUCHED), ("Siglip", LAUNCHED)])
def test_llava_trains_and_answers(
    family: str, start: list[str], llm: Path, data: Path, images_folder: Path, tmp_path: Path, request
) -> None:
    import transformers

    from llava_genhancer.tower.export import save_tower
    from llava_genhancer.toyworld.models import save_siglip

    source = request.getfixturevalue("tiny_clip") if family == "CLIP" else save_siglip(tmp_path / "original")
    full = getattr(transformers, f"{family}Model").from_pretrained(source, dtype=torch.float32).eval()
    tower = save_tower(full, tmp_path / "tower", source=str(source), marker={})

    for stage in ("pretrain", "finetune"):
        said = call(*start, *arguments(stage, llm, tower, data, images_folder, tmp_path))
        losses = [float(part.split(",")[0]) for part in said.split("{'loss': ")[1:]]
        assert len(losses) == STEPS
        assert all(0 < loss < 20 for loss in losses), losses

    # The projector learned twice, the language model once; the tower is ours to the bit, in LLaVA's bf16.
    first = torch.load(tmp_path / "llava-tiny-pretrain" / "mm_projector.bin", weights_only=True)
    final: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "llava-tiny-finetune").glob("*.safetensors"):
        final |= load_file(path)
    assert sorted(first) == [f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")]
    for name, value in first.items():
        assert not torch.equal(final[name], value.to(final[name].dtype)), f"{name} did not learn in finetuning"
    before = load_file(llm / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(final[name], before[name].to(final[name].dtype))
    ours = {f"model.vision_tower.vision_tower.vision_model.{n}": v for n, v in full.vision_model.state_dict().items()}
    ours = {n: v for n, v in ours.items() if not n.endswith("position_ids")}
    assert {n for n in final if ".vision_tower." in n} == set(ours)
    for name, value in ours.items():
        assert torch.equal(final[name], value.to(final[name].dtype)), name

    side = full.config.vision_config.image_size
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
    pixels = torch.randn(3, 3, side, side, generator=generator)
    save_file({"image": image, "pixel_values": pixels}, tmp_path / "inputs.safetensors")
    files = [tmp_path / "inputs.safetensors", tmp_path / "outputs.safetensors"]
    registered = ["register"] if start is LAUNCHED else []
    said = call(HERE / "old_llava.py", "look", tmp_path / "llava-tiny-finetune", *files, *registered)
    report = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    towers = {"CLIP": "llava.model.multimodal_encoder.clip_encoder.CLIPVisionTower"}
    assert report["classes"][0] == towers.get(family, "llava_genhancer.tower.tower.VisionTower")
    assert report["arguments"] == "llava.train.train.TrainingArguments"  # its pickle opens in another process

    outputs = load_file(tmp_path / "outputs.safetensors")
    expected = full.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    expected = expected[:, 1:] if family == "CLIP" else expected
    assert outputs["features"].shape == expected.shape
    assert float((outputs["features"] - expected).abs().max()) <= TOLERANCE
    processor = getattr(transformers, f"{family}ImageProcessor").from_pretrained(tower)
    processed = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])
    assert float((outputs["processed"] - processed.half().float()).abs().max()) <= 2e-3
    assert outputs["tokens"].shape[1] > 0


def test_untouched_llava_refuses_a_siglip_folder(llm: Path, data: Path, images_folder: Path, tmp_path: Path) -> None:
    """Why register() is needed: LLaVA takes any folder for a CLIP."""
    from transformers import SiglipModel

    from llava_genhancer.tower.export import save_tower
    from llava_genhancer.toyworld.models import save_siglip

    source = save_siglip(tmp_path / "original")
    tower = save_tower(SiglipModel.from_pretrained(source), tmp_path / "tower", source=str(source), marker={})
    command = [str(PYTHON), *UNTOUCHED, *arguments("pretrain", llm, tower, data, images_folder, tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr or "mismatched" in done.stderr, done.stderr[-2000:]


def test_the_deepspeed_launcher_starts_two_ranks(llm: Path, data: Path, images_folder: Path, tmp_path: Path) -> None:
    """It puts --local_rank before the trainer's name. (On a CPU, accelerate 0.28 keeps DeepSpeed's engine out.)"""
    from transformers import SiglipModel

    from llava_genhancer.resources import resource_dir
    from llava_genhancer.tower.export import save_tower
    from llava_genhancer.toyworld.models import save_siglip

    source = save_siglip(tmp_path / "original")
    tower = save_tower(SiglipModel.from_pretrained(source), tmp_path / "tower", source=str(source), marker={})
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--module", *LAUNCHED[1:]]
    zero = ["--deepspeed", resource_dir("configs") / "deepspeed" / "zero2.json"]
    call(*launcher, *zero, *arguments("pretrain", llm, tower, data, images_folder, tmp_path))
    assert (tmp_path / "llava-tiny-pretrain" / "mm_projector.bin").is_file()
