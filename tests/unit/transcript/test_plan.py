"""The plan is what the log takes; above a limit it says so and names the flag."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.moevement.config import GIB
from megatron.moevement.errors import ConfigError
from megatron.moevement.transcript.keys import Boundary, Direction, Pipeline
from megatron.moevement.transcript.log import TranscriptLog
from megatron.moevement.transcript.plan import describe_transcript, plan_transcript, transcript_wanted
from moevement_ext import DigestPool


def test_the_busiest_stage_counts() -> None:
    tensor = 1 << 20
    for stage in range(3):
        plan = plan_transcript(Boundary(Pipeline(3, stage, 6, 1, 3), tensor), 7, 0.0, 1 << 40)
        assert plan.segments == 10 and plan.data_bytes == 2 * 6 * tensor and plan.problem == ""
        assert 0 <= plan.total_bytes - 10 * 12 * tensor < 10 * 16384
    # Two stages send in one direction each, all but the ends of the model in both with chunks.
    assert plan_transcript(Boundary(Pipeline(2, 0, 6, 1, 2), tensor), 7, 0.0, 1 << 40).data_bytes == 6 * tensor
    assert plan_transcript(Boundary(Pipeline(2, 0, 6, 2, 2), tensor), 7, 0.0, 1 << 40).data_bytes == 3 * 6 * tensor


@given(st.integers(2, 4), st.integers(1, 6), st.integers(1, 3), st.integers(1, 300))
def test_every_stage_fits_its_plan(stages: int, micro_batches: int, chunks: int, nbytes: int) -> None:
    for stage in range(stages):
        pipeline = Pipeline(stages, stage, micro_batches, chunks, stages)
        plan = plan_transcript(Boundary(pipeline, nbytes), 1, 0.0, 1 << 40)
        assert sum(len(pipeline.sent(d)) * nbytes for d in Direction) <= plan.data_bytes


def test_the_file_is_as_large_as_the_plan(tmp_path: Path) -> None:
    pipeline = Pipeline(2, 0, 6, 2, 2)
    plan = plan_transcript(Boundary(pipeline, 1000), 3, 0.0, 1 << 40)
    log = TranscriptLog.create(tmp_path / "t", {"rank": 0, "run_id": "r"}, plan.shape, DigestPool())
    assert 0 < (tmp_path / "t").stat().st_size - plan.total_bytes <= 4096
    log.begin(0)
    for direction in Direction:
        for key in pipeline.sent(direction):
            log.add(key, 1000)
        for key in pipeline.received(direction):
            log.note_received(key, -(1 << 63))
    log.commit(0)


def test_limits_turn_it_off_and_say_why() -> None:
    pipeline = Pipeline(2, 0, 4, 1, 2)
    plan = plan_transcript(Boundary(pipeline, 1 << 28), 1, 3.5, 1 << 40)
    assert plan.problem == (
        "the transcript needs 4.000 GiB per rank (4 iterations of 1.000), more than "
        "--sparse-ckpt-transcript-memory-gib 3.5: without it every recovery rolls all stages back"
    )
    assert (
        "3.000 GiB free in --sparse-ckpt-dir" in plan_transcript(Boundary(pipeline, 1 << 28), 1, 0.0, 3 * GIB).problem
    )
    assert (
        "3.000 GiB free in --sparse-ckpt-dir" in plan_transcript(Boundary(pipeline, 1 << 28), 1, 9.0, 3 * GIB).problem
    )
    assert plan_transcript(Boundary(pipeline, 1 << 28), 1, 4.1, 5 * GIB).problem == ""


def test_a_plan_for_people() -> None:
    boundary = Boundary(Pipeline(2, 0, 4, 1, 2), 1 << 28)
    assert describe_transcript(boundary, "auto", 1, 0.0) == [
        "boundary transcript: 4.000 GiB per rank, 4 iterations of 1.000 GiB, tensors of 256.000 MiB"
    ]
    assert "--sparse-ckpt-transcript-memory-gib 1" in describe_transcript(boundary, "on", 1, 1.0)[0]
    assert describe_transcript(boundary, "off", 1, 0.0)[0].startswith("boundary transcript: none, every recovery")


def test_wanted() -> None:
    assert [transcript_wanted("auto", stages) for stages in (1, 2, 3)] == [False, True, True]
    assert not transcript_wanted("off", 4) and transcript_wanted("on", 2)
    with pytest.raises(ConfigError, match="use auto"):
        transcript_wanted("on", 1)
