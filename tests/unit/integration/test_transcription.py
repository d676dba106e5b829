"""The transcript of a job: made once a run, found again, served only while it is sound."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import TranscriptInvalid
from megatron.moevement.events import EventLog
from megatron.moevement.integration.boundary import LoggedP2P
from megatron.moevement.integration.bundle_exchange import BundleExchange
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.transcription import Transcription
from megatron.moevement.recovery.plan import iterations_to_keep
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.transcript.log import transcript_path
from moevement_ext import CopyEngine


class Lab:
    """A job of one stage; `transcript on` is refused there, so the configuration's answer is replaced."""

    def __init__(self, job: TrainingJob, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("megatron.moevement.transcript_memory.transcript_wanted", lambda *_: True)
        self.job, self.config = job, SparseCheckpointConfig(enabled=True, directory=directory, window=2)
        self.events: list[dict[str, Any]] = []
        self.log = EventLog(None, 0)
        self.log.listen(self.events.append)
        self.agreement = Agreement(job.topology.control)
        self.path = transcript_path(self.config.job_directory, 0)

    def transcription(self) -> Transcription:
        """A new process's."""
        return Transcription(self.job, self.config, CopyEngine(), 1, self.log)


@pytest.fixture
def lab(build: Callable[..., TrainingJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """One."""
    return Lab(build(), tmp_path, monkeypatch)


def write(lab: Lab, iterations: range) -> None:
    """Iterations without a boundary have an empty transcript."""
    assert isinstance(lab.job.communicator, LoggedP2P)
    for iteration in iterations:
        lab.job.communicator.begin(iteration)
        lab.job.communicator.finish()


def test_a_run_has_one_transcript_which_outlives_its_writer(lab: Lab) -> None:
    first = lab.transcription()
    assert not first.complete and not first.retain("run", 0, 3), "of no run yet"
    first.create("run", 3, lab.agreement)
    first.wait_until_pinned()
    assert first.complete and first.retain("run", -1, 3)
    write(lab, range(3))
    assert first.offer() == {0, 1, 2}
    first.close(keep=True)
    second = lab.transcription()
    second.reopen("run")
    assert second.complete and second.offer() == {0, 1, 2}
    third = lab.transcription()
    third.reopen("another run")
    assert not third.complete and third.offer() == frozenset()
    second.close(keep=False)
    assert not lab.path.exists()


def test_what_no_window_needs_goes(lab: Lab) -> None:
    transcription = lab.transcription()
    transcription.create("run", 2, lab.agreement)
    write(lab, range(5))
    assert transcription.offer() == {0, 1, 2, 3, 4}
    transcription.retain("run", 4, 2)
    assert transcription.offer() == {3, 4}
    transcription.close(keep=False)


def test_what_is_committed_while_others_go_stays(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    transcription = lab.transcription()
    transcription.create("run", 2, lab.agreement)
    write(lab, range(3))
    transcription.offer()

    def meanwhile(*arguments: Any) -> frozenset[int]:
        write(lab, range(3, 4))
        transcription.offer()
        return iterations_to_keep(*arguments)

    monkeypatch.setattr("megatron.moevement.integration.transcription.iterations_to_keep", meanwhile)
    transcription.retain("run", 3, 2)
    assert transcription.offer() == {2, 3}
    transcription.close(keep=False)


def test_what_cannot_be_served_is_not_offered_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    transcription = lab.transcription()
    transcription.create("run", 2, lab.agreement)
    write(lab, range(3))
    transcription.offer()

    def damaged(*_: Any) -> None:
        raise TranscriptInvalid("a digest is wrong")

    monkeypatch.setattr(BundleExchange, "deliver", damaged)
    with pytest.raises(TranscriptInvalid, match="digest"):
        transcription.serve(1, frozenset({1}))
    assert transcription.offer() == {0, 2}
    transcription.close(keep=False)
