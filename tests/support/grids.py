"""Grids of ranks for tests of the recovery's decisions."""

from megatron.moevement.recovery.scope import Grid


def line(stages: int, width: int = 1, tied: bool = False, wraps: bool = False) -> Grid:
    """Stages of equal width; rank i of a stage exchanges with rank i of the stages beside it."""
    world = stages * width
    beside = []
    for rank in range(world):
        near = {rank - width, rank + width}
        if wraps:
            near = {other % world for other in near}
        beside.append(frozenset(other for other in near if 0 <= other < world) - {rank})
    sharing = (frozenset({0, stages - 1}),) if tied and stages > 1 else ()
    return Grid(tuple(rank // width for rank in range(world)), sharing, wraps, tuple(beside))
