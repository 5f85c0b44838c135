"""The lines that a training prints where there is no terminal."""

from types import SimpleNamespace

import pytest

from llava_genhancer.callbacks import Progress


@pytest.mark.parametrize(
    ("step", "left"), [(1_000, "0 s"), (998, "1.0 s"), (901, "49.5 s"), (800, "1 min 40 s"), (-20_000, "2 h 55 min")]
)
def test_the_time_left_has_a_unit_of_its_size(tmp_path, capsys, step, left) -> None:
    progress = Progress(SimpleNamespace(rank=0, world_size=2, stage_dir=tmp_path / "stage1"))  # type: ignore[arg-type]
    args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=3)
    state = SimpleNamespace(max_steps=1_000, global_step=step)
    progress.on_train_begin(args, state, None)
    progress.on_log(args, state, None, logs={"loss": 0.5, "images_per_second": 48.0})  # two steps a second
    progress.on_train_end(args, state, None)
    assert capsys.readouterr().err == f"stage1 step {step}/1000: loss 0.5000, 48 images/s, {left} left\n"
