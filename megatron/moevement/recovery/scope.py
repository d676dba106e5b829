"""Who rolls back after a failure: from failed ranks to stages, segments and those who feed them. Pure functions."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the ranks stand; it never changes while a job runs.

    Attributes:
        stages: pipeline stage of every rank.
        sharing: sets of stages that share parameters, as tied embeddings do. They compute one gradient together, so
            they can only roll back together.
        wraps: the last stage sends to the first (interleaved schedule).
        neighbours: per rank, the ranks that it exchanges boundary tensors with.
    """

    stages: tuple[int, ...]
    sharing: tuple[frozenset[int], ...]
    wraps: bool
    neighbours: tuple[frozenset[int], ...]

    @property
    def last_stage(self) -> int:
        """Number of the last stage."""
        return max(self.stages)

    def ranks_of(self, stages: Iterable[int]) -> frozenset[int]:
        """All ranks of the stages."""
        wanted = frozenset(stages)
        return frozenset(rank for rank, stage in enumerate(self.stages) if stage in wanted)

    def stages_of(self, ranks: Iterable[int]) -> frozenset[int]:
        """The stages that the ranks belong to."""
        return frozenset(self.stages[rank] for rank in ranks)


def closure(grid: Grid, stages: Iterable[int]) -> frozenset[int]:
    """The stages, and all that share parameters with them, directly or through others."""
    closed = frozenset(stages)
    while True:
        wider = closed.union(*(shared for shared in grid.sharing if shared & closed))
        if wider == closed:
            return closed
        closed = wider


def segments(grid: Grid, failed: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """Failed stages in groups that have to replay together, each in order of stage, the groups by their first.

    Stages next to each other exchange tensors live in the replay, and stages that share parameters reduce their
    gradients; either way they need one run and one pace.
    """
    waiting = closure(grid, failed)
    found = []
    while waiting:
        segment = frozenset({min(waiting)})
        while more := (waiting & _touching(grid, segment)) - segment:
            segment |= more
        found.append(tuple(sorted(segment)))
        waiting -= segment
    return tuple(found)


def feeders(grid: Grid, stages: Iterable[int]) -> frozenset[int]:
    """Ranks outside a segment that exchange boundary tensors with it: they serve their transcripts."""
    inside = grid.ranks_of(stages)
    return frozenset().union(*(grid.neighbours[rank] for rank in inside)) - inside


def _touching(grid: Grid, segment: frozenset[int]) -> frozenset[int]:
    return frozenset(_next_to(grid, segment)) | closure(grid, segment)


def _next_to(grid: Grid, segment: frozenset[int]) -> Iterator[int]:
    for stage in segment:
        yield from (stage - 1, stage + 1)
    if grid.wraps and segment & {0, grid.last_stage}:
        yield from (0, grid.last_stage)
    yield from (grid.stages[rank] for rank in feeders(grid, segment))
