"""Our model in lmms-eval: the same tiny LLaVA in both forms, in batches, on two ranks, beside lmms-eval's own class."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub
import pytest
import torch
from lmms_eval.api import task as lmms_task
from lmms_eval.api.instance import Instance
from PIL import Image
from scoring import TASKS

from llava_genhancer.evaluate.mllm.model import LlavaGenhancer, decoding, trained_with
from llava_genhancer.evaluate.mllm.options import options_of
from llava_genhancer.evaluate.mllm.respondent import Ask
from llava_genhancer.evaluate.mllm.start import RUN_VARIABLE, refusing
from llava_genhancer.evaluate.report.write import write_report
from llava_genhancer.llava.chat import answer, load_llava
from llava_genhancer.llava.conversation import TEMPLATES, chat_template
from llava_genhancer.run import read_json

Lmms = Callable[..., dict[str, Any]]
NOISE = torch.Generator().manual_seed(0)
PICTURES = [
    Image.fromarray(torch.randint(0, 256, (40, 30 + i, 3), generator=NOISE, dtype=torch.uint8).numpy())
    for i in range(6)
]
GREEDY = {"max_new_tokens": 6, "temperature": 0, "do_sample": False}


def model_words(folder: Path, *arguments: str, batch: int = 4) -> list[str]:
    named = ",".join([f"pretrained={folder}", *arguments])
    return ["--model", "llava_genhancer", "--model_args", named, "--batch_size", str(batch)]


def replies(results: dict[str, Any], task: str) -> list[str]:
    """Each document's reply, in the documents' order, from the samples beside the results."""
    (path,) = results["path"].parent.glob(f"*_samples_{task}.jsonl")
    samples = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda s: s["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata={"task": "t", "doc_id": 0, "repeats": 1})


@pytest.fixture(scope="module")
def model(llava_folders: Path) -> LlavaGenhancer:
    """With documents of its own: no image, one, two, and a path."""
    path = llava_folders / "picture.png"
    PICTURES[5].save(path)
    loaded = LlavaGenhancer(str(llava_folders), batch_size="3", device="cpu")
    shown = [[], PICTURES[:1], PICTURES[1:3], None, [str(path)], PICTURES[4:5], [None]]
    docs = [
        {"text": f"What is {i}?", "images": images, "options": ["red", "blue critter"]}
        for i, images in enumerate(shown)
    ]
    loaded.task_dict = {"mine": {"test": docs}, "pope": {"test": [{**d, "question": d["text"]} for d in docs]}}
    return loaded


def docs_of(model: LlavaGenhancer) -> list[dict[str, Any]]:
    return model.task_dict["mine"]["test"]


def images_of(doc: dict[str, Any]) -> Any:
    return doc["images"]


# --- through lmms-eval's command ----------------------------------------------------------------------------------


def test_every_task_answers_with_its_likeliest_option(
    lmms: Lmms, llava_folders: Path, data: Path, tmp_path: Path
) -> None:
    """Each reply is the option that the model itself finds likeliest, asked alone; batches and forms change none."""
    import datasets

    results = lmms("genhancer", "", *model_words(llava_folders))
    again = "mmvp,scienceqa_img"
    single = lmms(again, "", *model_words(llava_folders / "llava", batch=1), output=tmp_path / "single")
    own = LlavaGenhancer(str(llava_folders), device="cpu").respondent
    for task, docs in TASKS.items():
        said = replies(results, task)
        assert task not in again.split(",") or said == replies(single, task)
        options = [options_of(task, doc) for doc in docs]
        assert all(reply in offered for reply, offered in zip(said, options, strict=True))
        unparsed = [value for name, value in results["results"][task].items() if "unparsed," in name]
        assert unparsed == [0]
    pictures = datasets.load_dataset(str(data / "lmms-lab-eval/MMVP"), split="train")
    for doc, reply in zip(pictures, replies(results, "mmvp"), strict=True):
        a, b = doc["Options"].removeprefix("(a) ").split(" (b) ")
        text = f"{doc['Question']}\nA. {a}\nB. {b}"
        prompt = f"{text}\nAnswer with the option's letter from the given choices directly."
        ((first, second),) = own.score([Ask.about(prompt, [doc["image"].convert("RGB")])], [["A", "B"]])
        assert reply == ("A" if first.total >= second.total else "B")
    config = results["config"]
    assert (config["model"], config["batch_size"]) == ("llava_genhancer", "4")


def test_generation_says_what_llava_hf_says(lmms: Lmms, llava_folders: Path, tmp_path: Path) -> None:
    """The same weights in lmms-eval's own class, one question at a time; ``dummy`` sees the same documents."""
    pytest.importorskip("decord", reason="llava_hf imports it: pip install -e '.[eval]'")
    tasks = "mmvp,scienceqa_img"
    ours = lmms(tasks, "", *model_words(llava_folders, "answer=generate", batch=5))
    theirs_words = ["--model", "llava_hf", "--model_args", f"pretrained={llava_folders / 'hf'},device_map=cpu"]
    theirs = lmms(tasks, "", *theirs_words, "--device", "cpu", "--force_simple", output=tmp_path / "theirs")
    dummy = lmms(tasks, "B", output=tmp_path / "dummy")
    for task in tasks.split(","):
        assert replies(ours, task) == [reply.strip() for reply in replies(theirs, task)]
        assert len(replies(dummy, task)) == len(replies(ours, task))
        numbers = {r["n-samples"][task]["effective"] for r in (ours, theirs, dummy)}
        assert len(numbers) == 1
        assert ours["results"][task] == theirs["results"][task]


