"""The calibration measures every candidate and leaves the engine with the best one."""

import time
from pathlib import Path
from typing import Any

import pytest

from megatron.moevement.errors import StoreError
from megatron.moevement.events import EventLog
from megatron.moevement.snapshot import calibration
from megatron.moevement.snapshot.bandwidth import Chunks, LinkProbe
from megatron.moevement.snapshot.calibration import Calibration
from moevement_ext import CopyEngine
from tests.support.slots import MemoryState
from tests.support.tables import small_table

SMALL, LARGE = Chunks(1 << 12, 2), Chunks(1 << 14, 3)


class Noting(CopyEngine):
    """Notes what chunks it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[int, int]] = []

    def set_chunks(self, chunk_bytes: int, chunks_in_flight: int) -> None:
        self.given.append((chunk_bytes, chunks_in_flight))
        super().set_chunks(chunk_bytes, chunks_in_flight)


def timed(engine: CopyEngine, directory: Path, chunks: tuple[Chunks, ...]) -> Calibration:
    """A calibration that has timed three iterations."""
    calibrating = Calibration(engine, MemoryState(small_table()), directory, 0, chunks, 7)
    for _ in range(3):
        calibrating.begin_iteration()
        calibrating.fence()
    return calibrating


def test_every_candidate_is_measured_and_the_best_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Noting() as engine:
        calibrating = timed(engine, tmp_path, (LARGE, SMALL))
        assert calibrating.iterations == 3 and not calibrating.done
        monkeypatch.setattr(calibration, "choose_chunks", lambda rates, awaited, seconds: LARGE)
        log, events = EventLog(None, 0), list[dict[str, Any]]()
        log.listen(events.append)
        found = calibrating.run(log)
    assert engine.given == [(1 << 14, 3), (1 << 12, 2), (1 << 14, 3)] and calibrating.done
    assert set(found.rates) == {LARGE, SMALL} and found.chunks == LARGE and found.awaited_copies == 7
    assert [e["kind"] for e in events] == ["calibration"] and events[0]["chunk_bytes"] == 1 << 14
    assert len(events[0]["rates"]) == 2
    assert found.bytes_per_second == found.rates[LARGE] and found.copy_seconds >= 0


def test_a_single_candidate_needs_no_calibration(tmp_path: Path) -> None:
    with Noting() as engine:
        calibrating = timed(engine, tmp_path, (SMALL,))
        assert calibrating.done
        assert calibrating.run(EventLog(None, 0)).chunks == SMALL


def test_beside_training_the_middle_of_the_probed_iterations_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, stop_copies = iter([5.0, 2.0, 4.0, 3.0]), LinkProbe.stop

    def stop(probe: LinkProbe) -> float:
        stop_copies(probe)
        return next(rates, 0.0)

    monkeypatch.setattr(LinkProbe, "stop", stop)
    with CopyEngine() as engine:
        calibrating = timed(engine, tmp_path, (SMALL, LARGE))
        calibrating.run(EventLog(None, 0), then_beside_training=True)
        for _ in range(calibration.PROBED_ITERATIONS):
            assert calibrating.bytes_per_second_beside_training is None
            assert [path.name for path in tmp_path.iterdir()] == [".bandwidth.rank00000"]
            calibrating.begin_iteration()
            calibrating.fence()
        assert calibrating.bytes_per_second_beside_training == 3.5
        assert calibrating.iterations == 3 and list(tmp_path.iterdir()) == []


def test_it_is_probed_by_copying(tmp_path: Path) -> None:
    with CopyEngine() as engine:
        calibrating = timed(engine, tmp_path, (SMALL,))
        found = calibrating.run(EventLog(None, 0), then_beside_training=True)
        for _ in range(calibration.PROBED_ITERATIONS):
            calibrating.begin_iteration()
            time.sleep(0.01)
            calibrating.fence()
        beside = calibrating.bytes_per_second_beside_training
        assert beside is not None and 0 < beside <= found.bytes_per_second


def test_without_a_probe_nothing_is_left(tmp_path: Path) -> None:
    with CopyEngine() as engine:
        calibrating = timed(engine, tmp_path, (SMALL, LARGE))
        calibrating.run(EventLog(None, 0))
        assert calibrating.bytes_per_second_beside_training is None and list(tmp_path.iterdir()) == []


def test_after_a_failure_all_begin_again(tmp_path: Path) -> None:
    with CopyEngine() as engine:
        calibrating = timed(engine, tmp_path, (SMALL, LARGE))
        calibrating.run(EventLog(None, 0), then_beside_training=True)
        calibrating.begin_iteration()
        calibrating.reset()
        assert (calibrating.iterations, calibrating.found) == (0, None) and list(tmp_path.iterdir()) == []
        calibrating.fence()
        assert calibrating.iterations == 0, "the interrupted iteration isn't timed"
        calibrating.reset()


def test_without_room_nothing_is_calibrated_and_it_is_told(tmp_path: Path) -> None:
    blocked = tmp_path / "slots"
    blocked.write_text("a file where the directory should be")
    with Noting() as engine:
        calibrating = timed(engine, blocked, (LARGE, SMALL))
        log, events = EventLog(None, 0), list[dict[str, Any]]()
        log.listen(events.append)
        with pytest.raises(StoreError, match="--sparse-ckpt-dir .* no room for .* force --sparse-ckpt-window"):
            calibrating.run(log)
        calibrating.try_run(log)
        assert calibrating.done and engine.given == []
    assert [e["kind"] for e in events] == ["calibration_failed"]
