"""The chain's plan, its checks, what it skips, and where it stops; the script itself once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_genhancer.chain import command, running
from llava_genhancer.chain.fork import OURS_ALONE, arguments
from llava_genhancer.chain.needs import Data, llava_data
from llava_genhancer.chain.steps import Choices, Step, plan, split_fields
from llava_genhancer.errors import InputError
from llava_genhancer.llava.recipes import get_recipe

SCRIPT = Path(__file__).parent.parent / "scripts" / "enhance_then_llava.sh"
TINY = ["enhance", "mmvp", "zero-shot", "probes", "generation", "pretrain", "finetune", "baseline-pretrain",
        "baseline-finetune", "questions", "chat", "lmms", "report"]  # fmt: skip


def choices(preset: str = "tiny", **values) -> Choices:
    return Choices(preset=preset, run_dir=Path("run"), **values)


def names(steps: list[Step]) -> list[str]:
    return [step.name for step in steps]


def test_the_steps_of_each_choice() -> None:
    assert names(plan(choices())) == TINY
    assert names(plan(choices(tower="/some/tower"))) == [n for n in TINY[1:] if n != "generation"]
    assert names(plan(choices(fields={"sample_images": "0"}))) == [n for n in TINY if n != "generation"]
    assert names(plan(choices("vicuna-7b"))) == ["enhance", "generation", "pretrain", "finetune", "lmms", "report"]
    with_all = plan(choices("vicuna-13b", mmvp="pairs", zero_shot="sets", baseline=True))
    assert names(with_all) == ["enhance", "mmvp", "zero-shot", *TINY[4:9], "lmms", "report"]


def test_another_recipe_enhances_and_its_backbone_is_the_original() -> None:
    steps = {step.name: step.command for step in plan(choices("vicuna-7b", recipe="siglip-so400m-384", baseline=True))}
    assert steps["enhance"][:2] == ("enhance", "siglip-so400m-384")
    assert (
        steps["baseline-pretrain"][steps["baseline-pretrain"].index("--tower") + 1]
        == "google/siglip-so400m-patch14-384"
    )
    with pytest.raises(InputError, match="unknown recipe 'siglip'"):
        plan(choices("vicuna-7b", recipe="siglip"))


def test_both_towers_are_trained_on_the_same_data_in_folders_of_their_own() -> None:
    steps = {step.name: step.command for step in plan(choices())}
    for name in ("pretrain", "finetune"):
        enhanced, original = steps[name], steps[f"baseline-{name}"]
        differing = {a: b for a, b in zip(enhanced, original, strict=True) if a != b}
        assert differing == {"run": "run/baseline", "run/tower": "toyworld:clip"}
    asked = steps["questions"]
    assert asked[1:5] == ("run/baseline/llava-finetune/hf", "run/llava-finetune/hf", "--labels", "original")
    assert asked[asked.index("--data") + 1].endswith("questions_test"), (
        "never the questions that settings were chosen on"
    )


def test_lmms_eval_asks_each_model_that_was_trained() -> None:
    steps = {step.name: step for step in plan(choices())}
    words = list(steps["lmms"].command)
    assert words[:3] == ["mllm", "run/baseline/llava-finetune/hf", "run/llava-finetune/hf"]
    assert words[words.index("--labels") + 1 : words.index("--labels") + 3] == ["original", "enhanced"]
    assert words[words.index("--output_dir") + 1] == "run/eval/lmms"
    assert words[-1].endswith("benchmarks"), "its own small sets"
    assert steps["lmms"].result == Path("run/eval/lmms/enhanced/provenance.json")
    big = {step.name: step for step in plan(choices("vicuna-7b"))}["lmms"]
    assert "--data" not in big.command, "from the hub"
    assert sum("hf download" in need for need in big.needs) == 6
    assert big.zero is None
    local = {step.name: step for step in plan(choices("vicuna-7b", lmms_data=Path("/copies")))}["lmms"]
    assert local.command[-2:] == ("--data", "/copies")
    assert "/copies/nyu-visionx/CV-Bench" in local.needs[0]


def test_fields_go_where_they_belong() -> None:
    assert split_fields({"seed": "3", "stage1.max_steps": "5", "llava.llm": "x"}) == (
        {"seed": "3", "stage1.max_steps": "5"},
        {"seed": "3", "llm": "x"},
    )
    steps = {s.name: s.command for s in plan(choices(fields={"lora_rank": "4", "llava.finetune.epochs": "3"}))}
    assert steps["enhance"][-2:] == ("--lora_rank", "4")
    assert steps["finetune"][-2:] == ("--finetune.epochs", "3")
    for wrong, near in (("stage1.max_step", "stage1.max_steps"), ("llava.finetune.epoch", "finetune.epochs")):
        with pytest.raises(InputError, match=near):
            plan(choices(fields={wrong: "1"}))


def test_trainings_on_gpus_go_through_deepspeed_and_measurements_do_not() -> None:
    chosen = choices("vicuna-7b", mmvp="pairs", hostfile="hosts")
    words = {step.name: running.words_of(step, chosen) for step in plan(chosen)}
    for name, zero in (("enhance", "zero2"), ("pretrain", "zero2"), ("finetune", "zero3")):
        assert words[name][:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
        assert words[name][3:7] == ["--hostfile", "hosts", "--module", "llava_genhancer"]
        assert Path(words[name][-1]).name == f"{zero}.json"
        assert Path(words[name][-1]).is_file()
    for name in ("mmvp", "report"):
        assert words[name][:3] == [sys.executable, "-m", "llava_genhancer"]
        assert "--deepspeed" not in words[name]


def test_a_forks_trainer_gets_llavas_own_arguments(tmp_path) -> None:
    data = Data(tmp_path / "a.json", tmp_path)
    recipe = get_recipe("vicuna-7b")
    given = dict(
        zip(*[iter(arguments(recipe, "finetune", data, "openai/clip", tmp_path, world=4, cpu=False))] * 2, strict=True)
    )
    expected = {
        "--version": "v1", "--vision_tower": "openai/clip", "--mm_projector_type": "mlp2x_gelu",
        "--mm_vision_select_layer": "-2", "--image_aspect_ratio": "pad", "--group_by_modality_length": "True",
        "--per_device_train_batch_size": "16", "--gradient_accumulation_steps": "2", "--learning_rate": "2e-05",
        "--model_max_length": "2048", "--bf16": "True", "--tf32": "True",
        "--pretrain_mm_mlp_adapter": str(tmp_path / "llava-pretrain" / "mm_projector.bin"),
    }  # fmt: skip
    assert {name: given[name] for name in expected} == expected
    chosen = choices(fork=tmp_path, fork_python="/fork/python")
    words = {step.name: running.words_of(step, chosen) for step in plan(chosen)}
    assert words["pretrain"][:4] == ["/fork/python", "-m", "llava_genhancer.launch", "llava.train.train"]
    assert str(Path("run/tower").absolute()) in words["pretrain"]
    assert words["questions"][4] == "run/baseline/llava-finetune"


def given(words: tuple[str, ...], name: str) -> str | None:
    """The value of an option among a step's words."""
    return words[words.index(name) + 1] if name in words else None


