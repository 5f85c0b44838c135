"""Memory of an lmms-eval model against the batch's size, beside what is counted.

Every size is a process of its own: it loads a LLaVA with random weights, answers one question so that libraries have
what they need, then one batch by likelihood and one in words. What its tensors held at once stands beside the count:
keys and values of all tokens, the widest layer's intermediates, the tower's. The whole is the process, or on a GPU all
tensors: a C library that keeps what it freed makes the process larger than its tensors.

    python benchmarks/mllm_memory.py                         # a CPU, a minute
    python benchmarks/mllm_memory.py --size 7b --output F    # a GPU with 40 GB
"""

# ruff: noqa: E402 - the path is set before the imports that need it
from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch
from measure import machine, peak_bytes
from mllm_eval import LLM_7B, VIT_L, documents, requests, serve, widen, write_model
from torch.profiler import ProfilerActivity, profile

from llava_genhancer import run

# A LLaVA that a CPU answers with in seconds, and whose images are as many tokens as LLaVA-1.5's.
LLM_SMALL = {**LLM_7B, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8}
LLM_SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
VIT_SMALL = {**VIT_L, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 12}
SHAPES = {
    "small": (LLM_SMALL, VIT_SMALL, torch.float32),
    "7b": ({**LLM_7B, "num_hidden_layers": 32}, VIT_L, torch.bfloat16),
}
NEW_TOKENS = 2
WAYS = ("likelihood", "words")


def counted(config: Any, batch: int, tokens: int, bytes_each: int) -> int:
    """Bytes that a batch adds at its peak, for one image a question and short options.

    The language model's pass holds all keys and values, the embeddings, the stream and its norm, and an MLP's three
    widest tensors; the tower's, which is over by then, the outputs of its layers and its MLP's two. Logits are few.
    """
    text, vision = config.text_config, config.vision_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kept = 2 * text.num_hidden_layers * heads * head_dim
    passing = 3 * text.hidden_size + 3 * text.intermediate_size
    layers = (vision.num_hidden_layers + 1) * vision.hidden_size
    seen = (vision.image_size // vision.patch_size) ** 2 * (layers + 2 * vision.intermediate_size)
    return batch * bytes_each * max(tokens * (kept + passing), seen)


# --- one size, in a process of its own ------------------------------------------------------------------------------


def tensors_peak(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors held at once while ``work`` ran, beyond those that they held before."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


def one_size(folder: Path, batch: int, device: torch.device) -> dict[str, Any]:
    """A batch of this size, by likelihood and in words."""
    from llava_genhancer.evaluate.mllm.model import LlavaGenhancer

    ours = LlavaGenhancer(str(folder), device=str(device), batch_size=batch)
    docs = documents(batch)
    found: dict[str, Any] = {}
    for way in WAYS:
        ours.by_likelihood = way == "likelihood"
        serve(ours, docs[:1], requests(docs[:1], NEW_TOKENS))
        found[way] = tensors_peak(lambda: serve(ours, docs, requests(docs, NEW_TOKENS)), device)
    respondent = ours.respondent
    tokens = max(len(respondent._prompt(f"<image>\n{r.args[0]}")) for r in requests(docs, NEW_TOKENS)) + NEW_TOKENS
    return {
        "tensor_bytes": found,
        "counted_bytes": counted(respondent.model.config, batch, tokens, respondent.model.dtype.itemsize),
        "weight_bytes": sum(p.numel() * p.element_size() for p in respondent.model.parameters()),
        "peak_bytes": peak_bytes(device),
        "tokens": tokens,
    }


# --- all sizes ------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The result for reading."""
    lines = ["batch    likelihood         words       counted     the whole"]
    for batch, row in result["batches"].items():
        sizes = [*row["tensor_bytes"].values(), row["counted_bytes"], row["peak_bytes"]]
        lines.append(f"{batch:>5}" + "".join(f"{size / 2**20:>10.0f} MiB" for size in sizes))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure every size, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=tuple(SHAPES), default="small")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--output", metavar="JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # a size of its own: the weights are there
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.folder:
        found = one_size(args.folder, args.batches[0], device)
        run.write_json(args.output, found)
        return found
    sizes = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(Path(scratch) / "llava")
        widen(folder, *SHAPES[args.size])
        for batch in args.batches:
            output = Path(scratch) / f"{batch}.json"
            words = ["--folder", str(folder), "--batches", str(batch), "--device", str(device), "--output", str(output)]
            subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True)
            sizes[str(batch)] = run.read_json(output)
    result = {"size": args.size, "batches": sizes, "machine": machine(device)}
    print(table(result))
    if args.output:
        run.write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
