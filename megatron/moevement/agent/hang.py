"""Who hangs: a pure judgement of what the workers say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron.moevement.agent.marks import Mark

# A silence may last so many times as long as the longest one at the same point that ended by itself.
PATIENCE = 3.0


class Patience:
    """How long a rank may be silent: iterations that take long, or a machine that is busy, are no hang.

    Args:
        seconds: what every rank has at least.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last: dict[int, Mark] = {}
        self._longest: dict[str, float] = {}

    def see(self, marks: Mapping[int, Mark]) -> None:
        """Notes the silences that have ended since the marks before, by rank."""
        for rank, mark in marks.items():
            before = self._last.get(rank)
            self._last[rank] = mark
            if before is None or before.waiting or before.resting or mark.generation != before.generation:
                continue
            if mark.beats > before.beats > 0:
                self._longest[before.point] = max(self._longest.get(before.point, 0.0), before.age)

    def __call__(self, mark: Mark) -> float:
        """Seconds that a rank may be silent where it is now."""
        return max(self._seconds, PATIENCE * self._longest.get(mark.point, 0.0))


def hung(
    marks: Mapping[int, Mark],
    generation: int,
    patience: Callable[[Mark], float],
    stood: Mapping[int, float],
    start_seconds: float,
) -> frozenset[int]:
    """Ranks that keep the others waiting.

    Somebody waits for other ranks, and nobody who doesn't wait has shown any progress for too long: then those hang.
    A rank that has made no mark in this generation is still being built, for which it has `start_seconds`; one that
    rests is excused.

    Args:
        marks: of every rank that has not finished.
        generation: the open one.
        patience: seconds of silence after which a rank hangs, by its mark.
        stood: for how long every rank has been in the generation.
        start_seconds: until the first mark in the generation.
    """
    silent = {rank: mark for rank, mark in marks.items() if not mark.waiting}
    if len(silent) == len(marks):
        return frozenset()
    for rank, mark in silent.items():
        if not started(mark, generation):
            # A time in which the agent itself stood still counts for neither.
            late = min(stood[rank], mark.age) > start_seconds
        else:
            late = not mark.resting and mark.age > patience(mark)
        if not late:
            return frozenset()
    return frozenset(silent)


def started(mark: Mark, generation: int) -> bool:
    """Whether the rank has made a mark in this generation."""
    return mark.beats > 0 and mark.generation == generation
