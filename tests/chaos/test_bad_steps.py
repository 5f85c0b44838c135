"""Steps gone bad in one process: stopped, or skipped so that nothing moves, and decided alike after a resume."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llava_genhancer import recipes, run
from llava_genhancer.enhance.train import EnhanceTrainer, enhance
from llava_genhancer.errors import InputError
from llava_genhancer.fields import Guards
from llava_genhancer.guard import BadStep, LossGuard, LossSpike, NonFiniteLoss

STEP = 14  # a spike needs ten steps before it


@pytest.fixture(scope="module")
def recipe(tiny_fields):
    """Sixteen steps of stage 1, with snapshots around the bad one."""

    def build(**changes) -> recipes.Recipe:
        fields = {
            **tiny_fields,
            "sample_images": 0,
            "stage1.max_steps": 16,
            "stage1.save_steps": 4,
            "stage1.snapshot_steps": "13,14,15",
            "stage2.max_steps": 0,
            "stage2.snapshot_steps": "",
            **changes,
        }
        return recipes.override(recipes.Recipe(name="test"), fields)

    return build


@pytest.fixture(scope="module")
def factor():
    """Multiplies the loss of the first micro-batch of step 14, however often it is reached."""
    patch = pytest.MonkeyPatch()

    def spoil(value: float) -> None:
        patch.undo()
        original = EnhanceTrainer.batch_loss

        def batch_loss(self, model, inputs, num_items):
            loss = original(self, model, inputs, num_items)
            first = not self.accelerator.sync_gradients
            return loss * value if self.state.global_step + 1 == STEP and first else loss

        patch.setattr(EnhanceTrainer, "batch_loss", batch_loss)

    yield spoil
    patch.undo()


@pytest.fixture(scope="module")
def skipped(recipe, factor, tmp_path_factory):
    """A run that skipped a spike."""
    factor(1e6)
    run_dir = tmp_path_factory.mktemp("skipped") / "run"
    enhance(recipe(on_bad_step="skip", spike_factor=50), run_dir, stages=(1,))
    return run_dir


def snapshots(run_dir):
    return [load_file(run_dir / "stage1" / "snapshots" / f"step-{s}.safetensors") for s in (13, 14, 15)]


def check_skipped(run_dir, keys: int) -> list[str]:
    """Nothing moved in the bad step, which is on record with its ``keys``."""
    before, at, after = snapshots(run_dir)
    assert all(torch.equal(before[n], at[n]) for n in before)
    assert any(not torch.equal(at[n], after[n]) for n in at)
    stage = run_dir / "stage1"
    assert run.read_json(stage / "result.json")["skipped_steps"] == [STEP]
    history = run.read_json(stage / "log_history.json")
    assert all(math.isfinite(entry["loss"]) for entry in history), "one bad step must not spoil the log"
    (line,) = (json.loads(text) for text in (stage / "bad-steps-rank0.jsonl").read_text().splitlines())
    assert (line["step"], line["rank"]) == (STEP, 0)
    assert len(line["keys"]) == keys
    return line["keys"]


def test_a_skipped_spike_moves_nothing_and_all_of_its_step_is_on_record(skipped) -> None:
    check_skipped(skipped, keys=8)


def test_a_skipped_nan_moves_nothing_and_its_micro_batch_is_on_record(recipe, factor, tmp_path, caplog) -> None:
    factor(math.nan)
    enhance(recipe(on_bad_step="skip"), tmp_path / "run", stages=(1,))
    keys = check_skipped(tmp_path / "run", keys=4)
    assert f"the loss is nan in step 14 on rank 0: skipped; batch keys: {keys[0]}" in caplog.text


def test_a_resumed_run_skips_alike(skipped, recipe, factor, tmp_path) -> None:
    """A spike is judged by the steps before it: those of before the checkpoint count too."""
    factor(1e6)
    shutil.copytree(skipped, tmp_path / "resumed")
    stage = tmp_path / "resumed" / "stage1"
    for path in (stage / "result.json", stage / "weights.safetensors", stage / "checkpoint-16" / run.MARKER):
        path.unlink()
    enhance(recipe(on_bad_step="skip", spike_factor=50), tmp_path / "resumed", stages=(1,))
    results = [run.read_json(d / "stage1" / "result.json") for d in (skipped, tmp_path / "resumed")]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert [r["skipped_steps"] for r in results] == [[STEP], [STEP]]


def test_a_spike_stops_before_the_step_is_taken_and_the_same_folder_can_skip(recipe, factor, tmp_path) -> None:
    factor(1e6)
    with pytest.raises(LossSpike, match=r"loss of step 14 is .* times the usual one; batch keys: \d+\.jpg"):
        enhance(recipe(spike_factor=50), tmp_path / "run", stages=(1,))
    assert run.checkpoints(tmp_path / "run" / "stage1")[-1].name == "checkpoint-12"
    enhance(recipe(spike_factor=50, on_bad_step="skip"), tmp_path / "run", stages=(1,))
    assert run.read_json(tmp_path / "run" / "stage1" / "result.json")["skipped_steps"] == [STEP]


@pytest.fixture
def guard(tmp_path):
    return lambda policy: LossGuard(policy, tmp_path, 0, lambda value: value)


def feed(guard: LossGuard, losses, start: int = 1) -> list[bool]:
    """Which of the losses, a step each, are made NaN."""
    return [
        bool(guard.before_backward(torch.tensor(loss), step, ["a"], last=True).isnan())
        for step, loss in enumerate(losses, start)
    ]


def test_what_a_spike_is(guard) -> None:
    policy = Guards(on_bad_step="skip", spike_factor=3.0)
    assert not any(feed(guard(policy), [1.0] * 9 + [1e9])), "too few steps to know what is usual"
    assert feed(guard(policy), [1.0] * 10 + [3.0, 3.1]) == [False] * 11 + [True], "above the factor, not at it"
    slow = [1.02**i for i in range(200)]
    assert not any(feed(guard(policy), slow)), "what rises slowly is not a spike"
    assert not any(feed(guard(policy), [1.0] * 20 + [math.inf])), "that shows in the gradient"
    settled = guard(policy)
    assert feed(settled, [1.0] * 20 + [9.0, 1.0]) == [False] * 20 + [True, False], "a skipped loss is not usual"
    assert not any(feed(guard(Guards(on_bad_step="skip")), [1.0] * 20 + [1e9])), "factor 0: never"


def test_its_state_goes_through_json(guard) -> None:
    policy = Guards(on_bad_step="skip", spike_factor=3.0)
    first, second = guard(policy), guard(policy)
    feed(first, [1.0 + 0.1 * math.sin(i) for i in range(70)])
    first.drop(70)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert second.skipped == [70]


def test_too_many_skipped_steps_stop(guard) -> None:
    patient = guard(Guards(on_bad_step="skip", max_skipped_steps=2))
    patient.drop(3)
    patient.drop(8)
    with pytest.raises(BadStep, match="steps 3, 8, 9 had to be skipped, more than --max_skipped_steps 2"):
        patient.drop(9)


def test_a_loss_is_looked_at_one_micro_batch_later(guard) -> None:
    watched = guard(Guards())
    watched.after_backward(torch.tensor(float("nan")), 1, ["x"])
    watched.check(pending=1)
    watched.after_backward(torch.tensor(1.0), 1, ["y"])
    with pytest.raises(NonFiniteLoss, match="step 1 on rank 0; batch keys: x"):
        watched.check(pending=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spike_factor": 0.5}, "must be above 1, or 0 for never"),
        ({"max_skipped_steps": -1}, "must not be negative"),
        ({"timeout_minutes": 0}, "must be positive"),
    ],
)
def test_what_no_training_can_go_by_is_refused(recipe, change, words) -> None:
    with pytest.raises(InputError, match=words):
        recipe(**change)
