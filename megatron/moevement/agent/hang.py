"""Who hangs: a pure judgement of what the workers say of themselves."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.moevement.agent.marks import Mark


def hung(marks: Mapping[int, Mark], generation: int, seconds: float) -> frozenset[int]:
    """Ranks that keep the others waiting.

    Somebody waits for other ranks, and nobody who doesn't wait has shown any progress for `seconds`: then those hang.
    A rank that has made no mark in this generation is still being built, and one that rests is excused.

    Args:
        marks: of every rank that has not finished.
        generation: the open one.
        seconds: of silence, after which a rank hangs.
    """
    silent = {rank: mark for rank, mark in marks.items() if not mark.waiting}
    if len(silent) == len(marks):
        return frozenset()
    late = all(mark.beats and mark.generation == generation and not mark.resting for mark in silent.values())
    late = late and all(mark.age > seconds for mark in silent.values())
    return frozenset(silent) if late else frozenset()
