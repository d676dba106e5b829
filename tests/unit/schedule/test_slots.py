"""Slots of both window modes, checked against the definition of a window."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.moevement.recovery.plan import is_window, shortest_run
from megatron.moevement.schedule.ordering import capture_order
from megatron.moevement.schedule.slots import SlotSchedule, longest_run, ring_slots, schedule_of
from megatron.moevement.schedule.window import divide
from megatron.moevement.types import Run, SlotInfo, SlotSpec
from tests.support.tables import small_table

TABLE = small_table(2, 4)
MODES = ["fixed", "rolling"]


def schedule(window: int, mode: str, reverse: bool = False) -> SlotSchedule:
    """A schedule over the small table; `reverse` is another order, the embedding and output layer still last."""
    order = capture_order(TABLE, {})
    return SlotSchedule(divide(TABLE, order[::-1] if reverse else order, window, mode), mode)


def info(spec: SlotSpec) -> SlotInfo:
    """What the planner sees of a slot."""
    return SlotInfo(spec.step, spec.step + 1, frozenset(spec.full), frozenset(spec.weights_only), 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [1, 2, 3, 5, 7])
def test_windows_are_windows(window: int, mode: str) -> None:
    slots = {step: info(schedule(window, mode).spec(step)) for step in range(4 * window)}
    starts = range(0, 3 * window, 1 if mode == "rolling" else window)
    for start in starts:
        assert is_window(slots, TABLE.names, Run(start, start + window - 1))


@given(st.integers(1, 6), st.sampled_from(MODES), st.integers(1, 3), st.integers(0, 30))
def test_no_run_is_longer_than_the_bound_even_across_a_change_of_order(
    window: int, mode: str, change: int, last: int
) -> None:
    slots = {}
    for step in range(last + 1):
        slots[step] = info(schedule(window, mode, reverse=step >= change * window).spec(step))
    run = shortest_run(slots, TABLE.names, last)
    if last >= 2 * window - 1:
        assert run is not None
    if run is not None:
        assert run.last - run.first + 1 <= longest_run(window, mode, reorder=True)
        if mode == "rolling" and last < change * window:
            assert run.last - run.first + 1 <= longest_run(window, mode, reorder=False)


@given(st.integers(1, 20), st.sampled_from(MODES), st.integers(0, 60))
def test_the_schedule_is_found_again_in_any_run(window: int, mode: str, last: int) -> None:
    wanted = schedule(window, mode)
    slots = {step: info(wanted.spec(step)) for step in range(last + 1)}
    run = shortest_run(slots, TABLE.names, last)
    if run is not None:
        assert schedule_of({step: wanted.spec(step) for step in run.steps}, last, mode) == wanted


def test_rolling_without_reorder_needs_fewer_slots() -> None:
    assert ring_slots(4, "rolling", reorder=False) == 7
    assert ring_slots(4, "rolling", reorder=True) == ring_slots(4, "fixed", reorder=False) == 10