# --- one call at a time -------------------------------------------------------------------------------------------


def test_words_in_any_mixture(model: LlavaGenhancer, llava_folders: Path) -> None:
    """Texts alone, one image, two, a path; other settings in between; options where the task has some."""
    docs = docs_of(model)
    asked = [
        request("generate_until", d["text"], dict(GREEDY), images_of, i, "mine", "test") for i, d in enumerate(docs)
    ]
    short = request("generate_until", docs[1]["text"], {"max_new_tokens": 1}, images_of, 1, "mine", "test")
    chosen = request("generate_until", docs[1]["text"], dict(GREEDY), images_of, 1, "pope", "test")
    said = model.generate_until([*asked[:3], short, chosen, *asked[3:]])
    assert said[4] in ("Yes", "No")
    alone = [model.generate_until([r])[0] for r in [*asked[:3], short, chosen, *asked[3:]]]
    assert said == alone
    hf, processor = load_llava(llava_folders / "hf", device="cpu")
    content = [{"type": "image"}, {"type": "text", "text": docs[1]["text"]}]
    message = [{"role": "user", "content": content}]
    assert said[1] == answer(hf, processor, PICTURES[0], message, max_new_tokens=6)
    assert said[3] == answer(hf, processor, PICTURES[0], message, max_new_tokens=1)
    end = said[1][1:2]
    until = {**GREEDY, "until": [end, ""]}
    (cut,) = model.generate_until([request("generate_until", docs[1]["text"], until, images_of, 1, "mine", "test")])
    assert cut == said[1].split(end)[0]


def test_losses_as_multiple_choice_takes_them(model: LlavaGenhancer) -> None:
    """The smallest loss is the likeliest option; a callable continuation is asked for its words."""
    docs = docs_of(model)
    asked = [
        request("loglikelihood", d["text"], f" {option}", images_of, i, "mine", "test")
        for i, d in enumerate(docs)
        for option in d["options"]
    ]
    last = request("loglikelihood", docs[2]["text"], lambda d: d["options"][1], images_of, 2, "mine", "test")
    found = model.loglikelihood([*asked, last])
    assert found[-1] == pytest.approx(found[5])
    for i, doc in enumerate(docs):
        visuals = [v for v in doc["images"] or [] if isinstance(v, Image.Image)]
        if len(visuals) == len([v for v in doc["images"] or [] if v is not None]):
            (scores,) = model.respondent.score([Ask.about(doc["text"], visuals)], [doc["options"]])
            assert [-s.total for s in scores] == pytest.approx([found[2 * i][0], found[2 * i + 1][0]], abs=1e-4)
            assert [s.greedy for s in scores] == [found[2 * i][1], found[2 * i + 1][1]]


