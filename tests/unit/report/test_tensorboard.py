from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron.moevement.report.tensorboard import TensorBoardScalars
from tests.unit.report.synthetic import disturbed_run, iteration


def test_replayed_iterations_do_not_double(tmp_path: Path) -> None:
    writers: list[TensorBoardScalars] = []
    for item in disturbed_run():
        if item["kind"] == "start":
            # A killed worker never closes its writer.
            writers.append(TensorBoardScalars(tmp_path, 1024))
        writers[-1](item)
    writers[-1].close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    points = read.Scalars("lm loss")
    assert [point.step for point in points] == list(range(1, 17))
    assert abs(points[4].value - 4.6) < 1e-6
    assert [(p.step, p.value) for p in read.Scalars("sparse-ckpt/recovery-replays")] == [(7, 3.0)]
    assert read.Scalars("tokens-per-second")[0].value == 1024.0
    names = set(read.Tags()["scalars"])
    assert {"grad-norm", "learning-rate", "iteration-seconds", "sparse-ckpt/slot-bytes"} <= names
    assert {"sparse-ckpt/stall-seconds", "sparse-ckpt/oldest-age-steps", "sparse-ckpt/failed-slots"} <= names


def test_a_skipped_iteration_has_no_norm(tmp_path: Path) -> None:
    scalars = TensorBoardScalars(tmp_path, 1)
    scalars(iteration(0, 1.0, grad_norm=None, skipped=True))
    scalars.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert "grad-norm" not in read.Tags()["scalars"]


def test_an_unwritable_directory_ends_the_scalars_only(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    scalars = TensorBoardScalars(blocked, 1)
    scalars(iteration(0, 1.0))
    scalars(iteration(1, 2.0))
    scalars.close()
    assert str(blocked) in scalars.failure
