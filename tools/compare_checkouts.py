"""Compare what two checkouts of this repository compute, bit for bit, on one machine.

    python tools/compare_checkouts.py BASE NOW [--output DIR] [--only enhance,llava] [--python .venv/bin/python]

Each checkout runs the same short commands in the toy world, with its own package first on PYTHONPATH, its own cache and
its own scratch folder. What they leave is read from the files: hashes of every trained and exported tensor, losses,
MMVP-VLM and zero-shot answers, lmms-eval metrics on fixed replies, recipes, doctor's counts, and the report's numbers.
The differences are printed, one line each; the exit status is 1 where there is one.

Only command lines and result files are used, so that the code behind them can move. Where a setting or a file was
renamed between the two checkouts, its old name goes into RENAMED, which is applied to the older side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

METHODS = ("flow", "masked", "diva", "dcr", "flux")
LMMS_REPLIES = ("A", "(b)", "Yes", "no", "The answer is A. Option B is wrong.")
# Older name of a setting to its name today.
RENAMED: dict[str, str] = {}
# Values that differ between two runs of the same code.
VOLATILE = re.compile(
    r"seconds|_per_second|time|path|versions|command|git|sha256|created|date|memory|folder|output|revision|hash"
)
SHORT = {
    "stage1.max_steps": "6", "stage2.max_steps": "4", "stage2.snapshot_steps": "2", "stage1.warmup_steps": "0",
    "stage1.save_steps": "2", "stage2.save_steps": "2", "stage1.log_steps": "1", "stage2.log_steps": "1",
    "stage1.sample_steps": "4", "stage2.sample_steps": "4", "sample_images": "2", "sample_ode_steps": "2",
    "num_workers": "1", "global_batch_size": "8", "per_device_batch_size": "4",
}  # fmt: skip
SHORT_LLAVA = {
    "pretrain.max_steps": "4", "finetune.max_steps": "4", "num_workers": "0",
    "pretrain.global_batch_size": "4", "pretrain.per_device_batch_size": "2",
    "finetune.global_batch_size": "4", "finetune.per_device_batch_size": "2",
}  # fmt: skip


class Checkout:
    """One checkout at work: runs its commands and reads its settings.

    Args:
        code: the checkout's folder.
        python: the interpreter with the packages that both checkouts need.
        scratch: folder for everything it writes.
    """

    def __init__(self, code: Path, python: Path, scratch: Path):
        self.code, self.python, self.scratch = code, python, scratch
        scratch.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(code),
            "LLAVA_GENHANCER_CACHE": str(scratch / "cache"),
            "HF_HOME": str(scratch / "hf_home"),
            "LMMS_EVAL_DATASETS_CACHE": str(scratch / "datasets"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.settings = json.loads(self.run("recipes", "--json"))

    def start(self, *words: str, module: str = "llava_genhancer") -> subprocess.Popen[str]:
        """Start ``python -m MODULE WORDS`` in the scratch folder, in a process group of its own."""
        return subprocess.Popen(
            [str(self.python), "-m", module, *words],
            cwd=self.scratch,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, module: str = "llava_genhancer", statuses: Sequence[int] = (0,)) -> str:
        """Run a command to its end and return its standard output; any other exit status ends the comparison."""
        process = self.start(*words, module=module)
        out, err = process.communicate()
        if process.returncode not in statuses:
            sys.exit(f"{self.code}: {module} {' '.join(words)} ended with {process.returncode}:\n{err[-3000:]}")
        return out

    def options(self, values: dict[str, str], known: dict[str, Any] | None = None) -> list[str]:
        """``--name value`` for each setting, under the name that this checkout has for the setting."""
        older = {new: old for old, new in RENAMED.items()}
        words = []
        for name, value in values.items():
            if known is not None and name not in known and older.get(name) in known:
                name = older[name]
            words.append(f"--{name}={value}")
        return words

    def toy(self, name: str) -> str:
        """A folder of the rendered toy world."""
        (found,) = (self.scratch / "cache").glob(f"*/{name}")
        return str(found)


def tensors(file: Path) -> dict[str, str]:
    """A hash of dtype, shape and bits for every tensor in a safetensors file; empty where the file is missing."""
    import torch
    from safetensors import safe_open

    if not file.is_file():
        return {"missing": str(file.name)}
    found = {}
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - a safetensors file has no __iter__
            value = opened.get_tensor(name)
            bits = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            text = f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(bits).hexdigest()[:12]}"
            found[name] = text
    return found


def folder_tensors(folder: Path) -> dict[str, str]:
    """The tensors of all safetensors files of a model folder, whatever their split."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in tensors(file).items()}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value in nested lists and dicts with its path; values that differ from run to run are left out."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not VOLATILE.search(str(name)):
                yield from leaves(inner, f"{path}/{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}/{number}")
    else:
        yield path, value