def test_normalised_by_length_or_not(model: LlavaGenhancer) -> None:
    """A long option loses more in all and less each token: the argument decides."""
    docs = docs_of(model)
    asked = [request("loglikelihood", docs[1]["text"], o, images_of, 1, "mine", "test") for o in docs[1]["options"]]
    totals = [loss for loss, _ in model.loglikelihood(asked)]
    model.normalise = True
    try:
        means = [loss for loss, _ in model.loglikelihood(asked)]
    finally:
        model.normalise = False
    lengths = [
        len(model.respondent.tokenizer(f" {o}</s>", add_special_tokens=False).input_ids) for o in docs[1]["options"]
    ]
    assert means == pytest.approx([t / n for t, n in zip(totals, lengths, strict=True)], abs=0.2 * max(totals))
    assert totals[0] < totals[1]
    assert totals[1] / means[1] > totals[0] / means[0]


def test_rounds(model: LlavaGenhancer) -> None:
    """The task sees the answers so far and says what comes next, until it ends."""
    seen = []

    def next_round(doc: Any, previous_output: list[str], round_idx: int, previous_round_info: Any) -> Any:
        seen.append((list(previous_output), round_idx, previous_round_info))
        return (
            PICTURES[round_idx : round_idx + 1],
            f"And {round_idx}?",
            round_idx == 3,
            previous_output,
            {"n": round_idx},
        )

    doc = docs_of(model)[1]
    (said,) = model.generate_until_multi_round(
        [request("generate_until_multi_round", doc["text"], dict(GREEDY), images_of, next_round, 1, "mine", "test")]
    )
    assert len(said) == 3
    assert seen == [([said[0]], 1, None), (said[:2], 2, {"n": 1}), (said, 3, {"n": 2})]
    expected = [Ask.about(doc["text"], PICTURES[:1])] + [Ask.about(f"And {i}?", PICTURES[i : i + 1]) for i in (1, 2)]
    assert said == [model.respondent.say([ask], max_new_tokens=6, do_sample=False)[0] for ask in expected]