@pytest.mark.parametrize("fork", [None, Path("/fork")])
def test_another_tower_for_llava_leaves_the_baseline_its_own(fork) -> None:
    name = "--tower" if fork is None else "--vision_tower"
    for extra in ({}, {"tower": "/another"}):
        fields = {"llava.tower": "/some/tower"}
        if extra:
            with pytest.raises(InputError, match="give one of them"):
                plan(choices("vicuna-7b", baseline=True, fork=fork, fields=fields, **extra))
            continue
        steps = {s.name: s.command for s in plan(choices("vicuna-7b", baseline=True, fork=fork, fields=fields))}
        for step in ("pretrain", "finetune"):
            assert given(steps[step], name) == "/some/tower"
            assert given(steps[f"baseline-{step}"], name) == "openai/clip-vit-large-patch14-336"
            assert steps[step].count(name) == 1


@pytest.mark.parametrize("fork", [None, Path("/fork")])
def test_other_data_for_llava_reach_every_training_that_reads_them(fork, tmp_path) -> None:
    fields = {"llava.pretrain.data": str(tmp_path / "a.json"), "llava.pretrain.image_folder": str(tmp_path)}
    chosen = choices("vicuna-7b", baseline=True, fork=fork, fields=fields, llava_data=tmp_path / "usual", data="x")
    steps = {s.name: s for s in plan(chosen)}
    data, images = ("--pretrain.data", "--pretrain.image_folder") if fork is None else ("--data_path", "--image_folder")
    for step in ("pretrain", "baseline-pretrain"):
        assert given(steps[step].command, data) == str(tmp_path / "a.json")
        assert given(steps[step].command, images) == str(tmp_path)
    finetuning = "--finetune.data" if fork is None else "--data_path"
    assert given(steps["finetune"].command, finetuning).startswith(str(tmp_path / "usual"))
    assert str(tmp_path / "a.json") in " ".join(steps["pretrain"].needs)


