"""The memory of a transcript: taken on all ranks or on none, found again, pinned, given back; never an error."""

from pathlib import Path
from typing import Any

import pytest

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import ConfigError
from megatron.moevement.events import EventLog
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.transcript.keys import Boundary, Pipeline
from megatron.moevement.transcript.log import TranscriptLog, transcript_path
from megatron.moevement.transcript_memory import TranscriptMemory
from moevement_ext import CopyEngine, DigestPool
from tests.support.engines import PinningEngine
from tests.support.toy import alone, on_ranks
from tests.support.transcripts import MIDDLE, RECORD_BYTES, write

BOUNDARY = Boundary(MIDDLE, RECORD_BYTES)


def memory(
    directory: Path, rank: int = 0, engine: CopyEngine | None = None, **knobs: Any
) -> tuple[TranscriptMemory, list[dict[str, Any]]]:
    """The memory of a rank, and the events that it tells."""
    config = SparseCheckpointConfig(enabled=True, directory=directory, **knobs)
    events, told = EventLog(None, rank), list[dict[str, Any]]()
    events.listen(told.append)
    return TranscriptMemory(config, rank, engine or CopyEngine(), DigestPool(), events), told


def create(
    holder: TranscriptMemory, agreement: Agreement, run_id: str = "run", longest: int = 2
) -> TranscriptLog | None:
    return holder.create(BOUNDARY, longest, run_id, agreement, agreement.size)


def test_what_is_taken_is_found_again(tmp_path: Path) -> None:
    holder, told = memory(tmp_path)
    log = create(holder, alone())
    assert log is not None and log.geometry.slots == 5
    assert told[-1]["kind"] == "transcript" and told[-1]["segments"] == 5
    assert 0 < log.path.stat().st_size - told[-1]["memory_bytes"] <= 4096
    write(log, 3)
    holder.give_back(log, keep=True)
    again = memory(tmp_path)[0].reopen("run")
    assert again is not None and again.iterations == {3}
    assert memory(tmp_path)[0].reopen("another") is None
    restarted = create(memory(tmp_path)[0], alone())
    assert restarted is not None and restarted.iterations == {3}
    # Another run or another plan starts afresh.
    other = create(memory(tmp_path)[0], alone(), run_id="other")
    assert other is not None and not other.iterations
    write(other, 1)
    larger = create(memory(tmp_path)[0], alone(), run_id="other", longest=3)
    assert larger is not None and not larger.iterations and larger.geometry.slots == 6
    holder.give_back(larger, keep=False)
    assert not larger.path.exists() and holder.reopen("other") is None


def test_every_segment_is_pinned_by_itself(tmp_path: Path) -> None:
    engine = PinningEngine()
    holder, _ = memory(tmp_path, engine=engine)
    log = create(holder, alone())
    assert log is not None
    engine.go.set()
    holder.wait_until_pinned()
    assert engine.registered == [address for address, _ in log.segment_ranges]
    assert all(address % 4096 == 0 and nbytes % 4096 == 0 for address, nbytes in log.segment_ranges)
    holder.give_back(log, keep=True)
    assert not engine.registered
    assert holder.reopen("run") is not None
    holder.wait_until_pinned()
    assert len(engine.registered) == 5


def test_a_limit_turns_it_off_with_a_warning(tmp_path: Path) -> None:
    holder, told = memory(tmp_path, transcript_memory_gib=1e-6)
    assert create(holder, alone()) is None
    assert told[-1]["kind"] == "transcript_off" and "--sparse-ckpt-transcript-memory-gib" in told[-1]["reason"]
    assert not transcript_path(tmp_path / "default", 0).exists()


def test_a_rank_without_room_turns_it_off_for_all(tmp_path: Path) -> None:
    def one(agreement: Agreement) -> tuple[bool, str]:
        holder, told = memory(tmp_path, agreement.rank)
        if agreement.rank == 1:
            transcript_path(tmp_path / "default", 1).mkdir(parents=True)
        return create(holder, agreement) is None, str(told[-1]["reason"])

    results = on_ranks(2, one)
    assert results[0] == results[1] and results[0][0] and "rank00001.transcript" in results[0][1]
    assert not transcript_path(tmp_path / "default", 0).exists()


def test_where_none_is_wanted_nothing_is_taken(tmp_path: Path) -> None:
    holder, told = memory(tmp_path, transcript="off")
    assert create(holder, alone()) is None and not told
    single = Boundary(Pipeline(1, 0, 4, 1, 1), RECORD_BYTES)
    assert memory(tmp_path)[0].create(single, 2, "run", alone(), 1) is None
    with pytest.raises(ConfigError, match="--sparse-ckpt-transcript on"):
        memory(tmp_path, transcript="on")[0].create(single, 2, "run", alone(), 1)
    assert not list(tmp_path.iterdir())