def test_a_judge_gets_the_memory(llava_folders: Path) -> None:
    loaded = LlavaGenhancer(str(llava_folders), device="cpu")
    loaded.clean()
    assert not any(isinstance(value, torch.nn.Module) for value in vars(loaded).values())
    assert not hasattr(loaded, "respondent")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"max_new_tokens": 256, "do_sample": False}),
        (GREEDY, {"max_new_tokens": 6, "do_sample": False}),
        ({"temperature": 0.2, "top_p": None}, {"max_new_tokens": 256, "do_sample": True, "temperature": 0.2}),
        ({"do_sample": True}, {"max_new_tokens": 256, "do_sample": True}),
        ({"do_sample": True, "temperature": 0}, {"max_new_tokens": 256, "do_sample": False}),
        ({"do_sample": False, "temperature": 0.7}, {"max_new_tokens": 256, "do_sample": False}),
        ({"num_beams": 2, "image_aspect_ratio": "pad"}, {"max_new_tokens": 256, "num_beams": 2, "do_sample": False}),
    ],
)
def test_decoding(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert decoding(settings) == expected


# --- one document that cannot be answered -------------------------------------------------------------------------


@pytest.fixture
def spoilt(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of ScienceQA whose document 2 is far too long, 5 has bytes for an image, and 6 has no options."""
    import datasets

    rows = datasets.load_dataset(str(data / "lmms-lab-encoder/ScienceQA"), "ScienceQA-IMG", split="test")
    values = rows.cast_column("image", datasets.Image(decode=False)).to_dict()
    values["hint"][2] = "A longer story, told in words. " * 400
    values["choices"][6] = []
    values["image"][5] = {"bytes": b"no image", "path": None}
    folder = tmp_path / "spoilt" / "lmms-lab-encoder" / "ScienceQA"
    folder.mkdir(parents=True)
    for kept in (data / "lmms-lab-encoder/ScienceQA").rglob("*"):
        if kept.is_file():
            target = folder / kept.relative_to(data / "lmms-lab-encoder/ScienceQA")
            target.parent.mkdir(parents=True, exist_ok=True)
            if kept.suffix == ".parquet" and "IMG" in str(kept):
                features = rows.features
                datasets.Dataset.from_dict(values, features=features).to_parquet(target)
            else:
                shutil.copy(kept, target)
    monkeypatch.setenv("LLAVA_GENHANCER_DATA", str(tmp_path / "spoilt"))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "datasets"))
    lmms_task._resolve_hf_datasets_cache_dir.cache_clear()  # `datasets` takes this copy for the other one
    yield tmp_path / "spoilt"
    lmms_task._resolve_hf_datasets_cache_dir.cache_clear()


@pytest.mark.parametrize("answer", ["likelihood", "generate"])
def test_one_bad_document_ends_nothing(
    lmms: Lmms, llava_folders: Path, spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: str
) -> None:
    """It counts as wrong, is named with its reason in results, report and table, and the others' answers stay."""
    run = tmp_path / "run"
    found = lmms("scienceqa_img", "", *model_words(llava_folders, f"answer={answer}"), output=run / "eval/lmms/mine")
    told = capsys.readouterr().err
    assert "task scienceqa_img, document 2 has no answer: a question with its images is" in told
    assert "task scienceqa_img, document 5 has no answer: its image cannot be read" in told
    lost = [2, 5, 6] if answer == "likelihood" else [2, 5]  # words can be generated without options
    assert ("document 6 has no answer: it has no options to choose among" in told) == (6 in lost)
    said = replies(found, "scienceqa_img")
    assert [i for i, reply in enumerate(said) if reply.startswith("[not answered] ")] == lost
    assert found["results"]["scienceqa_img"]["scienceqa_unanswered,none"] == len(lost)
    assert found["results"]["scienceqa_img"]["scienceqa_n,none"] == len(hub.SCIENCEQA)
    right = sum(r == "AB"[d["answer"]] for r, d in zip(said, hub.SCIENCEQA, strict=True))
    if answer == "likelihood":
        assert found["results"]["scienceqa_img"]["scienceqa_accuracy,none"] == right / len(hub.SCIENCEQA)
    words = write_report(run).read_text()
    assert f"({len(lost)} of 8 not answered)" in words
    assert re.search(
        rf"{len(lost)} of 8 documents of scienceqa\\_img .* could not be answered .* 2 \(a question .*; 5 \(its", words
    )
    (model,) = json.loads((run / "report.json").read_text())["table2"]["models"]
    assert [(u["task"], u["document"]) for u in model["unanswered"]] == [("scienceqa_img", i) for i in lost]
    assert model["columns"]["scienceqa_img"]["unanswered"] == len(lost)


def test_one_documents_memory_ends_nothing_and_slows_nothing(
    model: LlavaGenhancer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The allocator refuses one document: the others are answered, in batches as large as before."""
    docs = docs_of(model)
    asked = [
        request("generate_until", d["text"], dict(GREEDY), images_of, i, "mine", "test") for i, d in enumerate(docs)
    ]
    expected = model.generate_until(asked)
    sizes = []
    embed = model.respondent._embedded

    def scarce(ids: torch.Tensor, asks: Any) -> torch.Tensor:
        if any("What is 2?" in ask.text for ask in asks):
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(asks))
        return embed(ids, asks)

    monkeypatch.setattr(model.respondent, "_embedded", scarce)
    said = model.generate_until(asked)
    assert said == [reply if i != 2 else "" for i, reply in enumerate(expected)]  # another's task reads any words
    assert max(sizes[-2:]) > 1 or sizes.count(1) < len(docs) - 1
    told = capsys.readouterr().err
    assert "task mine, document 2 has no answer: out of memory with one question at a time" in told
    assert "task mine: 1 of 7 documents have no answer and count as wrong" in told


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_is_read_from_the_processor(name: str) -> None:
    assert TEMPLATES[trained_with(chat_template(name), Path("x"))] == TEMPLATES[name]


def test_both_forms_say_how_they_were_trained(tmp_path: Path) -> None:
    from small_llava import write_llava_folders

    folder = write_llava_folders(tmp_path / "llava-finetune", conversation="mistral")
    for form in ("hf", "llava"):
        assert LlavaGenhancer(str(folder / form), device="cpu").respondent.template == "mistral"
    assert LlavaGenhancer(str(folder), conversation="v1", device="cpu").respondent.template == "v1"
    settings = read_json(folder / "hf" / "chat_template.json")
    (folder / "hf" / "chat_template.json").write_text(json.dumps({**settings, "chat_template": "{{ 'USER: ' }}"}))
    (folder / "hf" / "chat_template.jinja").write_text("{{ 'USER: ' }}")
    with pytest.raises(SystemExit):
        LlavaGenhancer(str(folder / "hf"), device="cpu")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"pretrained": "/nowhere"}, "pretrained=/nowhere holds no LLaVA"),
        ({"answer": "guess"}, "answer=guess: choose one of likelihood, generate"),
        ({"dtype": "int8"}, "dtype=int8: choose one of auto, float32"),
        ({"normalise": "maybe"}, "normalise=maybe: choose one of True, False"),
        ({"conversation": "v7"}, "no conversation template 'v7'"),
        ({"conversation": "llama_3"}, "has no token <|start_header_id|>"),
        ({"batch_size": "auto"}, "--batch_size auto: give a number"),
        ({"batch_size": "0"}, "--batch_size 0: give a number"),
        ({"towr": "x"}, "towr: no such argument"),
        ({"tower": "/nowhere"}, "tower /nowhere cannot be loaded"),
        ({"device": "cuda:77"}, "cuda:77"),
    ],
)
def test_what_is_refused(
    llava_folders: Path, capsys: pytest.CaptureFixture[str], arguments: dict[str, Any], said: str
) -> None:
    """One line and status 2, where lmms-eval would report an error and exit with 0."""
    with pytest.raises(SystemExit) as stopped:
        LlavaGenhancer(**{"pretrained": str(llava_folders), "device": "cpu", **arguments})
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llava_genhancer: ")]
    assert said in line


def test_a_tower_of_another_shape(llava_folders: Path, tiny_clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        LlavaGenhancer(str(llava_folders), tower=str(tiny_clip), device="cpu")
    assert "has not the shape" in capsys.readouterr().err


def test_errors_are_no_empty_answers(
    model: LlavaGenhancer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that cannot be read, a video, and what nobody foresaw: the status is not 0."""
    for shown, said in (
        (["/no/image.png"], "file not found"),
        ([b"video"], "takes images only"),
        (PICTURES * 20, "tokens long, the model reads"),
    ):
        with pytest.raises(SystemExit) as stopped:
            model.generate_until(
                [request("generate_until", "What?", {}, lambda d, shown=shown: shown, 0, "mine", "test")]
            )
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped, refusing():
        raise ZeroDivisionError("float division")
    assert stopped.value.code == 1
    assert "Traceback" in capsys.readouterr().err


# --- the real command ---------------------------------------------------------------------------------------------


def command(words: list[str], data: Path, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LLAVA_GENHANCER", "RANK", "WORLD_SIZE"))}
    kept |= {"HF_HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *words], cwd=data, env=kept, capture_output=True, text=True)


def result(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("*_results.json")
    return {**json.loads(path.read_text()), "path": path}


@pytest.mark.launch
def test_the_bare_command_and_two_ranks(llava_folders: Path, data: Path, tmp_path: Path) -> None:
    """No --model, the run from the variable; then torchrun with two processes: the same answers and numbers."""
    tasks = ["--tasks", "mmvp,cvbench", "--log_samples", "--output_path"]
    run = {RUN_VARIABLE: str(llava_folders.parent)}
    bare = command(["-m", "lmms_eval", *tasks, str(tmp_path / "bare")], data, tmp_path, **run)
    assert bare.returncode == 0, bare.stderr[-3000:]
    ranks = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29618", "-m", "lmms_eval"]
    two = command([*ranks, *model_words(llava_folders), *tasks, str(tmp_path / "two")], data, tmp_path)
    assert two.returncode == 0, two.stderr[-3000:]
    one, other = result(tmp_path / "bare"), result(tmp_path / "two")
    for task, docs in (("mmvp", hub.MMVP), ("cvbench", TASKS["cvbench"])):
        assert len(replies(one, task)) == len(docs)
        assert replies(one, task) == replies(other, task)
        assert one["results"][task] == other["results"][task]