def test_every_field_of_llavas_recipe_reaches_a_forks_trainer_or_is_refused() -> None:
    """A field that changes no word of the fork's command would be ignored in silence."""
    from llava_genhancer.fields import field_types, override, to_dict
    from llava_genhancer.llava.recipes import LlavaRecipe

    base = override(get_recipe("vicuna-7b"), {"lora_rank": 8})
    values = {
        "attention": "eager", "conversation": "llama_2", "image_mode": {"square": "pad", "pad": "square"},
        "lr_scheduler": {"cosine": "constant"}, "normalise_loss": "items", "precision": "fp32", "on_bad_step": "skip",
        "lora_dropout": 0.5, "max_bad_fraction": 0.5, "warmup_ratio": 0.5, "vision_feature_layer": -3,
        "projector_learning_rate": 0.5, "max_steps": 7, "global_batch_size": 4096, "adam_beta1": 0.5, "spike_factor": 9,
    }  # fmt: skip

    def commands(fields) -> list[tuple[str, ...]]:
        chosen = choices("vicuna-7b", fork=Path("/fork"), fields={f"llava.{k}": str(v) for k, v in fields.items()})
        return [step.command for step in plan(chosen) if step.fork]

    usual = commands({"lora_rank": 8})
    for name in field_types(LlavaRecipe):
        old, value = to_dict(base)[name], values.get(name.rpartition(".")[2])
        value = value[old] if isinstance(value, dict) else value
        value = value or (
            "/x" if old is None or isinstance(old, str) else not old if isinstance(old, bool) else old * 2 or 0.5
        )
        if name.rpartition(".")[2] in OURS_ALONE:
            with pytest.raises(InputError, match="no counterpart in a fork"):
                commands({"lora_rank": 8, name: value})
        else:
            assert commands({"lora_rank": 8, name: value}) != usual, name


def test_a_training_that_is_switched_off_is_no_step_of_a_fork() -> None:
    steps = {s.name: s for s in plan(choices("vicuna-7b", fork=Path("/f"), fields={"llava.pretrain.max_steps": "0"}))}
    assert "pretrain" not in steps
    assert "--pretrain_mm_mlp_adapter" not in steps["finetune"].command


