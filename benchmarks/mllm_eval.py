"""Questions per second of an lmms-eval model: by likelihood, in words, and through lmms-eval's own class.

One folder of weights and the same documents for all, in one process; they take turns, so that a busy machine is busy
for each of them. What is timed is `generate_until`, from documents to replies. lmms-eval's `llava_hf` answers one
question at a time and has no likelihood of options.

    python benchmarks/mllm_eval.py                           # a CPU, about two minutes
    python benchmarks/mllm_eval.py --size 7b --output F      # a GPU with 40 GB: LLaVA-1.5-7B's shape, random weights
"""

# ruff: noqa: E402 - the path is set before the imports that need it
from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # works uninstalled: `measure` beside this file, the package above it

import torch
from measure import machine, summary, timed

from llava_genhancer import run

TASK, SPLIT = "mmvp", "train"
PROMPT = "{}\nA. {}\nB. {}\nAnswer with the option's letter from the given choices directly."
SETTINGS = {"temperature": 0, "do_sample": False}
# At 7B's shape random weights never end an answer; a trained model's is a letter and the end.
NEW_TOKENS = {"tiny": 16, "7b": 2}
LLM_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
LLM_7B |= {"head_dim": 128, "max_position_embeddings": 4096, "vocab_size": 32064}
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
VIT_L |= {"image_size": 336, "patch_size": 14}
THEIRS = "lmms-eval's llava_hf"


# --- what is measured ---------------------------------------------------------------------------------------------


