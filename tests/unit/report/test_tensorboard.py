from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron.moevement.report.tensorboard import TensorBoardScalars
from tests.unit.report.synthetic import disturbed_run, event, iteration, local_run


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


def _points(directory: Path) -> EventAccumulator:
    read = EventAccumulator(str(directory))
    read.Reload()
    return read


def test_the_process_that_takes_over_rank_0_leaves_no_gap_and_no_double(tmp_path: Path) -> None:
    killed, successor = TensorBoardScalars(tmp_path, 1024), TensorBoardScalars(tmp_path, 1024)
    decision = next(e for e in local_run() if e["kind"] == "decision")
    resumed = next(e for e in local_run() if e["kind"] == "resumed")
    for item in [*(iteration(n, 100.0 + n) for n in range(4)), decision, resumed, iteration(4, 106.0)]:
        killed(item)
    # The killed one has told of iteration 6 no more; others have finished it.
    successor({**decision, "segments": [{"run": [2, 5]}], "target": 6})
    successor(event("recovery_started", 110.0, first=2, last=5, replays=3))
    successor(event("recovery_finished", 110.5, step=5, replays=3, seconds=1.0))
    successor(iteration(5, 111.0, replayed=True))
    for item in [e for e in local_run() if e["rank"] == 0 and e["time"] > 113.1]:
        successor(item)
    successor.close()
    read = _points(tmp_path)
    assert [point.step for point in read.Scalars("lm loss")] == list(range(1, 10))
    for name, value in (("replayed-iterations", 5.0), ("scope-stages", 2.0), ("convert-seconds", 3.5)):
        points = read.Scalars(f"sparse-ckpt-recovery/{name}")
        assert [(point.step, point.value) for point in points] == [(4, value), (5, value)]


def test_a_survivor_writes_what_it_replays_only_once(tmp_path: Path) -> None:
    scalars = TensorBoardScalars(tmp_path, 1024)
    for item in [e for e in local_run() if e["rank"] == 2]:
        scalars(item)
    scalars.close()
    assert [point.step for point in _points(tmp_path).Scalars("lm loss")] == list(range(1, 10))


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
