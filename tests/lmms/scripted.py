"""An lmms-eval model that says what a JSON file holds: task to replies, in the documents' order."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> list[ModelManifest]:
    """Another package's plug-in beside ours."""
    return [
        ModelManifest("scripted", simple_class_path="scripted.Scripted"),
        ModelManifest("scripted_chat", chat_class_path="scripted.ScriptedChat"),
    ]


class Scripted(lmms):
    """Simple form: a document is fetched by task, split and number."""

    is_simple = True
    seen: list[tuple[str, int, str, int]] = []  # noqa: RUF012 - task, number, prompt, images: for the tests to read

    def __init__(self, replies: str, **_: Any):
        super().__init__()
        self.device = torch.device("cpu")
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.replies = json.loads(Path(replies).read_text())

    def generate_until(self, requests: list[Any]) -> list[str]:
        said = []
        for prompt, _, images, number, task, split in (r.args for r in requests):
            pictures = images(self.task_dict[task][split][number])
            self.seen.append((task, number, prompt, len(pictures)))
            said.append(self.replies[task][number])
        return said

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError


class ScriptedChat(Scripted):
    """Chat form: a document's messages hold the images and the words."""

    is_simple = False

    def generate_until(self, requests: list[Any]) -> list[str]:
        said = []
        for _, messages, _, number, task, split in (r.args for r in requests):
            (turn,) = messages(self.task_dict[task][split][number])
            words = [part["text"] for part in turn["content"] if part["type"] == "text"]
            self.seen.append((task, number, words[0], sum(part["type"] == "image" for part in turn["content"])))
            said.append(self.replies[task][number])
        return said
