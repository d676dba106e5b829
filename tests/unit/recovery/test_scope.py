"""Failed stages, what they pull along, and who feeds them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.moevement.recovery.scope import Grid, closure, feeders, segments
from tests.support.grids import line


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Any grid, stages that share parameters included."""
    stages = draw(st.integers(1, 6))
    grid = line(stages, draw(st.integers(1, 2)), wraps=draw(st.booleans()))
    shared = draw(st.lists(st.frozensets(st.integers(0, stages - 1), max_size=3), max_size=3))
    return replace(grid, sharing=tuple(shared))


@pytest.mark.parametrize(
    ("grid", "failed", "expected"),
    [
        (line(4), {1}, ((1,),)),
        (line(4), {1, 2}, ((1, 2),)),
        (line(4), {0, 2}, ((0,), (2,))),
        (line(4), {0, 3}, ((0,), (3,))),
        (line(4, wraps=True), {0, 3}, ((0, 3),)),
        (line(5, wraps=True), {0, 2, 4}, ((0, 4), (2,))),
        (line(4, tied=True), {0}, ((0, 3),)),
        (line(4, tied=True), {0, 2}, ((0, 2, 3),)),
        (line(4, tied=True), {1}, ((1,),)),
        (line(2, tied=True), {1}, ((0, 1),)),
        (line(1, 3), {0}, ((0,),)),
        (line(4), set(), ()),
    ],
)
def test_segments(grid: Grid, failed: set[int], expected: tuple[tuple[int, ...], ...]) -> None:
    assert segments(grid, failed) == expected


def test_sharing_goes_through_others() -> None:
    grid = replace(line(6), sharing=(frozenset({0, 2}), frozenset({2, 5})))
    assert closure(grid, {5}) == {0, 2, 5}
    assert closure(grid, {1}) == {1}
    assert segments(grid, {5}) == ((0, 2, 5),)


@pytest.mark.parametrize(
    ("grid", "stages", "expected"),
    [
        (line(3, 2), (1,), {0, 1, 4, 5}),
        (line(3, 2), (0,), {2, 3}),
        (line(3, 2, wraps=True), (0,), {2, 3, 4, 5}),
        (line(4), (0, 3), {1, 2}),
        (line(2), (0, 1), set()),
    ],
)
def test_feeders(grid: Grid, stages: tuple[int, ...], expected: set[int]) -> None:
    assert feeders(grid, stages) == expected


@given(grids(), st.data())
def test_segments_are_apart_and_closed(grid: Grid, data: st.DataObject) -> None:
    failed = data.draw(st.frozensets(st.integers(0, grid.last_stage)))
    found = segments(grid, failed)
    listed = [stage for segment in found for stage in segment]
    assert len(listed) == len(set(listed))
    assert set(listed) == closure(grid, failed) >= failed
    for segment in found:
        assert closure(grid, segment) == set(segment)
        # Nobody who feeds a segment rolls back himself: he would have nothing to serve from.
        assert not grid.stages_of(feeders(grid, segment)) & set(listed)
