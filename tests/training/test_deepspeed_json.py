"""A DeepSpeed JSON is looked at before anything is loaded."""

import json

import pytest

from llava_genhancer.engine import check_deepspeed
from llava_genhancer.errors import InputError
from llava_genhancer.fields import Guards
from llava_genhancer.resources import resource_dir


def test_ours_are_accepted() -> None:
    paths = sorted((resource_dir("configs") / "deepspeed").glob("*.json"))
    assert len(paths) >= 4
    for path in paths:
        check_deepspeed(str(path))
    check_deepspeed(None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "is no DeepSpeed configuration"),
        ({"zero_optimization": 3}, "is no DeepSpeed configuration"),
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping', did you mean 'gradient_clipping'"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 9}}, r"zero_optimization\.stage: "),
        ({"zero_optimization": {"stage": 2, "overlap": True}}, r"zero_optimization\.overlap: Extra inputs"),
        ({"zero_optimization": {"offload_optimizer": {"device": "moon"}}}, r"offload_optimizer\.device: "),
    ],
)
def test_what_deepspeed_would_refuse_or_pass_over(tmp_path, content, words) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=words) as caught:
        check_deepspeed(str(path))
    assert "\n" not in str(caught.value)


def test_keys_that_we_do_not_know_are_deepspeeds_business(tmp_path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": "auto"}}))
    check_deepspeed(str(path))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_optimization": {"stage": 0}}, r"under zero_optimization\.stage 0, .*: use stage 1, 2 or 3"),
        ({"zero_optimization": {}}, r"under zero_optimization\.stage 0"),
        (
            {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto", "check_grad_overflow": False}},
            r"under bf16\.check_grad_overflow: false, .*: remove that",
        ),
    ],
)
def test_where_deepspeed_would_take_a_bad_step_none_can_be_skipped(tmp_path, settings, words) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    check_deepspeed(str(path), Guards())
    with pytest.raises(InputError, match=words):
        check_deepspeed(str(path), Guards(on_bad_step="skip"))
    for stage in (1, 2, 3):
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        check_deepspeed(str(path), Guards(on_bad_step="skip"))


def test_no_file_is_said(tmp_path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(InputError, match="does not exist"):
            check_deepspeed(str(path))
