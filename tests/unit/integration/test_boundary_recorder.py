"""The recorder: what is sent and received is in the transcript; trouble costs the transcript, never the training."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.moevement.errors import RecoveryError
from megatron.moevement.events import EventLog
from megatron.moevement.integration import boundary_recorder
from megatron.moevement.integration.boundary_recorder import BoundaryRecorder
from megatron.moevement.integration.fingerprint import fingerprint
from megatron.moevement.integration.log_copy import EngineCopier, HostCopier
from megatron.moevement.transcript.keys import Direction
from megatron.moevement.transcript.log import TranscriptLog
from moevement_ext import CopyEngine, DigestPool, EngineError
from tests.support.transcripts import MIDDLE, RECORD_BYTES, SHAPE, create

CPU = torch.device("cpu")


def tensor(number: int) -> torch.Tensor:
    return torch.full((RECORD_BYTES,), number, dtype=torch.uint8)


@pytest.fixture
def log(tmp_path: Path) -> TranscriptLog:
    return create(tmp_path / "t")


class Told(EventLog):
    """Keeps the events."""

    def __init__(self) -> None:
        super().__init__(None, 0)
        self.events: list[dict[str, Any]] = []
        self.listen(self.events.append)

    @property
    def reasons(self) -> list[tuple[int, str]]:
        """What was left out, and why."""
        return [(event["iteration"], event["reason"]) for event in self.events if event["kind"] == "transcript_failed"]


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def recorder(log: TranscriptLog, told: Told) -> Iterator[BoundaryRecorder]:
    made = BoundaryRecorder(MIDDLE, log, HostCopier(), CPU, told)
    yield made
    made.close()


def exchange(recorder: BoundaryRecorder, iteration: int, count: int = 4) -> None:
    """Begins an iteration and exchanges so many tensors in each way."""
    recorder.begin(iteration)
    for direction in Direction:
        for number in range(count):
            recorder.sent(direction, tensor(number))
            recorder.received(recorder.expect(direction), tensor(100 + number))


def test_what_was_exchanged_is_in_the_log(recorder: BoundaryRecorder, log: TranscriptLog, told: Told) -> None:
    exchange(recorder, 3)
    recorder.check_complete()
    recorder.finish()
    recorder.settle()
    assert log.iterations == {3} and not told.events
    for direction in Direction:
        assert [r.data[0] for r in log.records(3, direction)] == [0, 1, 2, 3]
        wanted = torch.zeros(4, dtype=torch.int64)
        for number in range(4):
            fingerprint(tensor(100 + number), wanted[number])
        assert [r.fingerprint for r in log.receipts(3, direction)] == wanted.tolist()


def test_the_ring_tells_what_it_gives_up(recorder: BoundaryRecorder, told: Told) -> None:
    for iteration in range(6):
        exchange(recorder, iteration)
        recorder.finish()
    assert told.reasons == [(0, "given up, no free segment"), (1, "given up, no free segment")]


def test_an_interrupted_iteration_leaves_nothing(recorder: BoundaryRecorder, log: TranscriptLog, told: Told) -> None:
    exchange(recorder, 1, count=2)
    with pytest.raises(RecoveryError, match="iteration 1: 2 of 4 forward tensors were sent"):
        recorder.check_complete()
    recorder.abandon()
    recorder.abandon()
    for iteration in (1, 2, 3, 4):
        exchange(recorder, iteration)
        recorder.finish()
    recorder.settle()
    assert log.iterations == {1, 2, 3, 4} and not told.events


def test_more_than_the_schedule_has_is_an_error(recorder: BoundaryRecorder) -> None:
    exchange(recorder, 0)
    with pytest.raises(RecoveryError, match="sends more than the 4 backward tensors planned"):
        recorder.sent(Direction.BACKWARD, tensor(0))
    recorder.abandon()
    with pytest.raises(RecoveryError, match="receives more"):
        recorder.expect(Direction.FORWARD)


def test_without_a_log_only_the_order_is_known() -> None:
    recorder = BoundaryRecorder(MIDDLE, None, HostCopier(), CPU, Told())
    exchange(recorder, 0)
    recorder.check_complete()
    recorder.finish()
    recorder.abandon()
    recorder.close()


def test_a_tensor_that_does_not_fit_costs_the_transcript_only(
    recorder: BoundaryRecorder, log: TranscriptLog, told: Told
) -> None:
    recorder.begin(0)
    recorder.sent(Direction.FORWARD, torch.zeros(5000, dtype=torch.uint8))
    recorder.sent(Direction.FORWARD, tensor(1))
    recorder.received(recorder.expect(Direction.FORWARD), tensor(2))
    recorder.finish()
    recorder.settle()
    assert "no room for activation 0" in told.reasons[0][1] and log.iterations == frozenset()
    exchange(recorder, 1)
    recorder.finish()
    recorder.settle()
    assert log.iterations == {1}


class Failing(EngineCopier):
    """A copier that fails at the end."""

    def drain(self) -> None:
        super().drain()
        raise EngineError("lost")


def test_a_failed_copy_costs_the_transcript_only(log: TranscriptLog, told: Told) -> None:
    recorder = BoundaryRecorder(MIDDLE, log, Failing(CopyEngine(), 1 << 20), CPU, told)
    exchange(recorder, 0)
    recorder.finish()
    recorder.close()
    assert told.reasons == [(0, "lost")] and log.iterations == frozenset()


def test_a_failed_commit_costs_the_transcript_only(tmp_path: Path, told: Told) -> None:
    digests = DigestPool()
    log = TranscriptLog.create(tmp_path / "t", {"rank": 1, "run_id": "run"}, SHAPE, digests)
    recorder = BoundaryRecorder(MIDDLE, log, HostCopier(), CPU, told)
    for iteration in range(5):
        exchange(recorder, iteration)
        digests.close()
        recorder.finish()
    recorder.settle()
    assert [iteration for iteration, _ in told.reasons] == [0, 1, 2, 3, 4] and "closed" in told.reasons[0][1]
    assert log.iterations == frozenset()


class Lost(HostCopier):
    """A copier whose device is lost, which torch tells once in its own way."""

    def __init__(self) -> None:
        self.told = False

    def drain(self) -> None:
        if not self.told:
            self.told = True
            raise RuntimeError("CUDA error")


def test_a_lost_device_costs_the_transcript_and_is_trainings_to_meet(log: TranscriptLog, told: Told) -> None:
    recorder = BoundaryRecorder(MIDDLE, log, Lost(), CPU, told)
    exchange(recorder, 0)
    recorder.finish()
    recorder.close()
    assert told.reasons == [(0, "CUDA error")] and log.iterations == frozenset()


def test_a_receipt_that_can_not_be_made_costs_the_transcript_only(
    recorder: BoundaryRecorder, log: TranscriptLog, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise EngineError("no kernel image")

    exchange(recorder, 0)
    recorder.finish()
    with monkeypatch.context() as patched:
        patched.setattr(boundary_recorder, "fingerprint", fail)
        exchange(recorder, 0)
        recorder.check_complete()
        recorder.finish()
    recorder.settle()
    # Nor is what was written before of the same iteration served.
    assert told.reasons == [(0, "no kernel image")] and log.iterations == frozenset()


class Held(HostCopier):
    """A copier whose copies take until they are let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def drain(self) -> None:
        assert self.let_go.wait(10)


def test_the_end_of_an_iteration_waits_for_no_copy(log: TranscriptLog, told: Told) -> None:
    copier = Held()
    recorder = BoundaryRecorder(MIDDLE, log, copier, CPU, told)
    exchange(recorder, 0)
    recorder.finish()
    assert log.iterations == frozenset()
    copier.let_go.set()
    recorder.close()
    assert log.iterations == {0} and not told.events
