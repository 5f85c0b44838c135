"""The command line: quick help, one line for every mistake, and the promised exit status."""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from llava_genhancer import __version__, cli, recipes
from llava_genhancer.errors import InputError, print_error

HEAVY = ("torch", "transformers", "numpy", "PIL", "diffusers", "deepspeed", "datasets", "matplotlib", "torchdata")


def verbs(parser: argparse.ArgumentParser, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every verb and every verb below a verb."""
    yield above
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from verbs(sub, (*above, name))


def run_cli(capsys, *argv: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def one_line(err: str) -> str:
    (line,) = err.splitlines()
    assert line.startswith("llava-genhancer")
    return line


def command(*argv: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "llava_genhancer", *argv], text=True, timeout=240, **options)


# --- help ---------------------------------------------------------------------------------------------------------


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    code = f"""
import contextlib, io, sys
from llava_genhancer import cli
for verb in {list(verbs(cli._parser()))!r}:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            cli.main([*verb, "--help"])
        except SystemExit as end:
            assert not end.code, (verb, end.code)
    assert "usage: llava-genhancer" in text.getvalue(), verb
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    cli.main(["recipes", "openai-l14-224"])
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_verb_is_explained(capsys) -> None:
    status, out, _ = run_cli(capsys, "--help")
    assert status == 0
    names = {path[0] for path in verbs(cli._parser()) if path}
    assert {"doctor", "recipes", "enhance", "export", "mmvp-vlm", "report", "demo"} <= names
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "]
    assert set(listed) == names
    assert run_cli(capsys, "--version")[1].strip() == __version__


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "VERB"),
        (("enhence",), "invalid choice: 'enhence', did you mean 'enhance'? (choose from doctor, "),
        (("ablate", "fig99"), "invalid choice: 'fig99', did you mean 'fig9'? (choose from table4, "),
        (("",), "invalid choice: ''"),
        (("recipes", "tiny", "extra"), "unknown argument extra"),
        (("recipes", "--jason"), "unknown argument --jason"),
        (("recipes", "tinny"), "unknown recipe 'tinny', did you mean 'tiny'?"),
        (("enhance", "tiny"), "--output_dir"),
        (("enhance", "--output_dir", "R"), "give a recipe's name or --config"),
        (("enhance", "tiny", "--config", "m.json", "--output_dir", "R"), "(one of them)"),
        (("enhance", "--config", "none.json", "--output_dir", "R"), "none.json does not exist"),
        (("enhance", "tiny", "--output_dir", "R", "--lora_rnk", "3"), "did you mean 'lora_rank'?"),
        (("enhance", "tiny", "--output_dir", "R", "--lora_rnk=3"), "did you mean 'lora_rank'?"),
        (("enhance", "--lora_rnk", "3", "tiny", "--output_dir", "R"), "did you mean 'lora_rank'?"),
        (("enhance", "tiny", "--output_dir", "R", "--lora_rank"), "--lora_rank: expected one argument"),
        (("enhance", "tiny", "--output_dir", "R", "--data", "--lora_rank", "3"), "--data: expected one argument"),
        (("enhance", "tiny", "--output_dir", "R", "--lora_rank", "x"), "lora_rank=x: needs a value of type int"),
        (("enhance", "tiny", "--output_dir", "R", "3"), "unknown argument 3"),
        (("enhance", "tiny", "--output_dir", "R", "--stage", "3"), "--stage: invalid choice: 3"),
        (
            ("enhance", "tiny", "--output_dir", "R", "--stage1.max_steps", "4", "--stage1.warmup_steps", "5"),
            "stage1: warmup_steps=5 must lie between 0 and max_steps=4: lower it",
        ),
        (("enhance", "tiny", "--output", "R"), "did you mean '--output_dir'?"),
        (("enhance", "tiny", "--output_dir", "R", "--stage2.lr", "1"), "did you mean 'stage2.learning_rate'?"),
        (
            ("enhance", "tiny", "--output_dir", "R", "--lr", "1"),
            "did you mean 'stage1.learning_rate' or 'stage2.learning_rate'?",
        ),
        (("enhance", "tiny", "--output_dir", "R", "--batch_size=1"), "did you mean 'global_batch_size'?"),
        (("enhance", "tiny", "--Output-Dir", "R"), "did you mean '--output_dir'?"),
        (
            ("enhance", "tiny", "--output_dir", "R", "--learning-rate", "1"),
            "did you mean 'stage1.learning_rate' or 'stage2.learning_rate'?",
        ),
        (("enhance", "tiny", "--output_dir", "R", "--epochs", "1"), "'stage2.max_steps'"),
        (("llava", "finetune", "tiny", "--output_dir", "R", "--epochs", "1"), "'finetune.epochs'"),
        (("llava", "pretrain", "tiny", "--out_dir", "R"), "did you mean '--output_dir'?"),
        (("mmvp-vlm", "T", "--data", "D", "--output_dir", "R"), "did you mean '--output'?"),
        (("report", "R", "--base_line", "R"), "did you mean '--baseline'?"),
        (("enhance", "tiny", "--output_d", "R"), "--output_dir"),  # no abbreviations
        (("export", "nowhere", "--output_dir", "T"), "nowhere"),
        (("export", "nowhere", "--output_dir", "T", "--lora_scale", "much"), "invalid float value: 'much'"),
        (("report", "nowhere"), "nowhere"),
        (("demo", "--seeds", "many"), "invalid int value: 'many'"),
        (("convert", "toyworld:clip", "--output_dir", "D"), "toyworld:clip is neither a folder here nor a model of"),
        (("doctor", "openai-l14-225"), "did you mean 'openai-l14-224'?"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, argv, words) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run_cli(capsys, *argv)
    assert status == 2
    assert out == ""
    assert words in one_line(err)
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


