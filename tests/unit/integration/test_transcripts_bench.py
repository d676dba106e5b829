"""The transcript of the overhead benchmark: blocks repeat iterations, and what isn't written is noticed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import ConfigError, StoreError
from megatron.moevement.integration import train_loop
from megatron.moevement.integration.boundary import LoggedP2P
from megatron.moevement.integration.job import TrainingJob, build_communicator
from megatron.moevement.transcript.log import TranscriptLog
from moevement_ext import CopyEngine
from scripts.bench.transcripts import Transcribed, Transcripts

LONGEST_RUN, SEGMENTS = 2, 5


@pytest.fixture
def job(build: Callable[..., TrainingJob], monkeypatch: pytest.MonkeyPatch) -> TrainingJob:
    """Of one stage; `transcript on` is refused there, so the configuration's answer is replaced."""
    monkeypatch.setattr("megatron.moevement.transcript_memory.transcript_wanted", lambda *_: True)
    return build()


@pytest.fixture
def transcripts(job: TrainingJob, tmp_path: Path) -> Iterator[Transcripts]:
    """Those of a job that may replay two iterations."""
    config = SparseCheckpointConfig(enabled=True, directory=tmp_path)
    made = Transcripts(job, config, CopyEngine(), LONGEST_RUN)
    yield made
    made.close()
    assert not config.job_directory.exists()


def block(job: TrainingJob, transcripts: Transcripts, iterations: int) -> None:
    """All blocks train on the same batches."""
    job.step = 0
    with transcripts.recording("transcript"):
        assert isinstance(job.communicator, LoggedP2P)
        hooks = Transcribed(transcripts, train_loop.NoHooks(), None)
        for _ in range(iterations):
            train_loop.train_iteration(job, hooks)


def plain(job: TrainingJob) -> None:
    """Iterations without."""
    job.step = 0
    assert not isinstance(job.communicator, LoggedP2P)
    train_loop.train_iteration(job, train_loop.NoHooks())


def found(transcripts: Transcripts) -> Any:
    return transcripts.figures()["by_variant"]["transcript"]


def test_blocks_that_repeat_iterations_are_written_whole(
    job: TrainingJob, transcripts: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    commit = TranscriptLog.commit

    def noted(log: TranscriptLog, iteration: int) -> None:
        commit(log, iteration)
        written.append(iteration)

    monkeypatch.setattr(TranscriptLog, "commit", noted)
    plain(job)
    hooks = Transcribed(transcripts, train_loop.NoHooks(), None)
    transcripts.warm_up(lambda: train_loop.train_iteration(job, hooks))
    plain(job)
    block(job, transcripts, 4)
    plain(job)
    block(job, transcripts, 3)
    assert written == list(range(SEGMENTS + 7)), "as in a job, one after another, and none in blocks without"
    assert found(transcripts) == {"iterations": 7, "left_out_by_rank": [0], "reasons": []}
    plain(job)


def test_iterations_that_could_not_be_written_are_counted(
    job: TrainingJob, transcripts: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = TranscriptLog.commit

    def broken(log: TranscriptLog, iteration: int) -> None:
        if iteration != 2:
            raise StoreError("the disk is gone")
        commit(log, iteration)

    monkeypatch.setattr(TranscriptLog, "commit", broken)
    block(job, transcripts, 4)
    assert found(transcripts) == {"iterations": 4, "left_out_by_rank": [3], "reasons": ["the disk is gone"]}


def test_iterations_that_nobody_wrote_are_counted(job: TrainingJob, transcripts: Transcripts) -> None:
    with transcripts.recording("transcript"):
        job.communicator = build_communicator(job.config, job.topology, job.model_config)
        train_loop.train_iteration(job, Transcribed(transcripts, train_loop.NoHooks(), None))
    assert found(transcripts) == {"iterations": 1, "left_out_by_rank": [1], "reasons": []}


def test_without_room_there_is_nothing_to_measure(job: TrainingJob, tmp_path: Path) -> None:
    config = SparseCheckpointConfig(enabled=True, directory=tmp_path, transcript_memory_gib=1e-9)
    with pytest.raises(ConfigError, match="no transcript to measure: the transcript needs"):
        Transcripts(job, config, CopyEngine(), LONGEST_RUN)
    assert not config.job_directory.exists()
