"""What the chain's steps need: LLaVA's data and where they come from, GPU memory, disk."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llava_genhancer.errors import InputError
from llava_genhancer.llava.recipes import LlavaRecipe

LLAVA_DATA = Path("playground/data")  # where LLaVA's own scripts look
FINETUNE_IMAGES = (
    "coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2",
)  # fmt: skip
TINY_NEEDS = "no GPU and no download; about 70 MB in the run folder and 90 MB in the cache folder"  # measured
# What the hub's listings say of size, and how many questions of it are asked.
BENCHMARKS = {
    "lmms-lab-eval/MMVP": "300 questions",
    "nyu-visionx/CV-Bench": "407 MB, 2,638 questions",
    "BaiqiL/NaturalBench-lmms-eval": "7,600 questions",
    "lmms-lab-encoder/POPE": "510 MB, 9,000 questions",
    "lmms-lab-encoder/ScienceQA": "1.3 GB, 2,017 questions",
    "lmms-lab-encoder/HallusionBench": "147 MB, 951 questions",
}
PARAMETERS = {"vicuna-7b": 6_738_415_616, "vicuna-13b": 13_015_864_320}


@dataclass(frozen=True)
class Data:
    """A JSON of LLaVA's and the root of its image paths, with the folders in it and the commands that fetch them."""

    json: Path
    images: Path
    folders: tuple[str, ...] = (".",)
    downloads: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """What of it is not there."""
        folders = [self.images / folder for folder in self.folders]
        return [str(self.json)] * (not self.json.is_file()) + [str(f) for f in folders if not f.is_dir()]


def check_lmms_eval() -> None:
    """Before hours are spent on what it is to measure.

    Raises:
        InputError: lmms-eval is not installed.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise InputError(
            "lmms-eval is not installed, and the chain ends with it: pip install -e '.[eval]' in a clone of "
            "llava_genhancer"
        )


def llava_data(preset: str, root: Path | None) -> dict[str, Data]:
    """The data of both trainings, in LLaVA's own layout below ``root``; the toy world brings its own."""
    if preset == "tiny" and root is None:
        from llava_genhancer.toyworld.paths import cache_folder

        world = cache_folder() / "llava"
        return {name: Data(world / f"{name}.json", world / "images") for name in ("pretrain", "finetune")}
    root = root or LLAVA_DATA
    pretrain = root / "LLaVA-Pretrain"
    return {
        "pretrain": Data(
            pretrain / "blip_laion_cc_sbu_558k.json",
            pretrain / "images",
            downloads=(
                f"hf download liuhaotian/LLaVA-Pretrain --repo-type dataset --local-dir {pretrain}",
                f"unzip -q {pretrain}/images.zip -d {pretrain}/images",
            ),
        ),
        "finetune": Data(root / "llava_v1_5_mix665k.json", root, FINETUNE_IMAGES, tuple(_finetune_downloads(root))),
    }


def _finetune_downloads(root: Path) -> list[str]:
    """Sizes are rounded from the archives' listings."""

    def unpacked(url: str, folder: str, size: str) -> str:
        archive = f"{root}/{folder}-{Path(url).name}"
        return f"wget -c {url} -O {archive} && unzip -q {archive} -d {root}/{folder}  # {size}"

    genome = "https://cs.stanford.edu/people/rak248/VG_100K_2"
    return [
        "hf download liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json --repo-type dataset "
        f"--local-dir {root}  # 1 GB",
        unpacked("http://images.cocodataset.org/zips/train2017.zip", "coco", "19 GB"),
        unpacked("https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", "gqa", "22 GB"),
        unpacked("https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", "textvqa", "7 GB"),
        unpacked(f"{genome}/images.zip", "vg", "10 GB"),
        unpacked(f"{genome}/images2.zip", "vg", "5 GB"),
        f"# ocr_vqa: loadDataset.py of https://ocr-vqa.github.io, every image as .jpg into {root}/ocr_vqa/images",
    ]


def needs(
    step: str, preset: str, llava: LlavaRecipe, data: Mapping[str, Data], benchmarks: Path | None = None
) -> list[str]:
    """Lines for the plan: memory, disk, and data that are not there yet with how to get them.

    Args:
        benchmarks: the folder of the benchmarks' local copies, if lmms-eval is to take those.
    """
    if preset == "tiny":
        return []
    if step.startswith("baseline-"):
        return [f"needs the same as {step.removeprefix('baseline-')}"]
    if step == "enhance":
        return ["needs memory and disk as `llava-genhancer doctor openai-l14-336` predicts them for this machine"]
    if step == "lmms":
        return _benchmarks(benchmarks)
    if step not in data:
        return []
    lines = _memory(step, PARAMETERS[preset], llava)
    if missing := data[step].missing():
        lines.append(f"needs {', '.join(missing)}, not there yet:")
        lines += [f"  {command}" for command in data[step].downloads]
    return lines


def _benchmarks(folder: Path | None) -> list[str]:
    if folder is None:
        return [
            "downloads these sets from the hub on first use; or get them beforehand, and add --lmms_data DIR:",
            *(f"  {line}" for line in _benchmark_downloads(Path("DIR"), BENCHMARKS)),
        ]
    missing = [name for name in BENCHMARKS if not (folder / name).is_dir()]
    if not missing:
        return []
    return [
        f"needs {', '.join(str(folder / name) for name in missing)}, not there yet:",
        *(f"  {line}" for line in _benchmark_downloads(folder, missing)),
    ]


def _benchmark_downloads(folder: Path, names: Iterable[str]) -> list[str]:
    return [
        f"hf download {name} --repo-type dataset --local-dir {folder / name}  # {BENCHMARKS[name]}" for name in names
    ]


def _memory(step: str, parameters: int, llava: LlavaRecipe) -> list[str]:
    """Counted from the parameters, not measured; activations come on top."""
    width = 2 if llava.precision == "bf16" else 4
    weights = f"{width * parameters / 1e9:.0f} GB"
    if step == "pretrain":
        return [
            f"needs {weights} of GPU memory for the frozen {llava.precision} language model, and its activations; a "
            "few GB of disk"
        ]
    if llava.lora_rank:
        return [
            f"{weights} of GPU memory for the frozen {llava.precision} weights, shared by the GPUs under ZeRO-3, and "
            "activations"
        ]
    # Weights and gradients, fp32 masters and AdamW's two moments; a checkpoint keeps all but the gradients.
    kept = llava.keep_checkpoints + 1
    return [
        f"needs {(2 * width + 12) * parameters / 1e9:.0f} GB of GPU memory over all GPUs under ZeRO-3, and activations",
        f"needs {((width + 12) * kept + 8) * parameters / 1e9:.0f} GB of disk for {kept} checkpoints and the exports",
    ]
