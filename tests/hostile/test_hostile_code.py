"""Nothing that a file, a name or a caption holds is executed, and nothing leaves the folder it belongs to."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import llava_genhancer
from llava_genhancer import run
from llava_genhancer.chain.running import words_of
from llava_genhancer.chain.steps import Choices, plan
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.markdown import code, table, text
from llava_genhancer.evaluate.report import gallery
from llava_genhancer.evaluate.report.html import page
from llava_genhancer.tower.export import MARKER, verify_tower

PACKAGE = Path(llava_genhancer.__file__).parent
SHELL = "$(touch bait) `touch bait`; touch bait & 'a' \"b\" | c > bait\\"


class Bait:
    """What its pickle, once loaded by a plain unpickler, leaves behind is a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.path))}",)


# --- pickles ------------------------------------------------------------------------------------------------------


def test_the_bait_works(tmp_path: Path) -> None:
    torch.save(Bait(tmp_path / "bait"), tmp_path / "a.bin")
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert (tmp_path / "bait").exists()


def test_a_pickle_as_a_backbone(tiny_clip: Path, tmp_path: Path) -> None:
    from llava_genhancer.enhance.backbones import load_full_model

    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"logit_scale": Bait(tmp_path / "bait")}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="weights cannot be loaded"):
        load_full_model(str(folder))
    assert not (tmp_path / "bait").exists()


def test_a_pickle_as_a_language_model(tmp_path: Path) -> None:
    from llava_genhancer.llava.checkpoint import read_shards

    torch.save({"lm_head.weight": Bait(tmp_path / "bait")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        read_shards(tmp_path)
    assert not (tmp_path / "bait").exists()


def test_a_pickle_in_a_checkpoint(tmp_path: Path) -> None:
    """One whose marker was forged with it: the hash is right."""
    from llava_genhancer.trainer import ExactTrainer

    torch.save({"loader": Bait(tmp_path / "bait")}, tmp_path / "loader_0.pt")
    trainer = SimpleNamespace(rank=0, loader=None)
    with pytest.raises(InputError, match="is no data position"):
        ExactTrainer._load_data_position(trainer, tmp_path)  # type: ignore[arg-type]
    assert not (tmp_path / "bait").exists()


def test_no_call_unpickles_or_asks_a_shell() -> None:
    loads = 0
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "eval").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            assert not [word for word in node.keywords if word.arg == "shell"], path
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            assert name not in ("system", "popen", "extractall", "unpack_archive", "full_load", "unsafe_load"), path
            if name in ("load", "loads") and ast.unparse(node.func).startswith(
                ("torch.", "pickle.", "yaml.", "joblib.")
            ):
                if ast.unparse(node.func) == "torch.jit.load":  # OpenAI's own files; TorchScript reaches no Python
                    continue
                assert ast.unparse(node.func) == "torch.load", path
                assert "weights_only=True" in ast.unparse(node), path
                loads += 1
    assert loads >= 3, "the search finds what is there"


# --- names --------------------------------------------------------------------------------------------------------


def test_shell_characters_in_paths_stay_characters(tmp_path: Path, monkeypatch) -> None:
    """From the plan to the words that a process is started with, and back through a shell where they are printed."""
    monkeypatch.chdir(tmp_path)
    choices = Choices(preset="vicuna-7b", run_dir=Path(SHELL), data=SHELL, mmvp=SHELL, baseline=True)
    for step in plan(choices):
        words = words_of(step, choices)
        assert any(SHELL in word for word in words), step.name
        printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {shlex.join(words)}"], capture_output=True, check=True)
        assert printed.stdout.decode().split("\0")[:-1] == list(words)
    assert not (tmp_path / "bait").exists()


def test_the_script_passes_words_on_as_they_are(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || printf \'%s\\0\' "$@" > {shlex.quote(str(tmp_path))}/words\n')
    python.chmod(0o755)
    words = ["tiny", "--output_dir", SHELL, "--data", "* ~ $HOME\nend", ""]
    script = PACKAGE.parent / "scripts" / "enhance_then_llava.sh"
    environment = {**os.environ, "PYTHON": str(python)}
    subprocess.run(["bash", str(script), *words], env=environment, cwd=tmp_path, check=True, timeout=20)
    assert (tmp_path / "words").read_text().split("\0")[:-1] == ["-m", "llava_genhancer.chain", *words]
    assert not (tmp_path / "bait").exists()


def test_ids_and_captions_in_the_manifest_are_data(tmp_path: Path, monkeypatch) -> None:
    from llava_genhancer.recipes import Recipe

    monkeypatch.setattr(sys, "argv", ["llava-genhancer", SHELL])
    run.open_run(tmp_path / "run", Recipe(data=SHELL, name=SHELL), world_size=1)
    assert run.recipe_of(tmp_path / "run").data == os.path.abspath(SHELL)
    assert run.read_json(tmp_path / "run" / run.MANIFEST)["command"] == ["llava-genhancer", SHELL]


@pytest.mark.parametrize("name", ["../../weights.safetensors", "/etc/hostname", "a/b.safetensors"])
def test_a_marker_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text(json.dumps({"weights": {name: "0" * 64}}))
    with pytest.raises(InputError, match="which is no name of a file in it"):
        verify_tower(tmp_path)


def test_weights_of_another_format_by_the_right_hash(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    weights = {"model.safetensors": run.sha256(tmp_path / "model.safetensors")}
    (tmp_path / MARKER).write_text(json.dumps({"weights": weights}))
    with pytest.raises(InputError, match="cannot be read"):
        verify_tower(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", '{"weights_byte": 1}', "[" * 5000, '{"weights_bytes": [1]}'])
def test_a_stages_result_that_is_none(content: str, tmp_path: Path) -> None:
    from llava_genhancer.engine import stage_result

    (tmp_path / "result.json").write_text(content)
    (tmp_path / "weights.safetensors").touch()
    if content.startswith('{"weights_bytes"'):
        assert stage_result(tmp_path) is None
    else:
        with pytest.raises(InputError, match=r"result\.json"):
            stage_result(tmp_path)


# --- captions -----------------------------------------------------------------------------------------------------

CAPTIONS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "</figcaption></figure><iframe src=//evil>",
    "[click](javascript:alert(1))",
    "![x](https://evil/x.png)",
    "&lt;script&gt; ${7*7} {{7*7}}",
]
ALLOWED = {
    "a", "b", "body", "br", "code", "details", "div", "figcaption", "figure", "h1", "h2", "h3", "head", "html", "img",
    "meta", "nav", "p", "pre", "style", "summary", "table", "tbody", "td", "th", "thead", "title", "tr",
}  # fmt: skip


class Tags(HTMLParser):
    """All tags of a page, with their attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("caption", CAPTIONS)
def test_html_in_captions_questions_and_answers_is_shown(caption: str, tmp_path: Path) -> None:
    sample = {"input": caption, "target": [caption], "filtered_resps": [caption], "mmvp": {"right": False}}
    task = SimpleNamespace(documents={7: sample}, item=lambda number: sample["mmvp"])
    card = gallery._card(7, task, task, (caption, caption), None)  # type: ignore[arg-type]
    body = f"# {text(caption)}\n\n{table([text(caption)], [[code(caption)]])}\n\n{text(caption)}"
    made = page(caption, body, tmp_path, gallery=card)
    for tag, attributes in Tags(made).found:
        assert tag in ALLOWED
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert re.match(r"#|data:image/|$", attributes.get(name) or ""), (tag, attributes)
    assert "script" not in {tag for tag, _ in Tags(made).found}
    assert "default-src 'none'" in made
