"""Both trainings in one process: resume, skipping, refusals, NaN, learning rates, what is left behind."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llava_genhancer import cli, recipes, run
from llava_genhancer.errors import InputError
from llava_genhancer.llava import train
from llava_genhancer.llava.model import build_llava
from llava_genhancer.llava.recipes import LlavaRecipe
from llava_genhancer.llava.train import LlavaTrainer, finetune, pretrain, training_arguments
from llava_genhancer.trainer import BadStep, NonFiniteLoss

LORA = {"lora_rank": 4, "lora_dropout": 0.1}


class Crash(BaseException):
    """Stands for kill -9: nothing of ours may catch it."""


def recipe_from(fields: dict, **changes) -> LlavaRecipe:
    return recipes.override(LlavaRecipe(name="test"), {**fields, **LORA, **changes})


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


RESULTS = (
    "llava-pretrain/weights.safetensors",
    "llava-pretrain/llava/mm_projector.bin",
    "llava-finetune/weights.safetensors",
    "llava-finetune/hf/model.safetensors",
    "llava-finetune/llava/model.safetensors",
)


def results(run_dir: Path) -> dict[str, str]:
    """Hashes of every result a run leaves."""
    return {name: digest(run_dir / name) for name in RESULTS}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llava_fields: dict) -> Path:
    """Both steps, never interrupted: LoRA with dropout, accumulation, checkpointing, text-only samples."""
    run_dir = tmp_path_factory.mktemp("run") / "whole"
    pretrain(recipe_from(llava_fields), run_dir)
    finetune(recipe_from(llava_fields), run_dir)
    return run_dir


def test_a_run_leaves_what_it_should(finished: Path, llava_fields: dict) -> None:
    for step in ("pretrain", "finetune"):
        folder = finished / f"llava-{step}"
        manifest = run.read_json(folder / "manifest.json")
        assert recipes.from_dict(manifest["recipe"], LlavaRecipe) == recipe_from(llava_fields)
        assert manifest["step"] == step
        result = run.read_json(folder / "result.json")
        assert (result["steps"], result["images_seen"], result["step"]) == (6, 48, step)
        assert result["skipped"]["read"] == 48
        assert result["skipped"]["skipped"] == 0
        nothing: dict = {"by_reason": {}, "keys": []}
        counts = {"samples": 20, "with_image": 20 if step == "pretrain" else 16}
        assert result["data"] == {**counts, "left_out": nothing, "read_as_text": nothing}
        history = run.read_json(folder / "log_history.json")
        assert [e["step"] for e in history] == [1, 2, 3, 4, 5, 6]
        assert history[-1]["loss"] < history[0]["loss"]
        assert [p.name for p in run.checkpoints(folder)] == ["checkpoint-3", "checkpoint-6"]
    weights = run.read_json(finished / "llava-pretrain" / "result.json")["weights_sha256"]
    assert manifest["inputs"] == {"tower": None, "projector": weights}


def test_checkpoints_hold_what_learns_and_nothing_else(finished: Path) -> None:
    projector = {f"multi_modal_projector.linear_{i}.{k}" for i in (1, 2) for k in ("weight", "bias")}
    for step, names in (("pretrain", projector), ("finetune", None)):
        weights = load_file(finished / f"llava-{step}" / "weights.safetensors")
        trained = load_file(finished / f"llava-{step}" / "checkpoint-6" / "trained.safetensors")
        assert weights.keys() == trained.keys()
        assert names is None or weights.keys() == names
    assert {n for n in weights if ".lora_" not in n} == projector
    before = load_file(finished / "llava-pretrain" / "weights.safetensors")
    assert all(0 < (weights[n] - before[n]).abs().max() < 0.1 for n in projector), "it went on from pretraining's"


def crash_at(monkeypatch: pytest.MonkeyPatch, step: str, at: int, when: str = "on_step_end") -> None:
    """End the process (by exception) in the given step of training."""

    class Bomb(TrainerCallback):
        pass

    def go_off(self, args, state, control, **kwargs):
        if Path(args.output_dir).name == f"llava-{step}" and state.global_step == at:
            raise Crash

    setattr(Bomb, when, go_off)
    original = LlavaTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Bomb())

    monkeypatch.setattr(LlavaTrainer, "__init__", init)


@pytest.mark.parametrize(
    ("step", "at", "when", "workers"),
    [
        ("pretrain", 5, "on_step_end", 1),  # between checkpoints, with a data worker
        ("finetune", 4, "on_step_end", 0),
        ("finetune", 6, "on_train_end", 0),  # after the last checkpoint, before the step is declared finished
    ],
)
def test_crash_and_resume_is_bit_identical(finished, llava_fields, tmp_path, monkeypatch, step, at, when, workers):
    recipe = recipe_from(llava_fields, num_workers=workers)
    run_dir = tmp_path / "run"
    if step == "finetune":
        shutil.copytree(finished / "llava-pretrain", run_dir / "llava-pretrain")
    with monkeypatch.context() as patch:
        crash_at(patch, step, at, when)
        with pytest.raises(Crash):
            getattr(train, step)(recipe, run_dir)
    assert not (run_dir / f"llava-{step}" / "result.json").exists()
    torch.manual_seed(12345)  # whatever the next process's RNG is
    pretrain(recipe, run_dir)
    finetune(recipe, run_dir)
    assert results(run_dir) == results(finished)


def test_other_data_cannot_be_gone_on_with(llava_fields, llava_data, tmp_path, monkeypatch) -> None:
    """A file may move; its content is what the order of samples was drawn from."""
    with monkeypatch.context() as patch:
        crash_at(patch, "pretrain", 4)
        with pytest.raises(Crash):
            pretrain(recipe_from(llava_fields), tmp_path / "run")
    samples = json.loads(llava_data["pretrain"].read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(samples[1:]))
    with pytest.raises(InputError, match="cannot be resumed exactly: data was"):
        pretrain(recipe_from(llava_fields, **{"pretrain.data": str(other)}), tmp_path / "run")
    other.write_bytes(llava_data["pretrain"].read_bytes())
    pretrain(recipe_from(llava_fields, **{"pretrain.data": str(other)}), tmp_path / "run")


def test_a_finished_run_is_left_alone(finished, llava_fields, monkeypatch) -> None:
    before = {
        p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.suffix in (".bin", ".safetensors")
    }
    monkeypatch.setattr(train, "build_llava", lambda *a, **k: pytest.fail("a finished step loaded its model"))
    pretrain(recipe_from(llava_fields), finished)
    finetune(recipe_from(llava_fields), finished)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    # Where the data lie and what the other step does are no part of what a finished step is.
    other = {"pretrain.save_steps": 2, "finetune.learning_rate": 1e-5, "lora_rank": 0}
    pretrain(recipe_from(llava_fields, **other), finished)


def test_a_lost_export_is_written_again(finished, llava_fields, tmp_path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "llava-finetune"
    shutil.rmtree(folder / "hf")
    (folder / "llava" / "model.safetensors").unlink()
    finetune(recipe_from(llava_fields), tmp_path / "run")
    assert results(tmp_path / "run") == results(finished)


def test_another_recipe_is_refused_with_the_difference(finished, llava_fields) -> None:
    with pytest.raises(InputError, match=r"another recipe \(pretrain.learning_rate: 0.01 -> 0.5\)"):
        pretrain(recipe_from(llava_fields, **{"pretrain.learning_rate": 0.5}), finished)
    with pytest.raises(InputError, match=r"another recipe \(lora_rank: 4 -> 0\)"):
        finetune(recipe_from(llava_fields, lora_rank=0), finished)


def test_another_projector_is_refused(finished, llava_fields, tmp_path) -> None:
    """Finetuning is not the same once its pretraining was done anew."""
    shutil.copytree(finished, tmp_path / "run")
    result = tmp_path / "run" / "llava-pretrain" / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "weights_sha256": "0" * 64}))
    with pytest.raises(InputError, match="was trained with another projector than is there now"):
        finetune(recipe_from(llava_fields), tmp_path / "run")


def test_finetuning_needs_pretraining_unless_it_is_switched_off(llava_fields, tmp_path) -> None:
    with pytest.raises(InputError, match="run `llava pretrain` first"):
        finetune(recipe_from(llava_fields), tmp_path / "run")
    off = {"pretrain.max_steps": 0, "finetune.max_steps": 1}
    pretrain(recipe_from(llava_fields, **off), tmp_path / "run")
    folder = finetune(recipe_from(llava_fields, **off), tmp_path / "run")
    assert (folder / "hf" / "model.safetensors").exists()


def test_nan_stops_the_run_and_names_the_batch(llava_fields, tmp_path, monkeypatch) -> None:
    original, calls = LlavaTrainer.compute_loss, iter(range(100))

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        return loss * float("nan") if next(calls) == 9 else loss

    monkeypatch.setattr(LlavaTrainer, "compute_loss", poisoned)
    with pytest.raises(NonFiniteLoss, match="batch keys: "):
        pretrain(recipe_from(llava_fields), tmp_path / "run")
    assert [p.name for p in run.checkpoints(tmp_path / "run" / "llava-pretrain")] == ["checkpoint-3"]


@pytest.mark.parametrize("image", [{}, {"image": None}, {"picture": "0.png"}])
def test_a_pretraining_without_images_is_refused(llava_fields, tmp_path, monkeypatch, image) -> None:
    """Before a weight is loaded: it would end "done" with the projector it began with."""
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a red ball"}]
    (tmp_path / "d.json").write_text(json.dumps([{"id": f"n{i}", "conversations": turns, **image} for i in range(20)]))
    monkeypatch.setattr(train, "build_llava", lambda *a, **k: pytest.fail("weights were loaded"))
    changes = {f"{step}.data": str(tmp_path / "d.json") for step in ("pretrain", "finetune")}
    with pytest.raises(
        InputError, match=r"none of the 20 samples has an image \(20 of 20: text has <image> .*first n0"
    ):
        pretrain(recipe_from(llava_fields, **changes), tmp_path / "run")
    changes |= {"pretrain.max_steps": 0}
    with pytest.raises(InputError, match=r'20 of 20: text has <image> .*\(first n0\); give each of them "image"'):
        finetune(recipe_from(llava_fields, **changes), tmp_path / "run")


def test_a_training_without_any_gradient_stops(llava_fields, tmp_path) -> None:
    """Here every batch is text, though the JSON holds an image: the loss is computed, the projector gets nothing."""
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a red ball"}]
    shown = [{"from": "human", "value": "<image>\nwhat?"}, turns[1]]
    data = [{"id": "shown", "image": "0.png", "conversations": shown}]
    data += [{"id": str(i), "conversations": turns} for i in range(200)]
    (tmp_path / "d.json").write_text(json.dumps(data))
    fields = {"pretrain.data": str(tmp_path / "d.json"), "pretrain.max_steps": 3, "pretrain.save_steps": 2, "seed": 1}
    with pytest.raises(BadStep, match="zero in all of the first 3 steps, so nothing is learned"):
        pretrain(recipe_from(llava_fields, **fields), tmp_path / "run")
    with pytest.raises(BadStep, match="zero in all of the first 3 steps"):  # resumed at step 2
        pretrain(recipe_from(llava_fields, **fields), tmp_path / "run")
    assert not (tmp_path / "run" / "llava-pretrain" / "result.json").exists()


def test_a_tokenizer_may_have_more_tokens_than_the_model_has_embeddings(llava_fields, tiny_llama, tmp_path) -> None:
    """As Llama-2 with a padding token: no batch is padded with it, and a text that contains it is left out."""
    shutil.copytree(tiny_llama, tmp_path / "llm")
    settings = json.loads((tmp_path / "llm" / "tokenizer_config.json").read_text())
    (tmp_path / "llm" / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<pad>"}))
    data = json.loads(Path(llava_fields["pretrain.data"]).read_text())
    data[7]["conversations"][1]["value"] = "red <pad> ball"
    data[8]["conversations"][1]["value"] = "a longer answer than that of the others"
    (tmp_path / "d.json").write_text(json.dumps(data))
    fields = {"llm": str(tmp_path / "llm"), "pretrain.data": str(tmp_path / "d.json"), "max_bad_fraction": 0.5}
    folder = pretrain(recipe_from(llava_fields, **fields), tmp_path / "run")
    assert "no embedding for" in (folder / "result.json").read_text()


@pytest.mark.parametrize("rate", [None, 3e-4])
def test_the_projector_may_have_a_rate_of_its_own(llava_fields, tmp_path, rate) -> None:
    recipe = recipe_from(llava_fields, **{"finetune.projector_learning_rate": rate, "weight_decay": 0.1})
    args = training_arguments(recipe, "finetune", tmp_path, None, 20)
    model = build_llava(recipe, "finetune")
    trainer = train.build_trainer(recipe, "finetune", model, args, loader=None)
    groups = trainer.create_optimizer().param_groups
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(learns)
    for name, parameter in learns.items():
        own = rate if rate and name.startswith("multi_modal_projector") else 1e-3
        assert rates[id(parameter)] == own, name
        assert decays[id(parameter)] == (0 if name.endswith("bias") else 0.1), name


def test_steps_follow_from_the_data(llava_fields, tmp_path) -> None:
    changes = {"finetune.max_steps": None, "finetune.epochs": 2, "finetune.warmup_ratio": 0.1}
    args = training_arguments(recipe_from(llava_fields, **changes), "finetune", tmp_path, None, 20)
    assert args.max_steps == 2 * math.ceil(20 / 8)
    assert args.warmup_steps == 1
    assert (args.lr_scheduler_type, args.weight_decay, args.max_grad_norm) == ("cosine", 0, 1.0)
    assert args.gradient_accumulation_steps == 2


def test_items_and_micro_batches_weigh_tokens_differently(llava_fields, tmp_path) -> None:
    """One step with accumulation: "items" equals one large batch, "micro_batch" does not."""
    from llava_batches import train as train_fixed

    losses = {}
    for normalise in ("items", "micro_batch"):
        for size in (2, 4):
            fields = {**llava_fields, "normalise_loss": normalise, "pretrain.per_device_batch_size": size}
            fields |= {"pretrain.global_batch_size": 4, "pretrain.max_steps": 1}
            folder = tmp_path / f"{normalise}-{size}"
            train_fixed(fields, "pretrain", None, folder, whole=4)
            losses[normalise, size] = run.read_json(folder / "log_history.json")[0]["loss"]
    assert losses["items", 2] == pytest.approx(losses["items", 4], abs=1e-6)
    assert losses["micro_batch", 4] == pytest.approx(losses["items", 4], abs=1e-6)
    assert abs(losses["micro_batch", 2] - losses["items", 2]) > 1e-3


def test_packing_changes_nothing_but_the_padding(llava_fields, tmp_path, monkeypatch) -> None:
    """Six steps of accumulation over ragged, text-only and image samples; stopped and begun anew, too."""
    changes = {"lora_dropout": 0.0, "normalise_loss": "items", "pretrain.max_steps": 0}
    logs, results = {}, {}
    for packing in (False, True):
        recipe = recipe_from(llava_fields, **changes, **{"finetune.packing": packing})
        if packing:
            with monkeypatch.context() as patch:
                crash_at(patch, "finetune", 4)
                with pytest.raises(Crash):
                    finetune(recipe, tmp_path / "True")
        folder = finetune(recipe, tmp_path / str(packing))
        logs[packing] = run.read_json(folder / "log_history.json")
        results[packing] = run.read_json(folder / "result.json")
    for padded, packed in zip(logs[False], logs[True], strict=True):
        assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
        assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)
        assert packed["padding_share"] == 0 < padded["padding_share"] < 0.5
    tokens, places = results[False]["tokens"], results[False]["places"]
    assert results[False]["padding_share"] == pytest.approx(1 - tokens / places, abs=1e-4)
    assert (results[True]["tokens"], results[True]["places"], results[True]["padding_share"]) == (tokens, tokens, 0)
    with pytest.raises(InputError, match=r"finetune\.packing: false -> true"):
        finetune(recipe, tmp_path / "False")


def arguments(fields: dict) -> list[str]:
    return [f"--{k}={v}" for k, v in fields.items()]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pretrain.data": None}, "no data given: add --pretrain.data"),
        ({"pretrain.data": "/no/data.json"}, "/no/data.json"),
        ({"pretrain.image_folder": "/no/images"}, "image_folder /no/images does not exist"),
        ({"pretrain.conversation": "vicuna"}, "no conversation template 'vicuna'"),
        ({"pretrain.global_batch_size": 6}, "not a multiple of"),
        ({"llm": "/no/llm"}, "llm /no/llm cannot be loaded"),
        ({"tower": "/no/tower"}, "tower /no/tower cannot be loaded"),
        ({"lora_rnk": 3}, "did you mean 'lora_rank'"),
        ({"pretrain.max_steps": "many"}, "needs a value of type int"),
    ],
)
def test_bad_input_is_one_line_and_status_2(llava_fields, tmp_path, capsys, change, words) -> None:
    fields = arguments({**llava_fields, **change})
    with pytest.raises(SystemExit) as caught:
        cli.main(["llava", "pretrain", "tiny", "--output_dir", str(tmp_path / "run"), *fields])
    err = capsys.readouterr().err
    assert caught.value.code == 2
    lines = [line for line in err.splitlines() if line.startswith("llava-genhancer")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_a_run_repeats_from_its_manifest(finished, tmp_path, capsys) -> None:
    """Through the command line, both steps."""
    for step in ("pretrain", "finetune"):
        manifest = finished / f"llava-{step}" / "manifest.json"
        with pytest.raises(SystemExit) as caught:
            cli.main(["llava", step, "--config", str(manifest), "--output_dir", str(tmp_path / "again")])
        assert caught.value.code == 0, capsys.readouterr().err
    assert results(tmp_path / "again") == results(finished)


def test_a_stop_signal_saves_and_the_run_goes_on(finished, llava_fields, tmp_path, monkeypatch, capsys) -> None:
    import os
    import signal

    original, calls = LlavaTrainer.training_step, iter(range(100))

    def interrupted(self, *args, **kwargs):
        if next(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    start = ["llava", "pretrain", "tiny", "--name=test", "--output_dir", str(tmp_path / "run")]
    recipe = recipes.to_dict(recipe_from(llava_fields))
    with monkeypatch.context() as patch:
        patch.setattr(LlavaTrainer, "training_step", interrupted)
        with pytest.raises(SystemExit) as caught:
            cli.main([*start, *arguments(recipe)])
    assert caught.value.code == 128 + signal.SIGTERM
    assert "stopped at step 4 by SIGTERM" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main([*start, *arguments(recipe)])
    assert caught.value.code == 0
    name = "llava-pretrain/weights.safetensors"
    assert digest(tmp_path / "run" / name) == digest(finished / name)