def read(file: Path) -> Any:
    """A JSON file's values by path, folder names of the checkout removed."""
    return dict(leaves(json.loads(file.read_text())))


# --- what is compared ---------------------------------------------------------------------------------------------


def recipes(it: Checkout) -> dict[str, Any]:
    """All settings of all recipes, with every method's suffix and of LLaVA's presets."""
    found: dict[str, Any] = {"llava": {}}
    for backbone in it.settings:
        for method in METHODS:
            values = json.loads(it.run("recipes", f"{backbone}-{method}", "--json"))
            found[f"{backbone}-{method}"] = {RENAMED.get(name, name): value for name, value in values.items()}
    for preset in ("tiny", "vicuna-7b", "vicuna-13b", "vicuna-7b-lora"):
        values = json.loads(it.run("llava", "recipes", preset, "--json"))
        found["llava"][preset] = {RENAMED.get(name, name): value for name, value in values.items()}
    return found


def doctor(it: Checkout) -> dict[str, Any]:
    """Doctor's counts for every backbone and every method, sorted, without the free space of this moment."""
    found = {}
    for name in [*it.settings, *(f"openai-l14-224-{method}" for method in METHODS)]:
        text = " ".join(it.run("doctor", name, "--gpus", "8", statuses=(0, 1)).split())
        counts = re.findall(r"([\d.]+) (GiB|EFLOP|PFLOP|TFLOP)\b(?! (?:free|available))", text)
        found[name] = sorted(f"{number} {unit}" for number, unit in counts)
    return found


def enhance(it: Checkout) -> dict[str, Any]:
    """Each method's short run: losses, counts, trained tensors of both stages, tower; one run is killed and resumed."""
    found: dict[str, Any] = {}
    known = it.settings["tiny"]
    for method in METHODS:
        words = ("enhance", f"tiny-{method}", *it.options(SHORT, known))
        it.run(*words, "--output_dir", f"run-{method}")
        found[method] = _run_folder(it.scratch / f"run-{method}")
    words = ("enhance", "tiny-flow", *it.options(SHORT, known), "--output_dir", "run-killed")
    process = it.start(*words)
    while process.poll() is None and not (it.scratch / "run-killed/stage1/checkpoint-2/complete.json").exists():
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    it.run(*words)
    killed = _run_folder(it.scratch / "run-killed")
    found["killed and resumed equals whole"] = {part: killed[part] == found["flow"][part] for part in killed}
    return found


def _run_folder(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"tower": folder_tensors(run / "tower")}
    for stage in ("stage1", "stage2"):
        if (run / stage / "result.json").is_file():
            result[stage] = tensors(run / stage / "weights.safetensors")
            result[f"{stage} result"] = read(run / stage / "result.json")
            result[f"{stage} losses"] = read(run / stage / "log_history.json")
    return result


def measures(it: Checkout) -> dict[str, Any]:
    """Answers of the original and the enhanced tower: MMVP-VLM pairs, zero-shot sets, probes, generation."""
    run = it.scratch / "run-flow"
    found = {}
    verbs = {
        "mmvp-vlm": ("--data", it.toy("mmvp_test")), "zero-shot": ("--data", it.toy("zero_shot_test")), "probes": (),
    }  # fmt: skip
    for verb, more in verbs.items():
        file = run / "eval" / f"{verb.replace('-', '_')}.json"
        it.run(verb, "toyworld:clip", "run-flow/tower", *more, "--output", str(file.relative_to(it.scratch)))
        found[verb] = read(file)
    it.run("generation", "run-flow", "--data", it.toy("mmvp_test"))
    found["generation"] = read(run / "eval" / "generation.json")
    return found


def llava(it: Checkout) -> dict[str, Any]:
    """Short pretraining and finetuning with the enhanced tower: losses, both exports' tensors, greedy replies."""
    run = it.scratch / "run-flow"
    for stage in ("pretrain", "finetune"):
        it.run("llava", stage, "tiny", "--output_dir", "run-flow", "--tower=run-flow/tower", *it.options(SHORT_LLAVA))
    found: dict[str, Any] = {}
    for stage in ("llava-pretrain", "llava-finetune"):
        found[stage] = tensors(run / stage / "weights.safetensors")
        found[f"{stage} losses"] = read(run / stage / "log_history.json")
        found[f"{stage} result"] = read(run / stage / "result.json")
    image = f"{it.toy('questions_test')}/images/000000.jpg"
    for form in ("hf", "llava"):
        folder = run / "llava-finetune" / form
        found[form] = folder_tensors(folder)
        found[f"{form} files"] = sorted(p.name for p in folder.iterdir())
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                found[f"{form} {name}"] = read(folder / name)
        question = ("--question", "What colour is the critter?", "--max_new_tokens", "8")
        found[f"{form} reply"] = it.run("llava", "chat", str(folder), image, *question)
    it.run("llava", "import", "run-flow/llava-finetune/llava", "--output_dir", "imported")
    found["imported"] = folder_tensors(it.scratch / "imported")
    tokens = run / "llava-finetune" / "hf" / "tokenizer.json"
    found["tokenizer"] = hashlib.sha256(tokens.read_bytes()).hexdigest() if tokens.is_file() else None
    return found