@pytest.mark.parametrize("files", [None, "config.json", "open_clip_config.json"])
def test_a_tower_is_measured_once(files, tmp_path) -> None:
    """A hub id has no date; a folder is as old as its config, in either format."""
    tower = "openai/clip-vit-base-patch32"
    if files:
        tower = str(tmp_path / "tower")
        (tmp_path / "tower").mkdir()
        (tmp_path / "tower" / files).write_text("{}")
        os.utime(tmp_path / "tower" / files, (1, 1))
    chosen = Choices(preset="vicuna-7b", run_dir=tmp_path / "run", tower=tower, mmvp="pairs", zero_shot="sets")
    steps = {step.name: step for step in plan(chosen)}
    for name in ("mmvp", "zero-shot"):
        assert not steps[name].done_before()
        steps[name].result.parent.mkdir(parents=True, exist_ok=True)
        steps[name].result.write_text("{}")
        assert steps[name].done_before()
        if files:
            os.utime(tmp_path / "tower" / files, None)
            os.utime(steps[name].result, (1, 1))
            assert not steps[name].done_before()
            os.utime(tmp_path / "tower" / files, (1, 1))


def test_a_measurement_is_skipped_while_it_is_newer_than_what_it_measures(tmp_path, capsys) -> None:
    source, result = tmp_path / "config.json", tmp_path / "result.json"
    step = Step("mmvp", ("no such verb",), result=result, sources=(source,))
    source.write_text("{}")
    assert not step.done_before()
    result.write_text("{}")
    os.utime(source, (1, 1))
    assert step.done_before()
    big = choices("vicuna-7b")
    assert running.run([step], big) == 0
    assert "done before" in capsys.readouterr().out
    os.utime(result, (0, 0))
    assert not step.done_before()
    source.unlink()
    result.touch()
    assert not step.done_before(), "what it measured has gone"


def test_another_towers_result_is_not_this_towers(tmp_path, capfd) -> None:
    """A tower that is older than the result, or on the hub, has no date that would show the exchange."""
    from dataclasses import replace

    result = tmp_path / "run" / "eval" / "recipes.json"
    chosen = Choices(preset="vicuna-7b", run_dir=tmp_path / "run")
    first = Step("mmvp", ("recipes", "tiny"), result=result)
    other = replace(first, command=("recipes", "tiny-diva"))
    assert running.run([first], chosen) == 0
    result.write_text("{}")
    for step, done in ((first, True), (other, False), (first, False), (first, True)):
        assert ("done before" in running.show([step], chosen)) is done
        capfd.readouterr()
        assert running.run([step], chosen) == 0
        assert ("done before" in capfd.readouterr().out) is done
    with pytest.raises(InputError, match=r"recipes.json is of another command .* choose another --output_dir"):
        running.run([replace(other, fork=tmp_path)], chosen)


