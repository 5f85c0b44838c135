"""Every argument, recipe field and environment variable that names a path understands ``~`` and relative paths."""

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_genhancer import arguments, cli, recipes, run
from llava_genhancer.chain import command
from llava_genhancer.chain.steps import Choices, plan
from llava_genhancer.errors import InputError
from llava_genhancer.files import expand
from llava_genhancer.llava.recipes import LlavaRecipe

# Text arguments that are no paths. A new argument is either declared with type=path or named here.
NO_PATHS = {
    "recipe", "ablation", "preset", "verb", "llava_verb", "to", "activation", "dtype", "device", "labels", "tasks",
    "model_args", "conversation", "question", "lora_scale", "start", "step",
}  # fmt: skip
NO_PATH_FIELDS = {"name", "conversation"}


def declared(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, argparse.Action]]:
    """Every argument of every verb but recipe fields, which have a test of their own."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from declared(sub)
        elif action.nargs != 0 and not isinstance(action, arguments._Field):
            yield parser, action


def test_every_path_argument_of_every_verb_is_expanded(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    paths = 0
    for parser, action in [*declared(cli._parser()), *declared(command.parser())]:
        if action.type in (int, float) or action.dest in NO_PATHS:
            continue
        where = f"{parser.prog}: {action.option_strings or action.dest}"
        assert action.type is arguments.path, f"{where}: declare it with type=path, or name it in NO_PATHS"
        assert parser._get_value(action, "~/x") == "/home/somebody/x"
        assert parser._get_value(action, "openai/clip-vit-large-patch14") == "openai/clip-vit-large-patch14"
        paths += 1
    assert paths > 50


@pytest.mark.parametrize("recipe", [recipes.Recipe(), LlavaRecipe()])
def test_every_path_field_of_a_recipe_is_expanded_however_the_recipe_is_built(recipe, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    texts = [n for n, kind in recipes.field_types(type(recipe)).items() if kind in (str, str | None)]
    for name in set(texts) - NO_PATH_FIELDS - {f"{step}.conversation" for step in ("pretrain", "finetune")}:
        for given, expected in (
            ("~/x", "/home/somebody/x"), (Path("~/x"), "/home/somebody/x"), ("here", str(tmp_path / "here")),
        ):  # fmt: skip
            masked = {"denoiser": "masked", "condition_into": "txt", "txt_dim": 3072}
            fields = {name: given, **(masked if name == "vq" else {})}
            read = recipes.override(recipe, fields)
            assert recipes.to_dict(read)[name] == expected, name
            assert recipes.from_dict(recipes.to_dict(read), type(recipe)) == read
    assert dataclasses.replace(recipe, cache_folder="~/c").cache_folder == "/home/somebody/c"


def test_names_that_are_no_paths_stay_as_they_are(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("openai/clip-vit-large-patch14", "hf://owner/name/folder", "genhancer:openai-l14-224", "toyworld:clip",
                 "/absolute", "hf:ORG/NAME:train"):  # fmt: skip
        assert expand(name) == name
        assert recipes.override(recipes.Recipe(), {"backbone": name}).backbone == name
    assert recipes.override(recipes.Recipe(), {"data": "hf:ORG/NAME:train"}).data == "hf:ORG/NAME:train"
    with pytest.raises(InputError, match="no user's home folder"):
        expand("~nobody-is-called-so/x")


@pytest.mark.parametrize("pattern", ["~/shards/{0..1}.tar", "{~/shards/0,~/shards/1}.tar", "~/shards/*.tar"])
def test_patterns_of_shards_below_the_home_folder(monkeypatch, tmp_path, images_folder, pattern) -> None:
    import tarfile

    from llava_genhancer.data.images import open_source

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "shards").mkdir()
    for shard, file in enumerate(sorted(images_folder.iterdir())[:2]):
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as tar:
            tar.add(file, file.name)
    data = recipes.override(recipes.Recipe(), {"data": pattern}).data
    assert len(open_source(data)) == len(open_source(pattern)) == 2


def test_the_chain_gives_every_step_the_same_folders(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    chosen = Choices(
        preset="vicuna-7b", run_dir=Path("~/run"), tower="~/tower", mmvp="~/m", zero_shot="~/z", baseline=True,
        llava_data=Path("~/l"), lmms_data=Path("~/b"), hostfile="~/h", deepspeed="~/d.json", fork_python="~/env/python",
        fields={"llava.llm": "~/llm", "llava.cache_folder": "~/c", "backbone": "~/clip"},
    )  # fmt: skip
    words = [word for step in plan(chosen) for word in step.command]
    assert not [w for w in words if w.startswith("~/") and w not in ("~/llm", "~/c")], "fields are read by each step"
    assert chosen.fork_python == str(tmp_path / "env/python")


def test_a_whole_run_below_the_home_folder(monkeypatch, tmp_path, capsys, tiny_fields) -> None:
    """Stages, tower, export and card lie in one folder, and the manifest names files from any folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("backbone", "vae", "data"):
        shutil.copytree(tiny_fields[name], tmp_path / name)
    short = {
        "stage1.max_steps": 1,
        "stage1.warmup_steps": 0,
        "stage2.max_steps": 1,
        "sample_images": 0,
        "stage2.snapshot_steps": "",
    }
    fields = {**tiny_fields, **short, "backbone": "backbone", "vae": "~/vae", "data": "./data"}
    words = [f"--{name}={value}" for name, value in fields.items()]
    (tmp_path / "elsewhere").mkdir()
    for words_, folder in (
        (["enhance", "tiny", "--output_dir=~/run", *words], tmp_path),
        (["enhance", "--config=~/run/manifest.json", "--output_dir=~/run"], tmp_path / "elsewhere"),
        (["export", "~/run", "--output_dir=~/half", "--lora_scale", "0.5"], tmp_path / "elsewhere"),
    ):
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit) as end:
            cli.main(words_)
        assert not end.value.code, f"{words_}: {capsys.readouterr().err}"
    assert not list(tmp_path.rglob("~*"))
    assert {"manifest.json", "stage1", "stage2", "tower"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert run.recipe_of("~/run").backbone == str(tmp_path / "backbone")
    assert (tmp_path / "half" / "llava_genhancer.json").is_file()


def test_python_functions_take_the_home_folder(monkeypatch, tmp_path, tiny_clip, images_folder, tiny_fields) -> None:
    from llava_genhancer import engine
    from llava_genhancer.convert.convert import convert
    from llava_genhancer.data.images import open_source
    from llava_genhancer.enhance.train import enhance
    from llava_genhancer.evaluate.towers import load_tower
    from llava_genhancer.tower.export import is_tower, verify_tower

    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_clip, tmp_path / "clip")
    shutil.copytree(images_folder, tmp_path / "images")
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert len(open_source("~/images")) == 40
    assert load_tower("~/clip").weights
    assert convert("~/clip", "~/other", to="open_clip") == tmp_path / "other"
    engine.check_deepspeed("~/zero.json")
    recipe = recipes.override(recipes.Recipe(), {**tiny_fields, "stage1.max_steps": 0, "stage2.max_steps": 0})
    assert enhance(recipe, "~/run") == tmp_path / "run" / "tower"
    assert is_tower("~/run/tower")
    assert verify_tower("~/run/tower")["source"] == str(tiny_clip)
    assert os.listdir(tmp_path / "run")


def test_environment_variables_that_name_folders(monkeypatch, tmp_path) -> None:
    from llava_genhancer.convert.released import _cache
    from llava_genhancer.evaluate.mllm.start import checkpoint_folder
    from llava_genhancer.toyworld.paths import cache_folder

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLAVA_GENHANCER_CACHE", "~/cache")
    monkeypatch.setenv("LLAVA_GENHANCER_RUN", "~/run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert cache_folder().parent == _cache().parent == tmp_path / "cache"
    assert checkpoint_folder(None) == tmp_path / "run"