def test_interrupted_is_130(capsys, monkeypatch) -> None:
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "get_recipe", interrupt)
    status, _, err = run_cli(capsys, "recipes", "tiny")
    assert status == 130
    assert "interrupted" in one_line(err)


def test_a_bug_keeps_its_traceback(monkeypatch) -> None:
    def bug(name):
        raise ZeroDivisionError

    monkeypatch.setattr(recipes, "get_recipe", bug)
    with pytest.raises(ZeroDivisionError):
        cli.main(["recipes", "tiny"])


def launch(tmp_path: Path, ranks: Sequence[int], *argv: str, **environment: str) -> list[str]:
    """Run ranks of one launch of three at once, and return all lines of their stderr."""
    common = {**os.environ, "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29123", **environment}
    command = [sys.executable, "-m", "llava_genhancer", *argv]
    processes = [
        subprocess.Popen(
            command,
            env={**common, "TMPDIR": str(tmp_path), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    lines = [line for process in processes for line in process.communicate(timeout=120)[1].splitlines()]
    assert [process.returncode for process in processes] == [2] * len(processes)
    return lines


@pytest.mark.parametrize("argv", [("recipes", "tinny"), ("recipes", "--jason")])
def test_an_error_of_all_ranks_is_one_line_and_so_is_that_of_one_rank(tmp_path, argv) -> None:
    for ranks in ([0, 1, 2], [2], [1], [0, 1, 2]):
        (line,) = launch(tmp_path, ranks, *argv)
        assert line.startswith("llava-genhancer")


def test_ranks_that_find_an_earlier_launch_s_claim_at_once_print_one_line(tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "4")
    fork = multiprocessing.get_context("fork")

    def fail(rank: int, barrier) -> None:
        os.environ["RANK"] = str(rank)
        barrier.wait()
        print_error("no data")

    for _ in range(25):
        barrier = fork.Barrier(4)
        ranks = [fork.Process(target=fail, args=(rank, barrier)) for rank in range(4)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        assert capfd.readouterr().err == "llava-genhancer: no data\n"
        time.sleep(0.02)  # a process's begin is known to a hundredth of a second


def test_two_errors_are_two_lines_and_a_rank_s_number_makes_no_other_error(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, message in enumerate(("rank 0: disk full", "rank 1: disk full", "no data", "rank 3: disk full")):
        monkeypatch.setenv("RANK", str(rank))
        print_error(message)
    assert capsys.readouterr().err == "llava-genhancer: rank 0: disk full\nllava-genhancer: no data\n"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere" / "\0"))
    print_error("no data")
    assert capsys.readouterr().err == "llava-genhancer: no data\n", "rather twice than never"


def test_the_deepspeed_launchers_argument_is_ignored(capsys) -> None:
    plain = run_cli(capsys, "recipes", "tiny")
    assert run_cli(capsys, "--local_rank=3", "recipes", "tiny") == plain


# --- recipe fields ------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch) -> list[recipes.Recipe]:
    """The recipes that `enhance` is called with."""
    from llava_genhancer.enhance import train

    got: list[recipes.Recipe] = []
    monkeypatch.setattr(train, "enhance", lambda recipe, *args, **kwargs: got.append(recipe))
    return got


@pytest.mark.parametrize(
    "argv",
    [
        ("openai-l14-224", "--output_dir", "R", "--lora_rank", "3", "--t_shift", "-0.5", "--stage2.max_steps=10"),
        ("--lora_rank", "3", "--t_shift=-0.5", "--stage2.max_steps", "10", "openai-l14-224", "--output_dir", "R"),
        ("--output_dir=R", "--t_shift", "-0.5", "openai-l14-224", "--lora_rank=9", "--lora_rank=3",
         "--stage2.max_steps=10"),
    ],
)  # fmt: skip
def test_fields_stand_anywhere_and_the_last_one_counts(capsys, seen, argv) -> None:
    fields = {"lora_rank": 3, "t_shift": -0.5, "stage2.max_steps": 10}
    assert run_cli(capsys, "enhance", *argv)[0] == 0
    assert seen == [recipes.override(recipes.get_recipe("openai-l14-224"), fields)]


@pytest.mark.parametrize("name", ["openai-l14-336", "siglip-so400m-384"])
def test_recipes_json_goes_back_in_as_config(capsys, tmp_path, seen, name) -> None:
    status, out, _ = run_cli(capsys, "recipes", name, "--json")
    assert status == 0
    (tmp_path / "recipe.json").write_text(out)
    (tmp_path / "manifest.json").write_text(json.dumps({"recipe": json.loads(out)}))
    for file in ("recipe.json", "manifest.json", ""):
        argv = ("enhance", "--config", tmp_path / file, "--lora_rank", "5", "--output_dir", tmp_path / "R")
        assert run_cli(capsys, *argv)[0] == 0
    assert seen == [recipes.override(recipes.get_recipe(name), {"lora_rank": 5})] * 3


def test_recipes_lists_all_and_prints_every_field(capsys) -> None:
    status, out, _ = run_cli(capsys, "recipes")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()][: len(recipes.RECIPES)] == list(recipes.RECIPES)
    assert json.loads(run_cli(capsys, "recipes", "--json")[1]).keys() >= recipes.RECIPES.keys()
    for name in recipes.RECIPES:
        out = run_cli(capsys, "recipes", name)[1]
        printed = dict(line[2:].partition(" ")[::2] for line in out.splitlines() if line.startswith("--"))
        assert recipes.override(recipes.Recipe(), printed) == recipes.get_recipe(name)


def test_recipes_prints_no_field_that_it_would_refuse(capsys) -> None:
    """What another denoiser reads stands in one line at the end."""
    everything = list(recipes.to_dict(recipes.Recipe()))
    for name in ("tiny", "tiny-masked", "tiny-dcr"):
        *lines, last = run_cli(capsys, "recipes", name)[1].splitlines()
        unread = last.partition(": ")[2].split(", ")
        assert last.startswith(f"not read with --denoiser {recipes.get_recipe(name).denoiser}: ")
        printed = [line[2:].partition(" ")[0] for line in lines if line.startswith("--")]
        assert [field for field in everything if field not in unread] == printed
        with pytest.raises(InputError, match="has no meaning with denoiser"):
            recipes.override(recipes.get_recipe(name), {unread[0]: "other"})


# --- pipes --------------------------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = command("recipes", "tiny", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = command("recipes", "tiny", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert "No space left on device" in one_line(done.stderr)


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed) -> None:
    for verb, status in (("recipes tiny", 0), ("recipes tinny", 2)):
        words = ["bash", "-c", f"{sys.executable} -m llava_genhancer {verb} {closed}"]
        done = subprocess.run(words, capture_output=True, timeout=120)
        assert done.returncode == status, done.stderr
        assert b"Traceback" not in done.stderr


def test_what_is_printed_to_a_closed_stream_ends_in_no_file(tmp_path) -> None:
    """The next file that is opened would get the stream's number."""
    code = "import os, sys; from llava_genhancer.arguments import prepare_streams; prepare_streams(); "
    code += f"f = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'noise'); print('noise'); f.write('mine')"
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" <&- >&-'], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("environment", [ASCII, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_word_outside_ascii_under_an_ascii_locale(environment) -> None:
    done = command("recipes", "größe 図", env={**os.environ, **environment}, capture_output=True)
    assert done.returncode == 2
    assert "unknown recipe" in one_line(done.stderr)


def test_folders_outside_ascii_under_an_ascii_locale(tmp_path, images_folder) -> None:
    folder = tmp_path / "größe 図"
    shutil.copytree(images_folder, folder)
    words = ["doctor", "tiny", "--data", str(folder), "--output_dir", str(folder / "läuft")]
    done = command(*words, env={**os.environ, **ASCII}, capture_output=True)
    assert "Traceback" not in done.stderr
    assert "the first image decodes" in done.stdout


@pytest.mark.parametrize(("question", "stdin"), [("", "<&-"), ("--question 'größer? 図'", "</dev/null")])
def test_chat_without_stdin_ends(question, stdin, llava_folders, images_folder) -> None:
    image = next(images_folder.iterdir())
    words = f"{sys.executable} -m llava_genhancer llava chat {llava_folders}/hf {image} --max_new_tokens 2"
    asked = ["bash", "-c", f"{words} {question} {stdin}"]
    done = subprocess.run(asked, env={**os.environ, **ASCII}, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr


def test_a_training_ends_with_what_was_made_and_the_next_command(tiny_fields, tmp_path) -> None:
    """And without a word of DeepSpeed, which it does not use."""
    fields = {**tiny_fields, "stage1.max_steps": 1, "stage2.max_steps": 1, "sample_images": 0}
    words = [f"--{name}={value}" for name, value in fields.items()]
    run_dir = tmp_path / "run"
    for stage, ending in (("1", ["--stage2.max_steps", "1"]), (None, ["--data", "MMVP_VLM"])):
        asked = ["enhance", "tiny", "--output_dir", str(run_dir), *words, *(["--stage", stage] if stage else [])]
        done = command(*asked, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert "accelerator" not in done.stdout + done.stderr
        made, following = done.stdout.splitlines()
        assert made == f"done: {run_dir / ('stage1' if stage else 'tower')}"
        assert following.startswith("next: llava-genhancer ")
        assert " ".join(ending) in following
    assert cli._parser().parse_args(following.split()[2:]).towers == [str(tiny_fields["backbone"]), f"{run_dir}/tower"]