def lmms(it: Checkout) -> dict[str, Any]:
    """lmms-eval's metrics on the toy world's copies of Table 2's sets: fixed replies, then our likelihood answers."""
    it.environment["LLAVA_GENHANCER_DATA"] = it.toy("benchmarks")
    found = {}
    for number, reply in enumerate(LMMS_REPLIES):
        model = ("--model", "dummy", "--model_args", f"response={reply.replace(',', ' ')}")
        it.run("--tasks", "genhancer", *model, "--output_path", f"lmms-{number}", module="lmms_eval")
        (file,) = (it.scratch / f"lmms-{number}").rglob("*_results.json")
        found[reply] = dict(leaves(json.loads(file.read_text())["results"]))
    folder = ("run-flow/llava-finetune/hf", "--data", it.toy("benchmarks"), "--batch_size", "4", "--limit", "8")
    it.run("mllm", *folder, "--labels", "enhanced", "--output_dir", "run-flow/eval/lmms")
    for file in sorted((it.scratch / "run-flow/eval/lmms").rglob("*_results.json")):
        found["ours"] = dict(leaves(json.loads(file.read_text())["results"]))
    return found


def report(it: Checkout) -> dict[str, Any]:
    """All numbers of report.json, as a sorted list: the file's structure may change, its numbers may not."""
    it.run("report", "run-flow")
    values = read(it.scratch / "run-flow/report.json")
    numbers = [v for v in values.values() if isinstance(v, int | float) and not isinstance(v, bool)]
    return {"numbers": sorted({repr(round(float(v), 6)) for v in numbers})}


PARTS: dict[str, Callable[[Checkout], dict[str, Any]]] = {
    "recipes": recipes, "doctor": doctor, "enhance": enhance, "measures": measures, "llava": llava, "lmms": lmms,
    "report": report,
}  # fmt: skip


def differences(base: Any, now: Any, path: str = "") -> Iterator[str]:
    """One line per value that only one side has or that differs."""
    if isinstance(base, dict) and isinstance(now, dict):
        for name in sorted({*base, *now}, key=str):
            if name not in base or name not in now:
                side, value = ("now", now.get(name)) if name in now else ("base", base.get(name))
                yield f"{path}/{name}: only in {side}: {str(value)[:80]}"
            else:
                yield from differences(base[name], now[name], f"{path}/{name}")
    elif isinstance(base, list) and isinstance(now, list):
        lost, new = [v for v in base if v not in now], [v for v in now if v not in base]
        if lost or new or len(base) != len(now):
            yield f"{path}: only in base {lost[:8]}, only in now {new[:8]}"
    elif base != now:
        yield f"{path}: {str(base)[:80]} -> {str(now)[:80]}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", type=Path, help="the older checkout's folder")
    parser.add_argument("now", type=Path, help="the newer checkout's folder")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="scratch folder of both")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated; later parts read earlier runs")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter with all packages")
    args = parser.parse_args(argv)
    chosen = args.only.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]}: choose some of {', '.join(PARTS)}")
    python = args.python.absolute()  # not resolved: an environment's interpreter is a link
    sides = {
        name: Checkout(code.resolve(), python, args.output.resolve() / name)
        for name, code in (("base", args.base), ("now", args.now))
    }
    failed = 0
    for part in chosen:
        started = time.monotonic()
        found = {}
        for name, side in sides.items():
            stored = side.scratch / f"{part}.json"
            if not stored.is_file():
                text = json.dumps(PARTS[part](side), indent=1, default=str)
                stored.write_text(text.replace(str(side.scratch), "SCRATCH"))
            found[name] = json.loads(stored.read_text())
        lines = list(differences(found["base"], found["now"]))
        failed += bool(lines)
        counted = sum(1 for _ in leaves(found["now"]))
        print(f"{part}: {len(lines)} differences in {counted} values ({time.monotonic() - started:.0f} s)", flush=True)
        for line in lines:
            print(f"  {line}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