def test_the_chain_stops_at_the_first_failure_and_keeps_its_status(capfd, tmp_path) -> None:
    good, bad = Step("one", ("recipes", "--json")), Step("two", ("report", str(tmp_path / "nowhere")))
    assert running.run([good, bad, good], choices("vicuna-7b")) == 2
    said = capfd.readouterr()
    assert said.out.count("== one") == 2, "begun and ended once"
    assert said.err.splitlines()[-1].startswith("enhance_then_llava: two ended with status 2")
    assert running.run([bad, good], choices("vicuna-7b"), start="one") == 0
    with pytest.raises(InputError, match="one, two"):
        running.run([good, bad], choices("vicuna-7b"), start="three")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mini"], "there are tiny, vicuna-7b, vicuna-13b"),
        ([], "PRESET"),
        (["tiny", "--stage1.max_step", "5"], "stage1.max_steps"),
        (["tiny", "surplus"], "surplus"),
        (["tiny", "--seed"], "--seed needs a value"),
        (["tiny", "--fork", "/nowhere"], "--fork /nowhere does not exist"),
        (["tiny", "--fork", "/", "--fork_python", "/nowhere"], "/nowhere cannot be started"),
        (["tiny", "--fork", "/", "--fork_python", "/bin/false"], "pip install --no-deps"),
        (["tiny", "--tower", "/nowhere"], "--tower /nowhere is not a folder"),
        (["vicuna-7b"], "add --data PATH"),
        (["vicuna-7b", "--data", "x", "--llava_data", "/nowhere"], "step pretrain shows the commands"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1
    assert errors.startswith("enhance_then_llava: ")


def test_the_plan_says_what_is_missing_and_how_to_get_it(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["vicuna-7b", "--dry_run", "--llava_data", str(tmp_path), "--output_dir", str(tmp_path / "run")])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for words in (
        "108 GB of GPU memory", "blip_laion_cc_sbu_558k.json", "LLaVA-Instruct-150K llava_v1_5_mix665k.json",
        "train2017.zip", "gqa/images.zip", "train_val_images.zip", "VG_100K_2/images2.zip", "ocr_vqa",
    ):  # fmt: skip
        assert words in said, words
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
    for data in llava_data("vicuna-7b", tmp_path).values():
        for folder in data.folders:
            (data.images / folder).mkdir(parents=True, exist_ok=True)
        data.json.write_text(json.dumps([]))
    with pytest.raises(SystemExit):
        command.main(["vicuna-7b", "--dry_run", "--llava_data", str(tmp_path)])
    assert "wget" not in capsys.readouterr().out


def test_a_hostfiles_slots_are_counted(tmp_path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\none slots=8\ntwo slots=4  # half\n\n")
    assert command._world(str(hosts)) == 12


def test_the_slurm_script_is_for_slurm() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    script = SCRIPT.with_name("slurm_enhance_then_llava.sh")
    done = subprocess.run(["bash", str(script), "tiny"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "start it with sbatch" in done.stderr


def test_slurms_machines_become_a_hostfile_that_goes_with_the_job(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames two-nodes" ] && printf "one\\ntwo\\n"\n')
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nshift 2\necho "$@"\ncat "$4"\nexit 7\n')
    for program in (scontrol, python):
        program.chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "two-nodes", "SLURM_SUBMIT_DIR": str(SCRIPT.parent.parent), "SLURM_GPUS_ON_NODE": "4"}
    environment = {**os.environ, **job, "PYTHON": str(python), "TMPDIR": str(tmp_path)}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    script = SCRIPT.with_name("slurm_enhance_then_llava.sh")
    asked = ["bash", str(script), "vicuna-7b", "--dry_run"]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True)
    assert done.returncode == 7, "the chain's own status"
    words, *hosts = done.stdout.splitlines()
    assert words.split()[:3] == ["vicuna-7b", "--dry_run", "--hostfile"]
    assert hosts == ["one slots=4", "two slots=4"]
    assert {p.name for p in tmp_path.iterdir()} == {"scontrol", "python"}, "the hostfile goes with the job"


def test_the_script_finds_the_package_and_hands_on_what_it_gets(tmp_path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    asked = ["bash", str(SCRIPT), "tiny", "--dry_run", "--output_dir", str(tmp_path / "a run")]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"--output_dir '{tmp_path / 'a run'}'" in done.stdout
    missing = subprocess.run(asked, env={**environment, "PYTHON": "/bin/false"}, capture_output=True, text=True)
    assert missing.returncode == 2
    assert "make install" in missing.stderr
    assert missing.stderr.count("\n") == 1


def test_without_lmms_eval_nothing_is_begun(monkeypatch) -> None:
    from llava_genhancer.demo import demo

    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    for begin in (lambda: command.check(choices()), lambda: demo({}, Path("nowhere"))):
        with pytest.raises(InputError, match="lmms-eval is not installed"):
            begin()


def test_a_field_of_the_trainings_without_its_prefix_is_told_its_name() -> None:
    with pytest.raises(InputError, match=r"write --llava\.llm"):
        plan(choices("vicuna-7b", fields={"llm": "somewhere"}))


def test_the_plan_says_what_from_leaves_out() -> None:
    chosen = choices("vicuna-7b")
    words = running.show(plan(chosen), chosen, "finetune")
    assert "pretrain  (left out)" in words
    assert "finetune  (left out)" not in words
    with pytest.raises(InputError, match="this plan has the steps enhance"):
        running.show(plan(chosen), chosen, "nonsense")
