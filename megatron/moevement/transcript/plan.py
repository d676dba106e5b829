"""Memory of the transcript, planned before training; above the limit there is none, and recovery is global."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.moevement.config import GIB, MIB
from megatron.moevement.errors import ConfigError
from megatron.moevement.store.format import Geometry
from megatron.moevement.transcript.keys import Boundary, Direction
from megatron.moevement.transcript.records import aligned, index_room

# Beyond what the longest run replays: one iteration being written, one being digested, and one that the other ranks
# have not heard of yet, as in the ring of slots.
EXTRA_SEGMENTS = 3


@dataclass(frozen=True, slots=True)
class TranscriptPlan:
    """Bytes of host memory that one rank's transcript takes; the same on every rank, the busiest stage counts.

    `problem` says why there is no transcript; empty if it fits.
    """

    segments: int
    index_bytes: int
    data_bytes: int
    problem: str

    @property
    def shape(self) -> Mapping[str, int]:
        """What `TranscriptLog.create` is told."""
        return {"slots": self.segments, "manifest_bytes": self.index_bytes, "data_bytes": self.data_bytes}

    @property
    def segment_bytes(self) -> int:
        """Bytes of one iteration."""
        return Geometry(**self.shape, superblock_bytes=0).slot_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole transcript of a rank."""
        return self.segments * self.segment_bytes


def transcript_wanted(choice: str, stages: int) -> bool:
    """Whether there is to be a transcript.

    Args:
        choice: `on`, `off` or `auto`.
        stages: pipeline-parallel size.

    Raises:
        ConfigError: `on` where nothing crosses a boundary.
    """
    if choice == "on" and stages == 1:
        raise ConfigError("--sparse-ckpt-transcript on: there is one pipeline stage only; use auto")
    return choice == "on" or (choice == "auto" and stages > 1)


def plan_transcript(boundary: Boundary, longest_run: int, limit_gib: float, available_bytes: int) -> TranscriptPlan:
    """Plans the transcript.

    Args:
        boundary: the schedule and the tensors; the plan is that of the busiest stage.
        longest_run: iterations that a recovery may replay, see `recovery/plan.py`.
        limit_gib: limit per rank, GiB; 0 is none but the room there is.
        available_bytes: room per rank where the file will lie.
    """
    pipeline, entries, sent = boundary.pipeline, 0, 0
    for stage in range(pipeline.stages):
        place = pipeline.at(stage)
        sends = sum(len(place.sent(direction)) for direction in Direction)
        entries = max(entries, sends + sum(len(place.received(direction)) for direction in Direction))
        sent = max(sent, sends)
    plan = TranscriptPlan(longest_run + EXTRA_SEGMENTS, index_room(entries), sent * aligned(boundary.tensor_bytes), "")
    limit = min(limit_gib * GIB if limit_gib else float("inf"), available_bytes)
    if plan.total_bytes <= limit:
        return plan
    why = (
        f"--sparse-ckpt-transcript-memory-gib {limit_gib:g}"
        if limit_gib and limit == limit_gib * GIB
        else f"{available_bytes / GIB:.3f} GiB free in --sparse-ckpt-dir"
    )
    problem = (
        f"the transcript needs {plan.total_bytes / GIB:.3f} GiB per rank ({plan.segments} iterations of "
        f"{plan.segment_bytes / GIB:.3f}), more than {why}: without it every recovery rolls all stages back"
    )
    return TranscriptPlan(plan.segments, plan.index_bytes, plan.data_bytes, problem)


def describe_transcript(boundary: Boundary, choice: str, longest_run: int, limit_gib: float) -> list[str]:
    """The plan for people, as far as it doesn't depend on the room there is; see `plan_transcript`."""
    if not transcript_wanted(choice, boundary.pipeline.stages):
        return ["boundary transcript: none, every recovery rolls all ranks back"]
    plan = plan_transcript(boundary, longest_run, limit_gib, 1 << 62)
    if plan.problem:
        return [f"boundary transcript: none: {plan.problem}"]
    return [
        f"boundary transcript: {plan.total_bytes / GIB:.3f} GiB per rank, {plan.segments} iterations of "
        f"{plan.segment_bytes / GIB:.3f} GiB, tensors of {boundary.tensor_bytes / MIB:.3f} MiB"
    ]
