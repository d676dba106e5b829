"""What a pipeline rank sends and receives in one iteration, in order: a pure function of the schedule.

Communication carries no names: a tensor is known by its place in the order of its direction alone. With one model chunk
that order is 1F1B's, with more the interleaved schedule's; both send in the order of the same table.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache


class Direction(StrEnum):
    """Where a tensor goes: an activation to the next stage, or a gradient to the previous one."""

    FORWARD = "forward"
    BACKWARD = "backward"

    @property
    def opposite(self) -> "Direction":
        """The other one."""
        return Direction.BACKWARD if self is Direction.FORWARD else Direction.FORWARD


@dataclass(frozen=True, slots=True)
class BoundaryKey:
    """Name of a tensor that crosses a boundary in an iteration; the same on both sides.

    Attributes:
        direction: where it goes.
        order: its place among the tensors that its sender sends in this direction.
        micro_batch: the true micro-batch, from 0.
        chunk: the model chunk of the sender that made it.
    """

    direction: Direction
    order: int
    micro_batch: int
    chunk: int

    def __str__(self) -> str:
        what = "activation" if self.direction is Direction.FORWARD else "gradient"
        return f"{what} {self.order} (micro-batch {self.micro_batch}, model chunk {self.chunk})"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A rank's place in the pipeline and the shape of the schedule.

    Attributes:
        stages: pipeline-parallel size.
        stage: pipeline rank.
        micro_batches: of one iteration.
        chunks: model chunks of each rank.
        group: micro-batches that a chunk runs in a row before the next chunk has its turn.
    """

    stages: int
    stage: int
    micro_batches: int
    chunks: int
    group: int

    def sent(self, direction: Direction) -> tuple[BoundaryKey, ...]:
        """Keys of what the rank sends in `direction`, in order."""
        return _sent(self, direction)

    def received(self, direction: Direction) -> tuple[BoundaryKey, ...]:
        """Keys of what the rank receives from `direction`'s sender, in order."""
        return _sent(self.sender(direction), direction)

    def has_sender(self, direction: Direction) -> bool:
        """Whether there is a neighbour from which tensors of `direction` come; at an end there may be none."""
        return bool(self.received(direction))

    def sender(self, direction: Direction) -> "Pipeline":
        """The neighbour from which tensors of `direction` come: the previous stage for activations."""
        step = -1 if direction is Direction.FORWARD else 1
        return self.at((self.stage + step) % self.stages)

    def at(self, stage: int) -> "Pipeline":
        """The same schedule on another stage."""
        return replace(self, stage=stage)


@dataclass(frozen=True, slots=True)
class Boundary:
    """What there is to log on a rank: its place in the schedule, and the bytes of each tensor that crosses."""

    pipeline: Pipeline
    tensor_bytes: int


@dataclass(frozen=True, slots=True)
class Delivery:
    """A part of a transcript that one stage gives to another, whose ranks replay."""

    sender: int
    receiver: int
    direction: Direction


def deliveries(pipeline: Pipeline, scope: frozenset[int]) -> tuple[Delivery, ...]:
    """What stages outside of `scope` give to those inside, of every replayed iteration; the same on every stage."""
    found = []
    for receiver in sorted(scope):
        place = pipeline.at(receiver)
        for direction in Direction:
            sender = place.sender(direction).stage
            if sender not in scope and place.has_sender(direction):
                found.append(Delivery(sender, receiver, direction))
    return tuple(found)


@lru_cache(maxsize=64)
def _sent(pipeline: Pipeline, direction: Direction) -> tuple[BoundaryKey, ...]:
    forward = direction is Direction.FORWARD
    last_chunk = pipeline.chunks - 1
    at_end = pipeline.stage == (pipeline.stages - 1 if forward else 0)
    # The model ends there: its last chunk's output and its first chunk's input gradient go nowhere.
    end_chunk = last_chunk if forward else 0
    keys: list[BoundaryKey] = []
    for first in range(0, pipeline.micro_batches, pipeline.group):
        members = range(first, min(first + pipeline.group, pipeline.micro_batches))
        for turn in range(pipeline.chunks):
            chunk = turn if forward else last_chunk - turn
            if not (at_end and chunk == end_chunk):
                keys += [BoundaryKey(direction, len(keys) + i, member, chunk) for i, member in enumerate(members)]
    return tuple(keys)