def write_model(folder: Path) -> Path:
    """The toy world's language model, which ends its answers, as a LLaVA in HF's form; the projector is random."""
    from llava_genhancer.llava.checkpoint import Checkpoint, raw_config
    from llava_genhancer.llava.hf import write_hf
    from llava_genhancer.llava.model import build_projector, llava_config, load_llm
    from llava_genhancer.llava.recipes import LlavaRecipe

    recipe = LlavaRecipe(llm="toyworld:llama", tower="toyworld:clip")
    checkpoint = Checkpoint(
        llm_config=raw_config(recipe.llm),
        companions=recipe.llm,
        tower=recipe.tower,
        language=load_llm(recipe.llm, torch.float32).state_dict(),
        projector=build_projector(llava_config(recipe)).state_dict(),
        conversation="v1",
        image_mode="pad",
        vision_feature_layer=-2,
        dtype=torch.float32,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_hf(checkpoint, folder)
    return folder


def widen(folder: Path, llm: dict[str, int], vision: dict[str, int], dtype: torch.dtype) -> None:
    """Random weights of another shape in the place of the tiny ones; the tokenizer stays."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_pretrained(folder)
    for part, shape in ((config.text_config, llm), (config.vision_config, vision)):
        for name, value in shape.items():
            setattr(part, name, value)
    config.image_seq_length = (vision["image_size"] // vision["patch_size"]) ** 2
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    sizes: dict[str, Any] = {"crop_size": {"height": vision["image_size"], "width": vision["image_size"]}}
    sizes["size"] = {"shortest_edge": vision["image_size"]}
    for name, change in (
        ("preprocessor_config.json", sizes),
        ("processor_config.json", {"patch_size": vision["patch_size"]}),
    ):
        run.write_json(folder / name, {**run.read_json(folder / name), **change})


def documents(count: int) -> list[dict[str, Any]]:
    """Drawn pictures of MMVP's size, and questions of several lengths with two options."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    docs = []
    for i in range(count):
        pixels = torch.rand(1, 3, 7, 7, generator=generator)
        pixels = torch.nn.functional.interpolate(pixels, size=(224, 224), mode="bilinear")[0]
        array = (pixels * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        question = [
            "Is the critter red or blue?",
            "Where is the star?",
            "Which way does the beak point in this picture?",
        ]
        docs.append({"text": question[i % 3], "Options": "(a) left (b) right", "image": Image.fromarray(array)})
    return docs


def requests(docs: list[dict[str, Any]], new_tokens: int) -> list[Any]:
    """As lmms-eval's task hands them to a model; its own class changes the settings in them, so each gets a copy."""
    from lmms_eval.api.instance import Instance

    def images(doc: dict[str, Any]) -> list[Any]:
        return [doc["image"]]

    facts = {"task": TASK, "doc_id": 0, "repeats": 1}
    asked = []
    for number, doc in enumerate(docs):
        text = PROMPT.format(doc["text"], "left", "right")
        arguments = (text, {"max_new_tokens": new_tokens, **SETTINGS}, images, number, TASK, SPLIT)
        asked.append(Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=facts))
    return asked


def serve(model: Any, docs: list[dict[str, Any]], asked: list[Any]) -> list[str]:
    """A model's replies."""
    model.task_dict = {TASK: {SPLIT: docs}}
    replies: list[str] = model.generate_until(asked)
    return replies


def llava_hf(folder: Path, device: torch.device) -> Any:
    """lmms-eval's class for such a folder. For videos it imports a reader that lmms-eval does not bring."""
    if importlib.util.find_spec("decord") is None:
        stand_in = types.ModuleType("decord")
        stand_in.VideoReader = stand_in.cpu = None  # type: ignore[attr-defined]
        sys.modules["decord"] = stand_in
    from lmms_eval.models.simple.llava_hf import LlavaHf

    return LlavaHf(str(folder), device=str(device), device_map=str(device))


def measure(folder: Path, docs: list[dict[str, Any]], args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds for all documents, by each way of answering, in turns."""
    from llava_genhancer.evaluate.mllm.model import LlavaGenhancer

    ours = LlavaGenhancer(str(folder), device=str(device))
    theirs = llava_hf(folder, device)
    replies: dict[str, list[str]] = {}

    def way(name: str, model: Any, *, likelihood: bool = False, batch: int = 1) -> Callable[[], None]:
        def answer() -> None:
            if model is ours:
                ours.by_likelihood, ours.batch_size = likelihood, batch
            replies[name] = serve(model, docs, requests(docs, NEW_TOKENS[args.size]))

        return answer

    ways = {}
    for kind in ("likelihood", "words"):
        for batch in args.batches:
            name = f"{kind}, batch {batch}"
            ways[name] = way(name, ours, likelihood=kind == "likelihood", batch=batch)
    ways[THEIRS] = way(THEIRS, theirs)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.repeats + 1):  # the first warms up
        for name, answer in ways.items():
            taken = timed(answer, device, repeats=1, warmup=0)
            seconds[name] += taken if turn else []
    first = args.batches[0]
    same = [a == b.strip() for a, b in zip(replies[f"words, batch {first}"], replies[THEIRS], strict=True)]
    chosen = [replies[f"likelihood, batch {batch}"] for batch in args.batches]
    rates = {name: len(docs) / statistics.median(times) for name, times in seconds.items()}
    return {
        "ways": {name: summary(times) | {"questions_per_second": rates[name]} for name, times in seconds.items()},
        "times_llava_hf": {  # of each turn: what else the machine did then, both met
            name: statistics.median(b / a for a, b in zip(times, seconds[THEIRS], strict=True))
            for name, times in seconds.items()
        },
        "same_words_as_llava_hf": sum(same) / len(same),
        "same_answer_in_batches": all(answers == chosen[0] for answers in chosen),
        "letters_a_reply": statistics.mean(map(len, replies[THEIRS])),
    }


# --- showing ------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The result for reading."""
    lines = [f"{'':26}{'questions/s':>14}{'times llava_hf':>16}"]
    for name, way in result["ways"].items():
        lines.append(f"{name:26}{way['questions_per_second']:>14.1f}{result['times_llava_hf'][name]:>16.2f}")
    return "\n".join(
        [
            *lines,
            f"llava_hf's words are ours in {result['same_words_as_llava_hf']:.0%} of {result['questions']} questions; "
            f"a reply has {result['letters_a_reply']:.1f} letters",
        ]
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=tuple(NEW_TOKENS), default="tiny")
    parser.add_argument("--layers", type=int, default=32, help="of the language model with --size 7b (default: 32)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--questions", type=int, default=96, help="default: 96")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="questions at a time (default: 1 2 4 8 16)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns that count (default: 7)")
    parser.add_argument("--output", metavar="JSON", help="write the figures here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON."""
    args = parse(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(Path(scratch))
        if args.size == "7b":
            widen(folder, {**LLM_7B, "num_hidden_layers": args.layers}, VIT_L, torch.bfloat16)
        result = {
            "size": args.size,
            "questions": args.questions,
            "batches": args.batches,
            "machine": machine(device),
            **measure(folder, documents(args.questions), args, device),
        }
    print(table(result))
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        run.write_json(Path(args.output), result)
    return result


if __name__ == "__main__":
    main()
