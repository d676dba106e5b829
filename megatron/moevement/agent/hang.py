"""Who hangs: a pure judgement of what the workers say of themselves."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.moevement.agent.marks import Mark


def hung(
    marks: Mapping[int, Mark], generation: int, seconds: float, stood: Mapping[int, float], start_seconds: float
) -> frozenset[int]:
    """Ranks that keep the others waiting.

    Somebody waits for other ranks, and nobody who doesn't wait has shown any progress for `seconds`: then those hang.
    A rank that has made no mark in this generation is still being built, for which it has `start_seconds`; one that
    rests is excused.

    Args:
        marks: of every rank that has not finished.
        generation: the open one.
        seconds: of silence, after which a rank hangs.
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
            late = not mark.resting and mark.age > seconds
        if not late:
            return frozenset()
    return frozenset(silent)


def started(mark: Mark, generation: int) -> bool:
    """Whether the rank has made a mark in this generation."""
    return mark.beats > 0 and mark.generation == generation
