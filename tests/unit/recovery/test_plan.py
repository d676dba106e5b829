"""The recovery planner against brute force."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.moevement.recovery.plan import (
    announcement,
    common_run,
    is_window,
    iterations_to_keep,
    known_everywhere,
    newest_run,
    shortest_run,
    slots_to_keep,
    unbroken_row,
)
from megatron.moevement.schedule.slots import SlotSchedule, longest_run
from megatron.moevement.types import Run, SlotInfo

OPERATORS = frozenset("abc")


def slot(step: int, full: str, weights_only: str) -> SlotInfo:
    """A slot with operators named by letters."""
    return SlotInfo(step, step + 1, frozenset(full), frozenset(weights_only), 0)


@st.composite
def slot_sets(draw: st.DrawFn) -> dict[int, SlotInfo]:
    """Any slots at all, legal or not."""
    steps = draw(st.sets(st.integers(0, 9)))
    found = {}
    for step in steps:
        presence = draw(st.tuples(*[st.sampled_from(["full", "light", "absent"])] * 3))
        names = dict(zip("abc", presence, strict=True))
        full = "".join(n for n, p in names.items() if p == "full")
        found[step] = slot(step, full, "".join(n for n, p in names.items() if p == "light"))
    return found


def brute_force(slots: dict[int, SlotInfo], run: Run) -> bool:
    """The definition, operator by operator."""
    for name in OPERATORS:
        for step in run.steps:
            if step not in slots or (name not in slots[step].full and name not in slots[step].weights_only):
                return False
            if name in slots[step].full:
                break
        else:
            return False
    return all(step in slots for step in run.steps)


@given(slot_sets(), st.integers(0, 9), st.integers(0, 9))
def test_is_window_is_the_definition(slots: dict[int, SlotInfo], first: int, length: int) -> None:
    run = Run(first, first + length)
    assert is_window(slots, OPERATORS, run) == brute_force(slots, run)


@given(slot_sets(), st.integers(0, 9))
def test_shortest_run_is_the_shortest(slots: dict[int, SlotInfo], last: int) -> None:
    windows = [Run(first, last) for first in range(last + 1) if brute_force(slots, Run(first, last))]
    assert shortest_run(slots, OPERATORS, last) == (windows[-1] if windows else None)


@settings(max_examples=300)
@given(st.lists(slot_sets(), min_size=1, max_size=3))
def test_a_common_run_is_a_window_on_every_rank(ranks: list[dict[int, SlotInfo]]) -> None:
    run = common_run([(slots, OPERATORS) for slots in ranks])
    if run is not None:
        assert all(brute_force(slots, run) for slots in ranks)
    if len(ranks) == 1:
        assert run == newest_run(ranks[0], OPERATORS)


def test_a_rank_that_lags_decides() -> None:
    ahead = {step: slot(step, "abc", "") for step in range(4)}
    behind = {step: slot(step, "abc", "") for step in range(3)}
    assert common_run([(ahead, OPERATORS), (behind, OPERATORS)]) == Run(2, 2)
    assert common_run([(ahead, OPERATORS), ({}, OPERATORS)]) is None
    assert common_run([]) is None


@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 3))
def test_what_is_kept_holds_every_window_that_ends_where_all_are(window: int, known: int, ahead: int) -> None:
    steps = frozenset(range(known + ahead + 1))
    kept = slots_to_keep(steps, known, window)
    assert set(range(max(0, known - window + 1), known + ahead + 1)) == kept
    assert len(kept) <= window + ahead


def test_without_a_window_the_unbroken_row_stays() -> None:
    assert slots_to_keep(frozenset({0, 1, 3, 4}), -1, 2) == {3, 4}
    assert slots_to_keep(frozenset(), -1, 2) == frozenset()


@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 3))
def test_transcripts_reach_back_to_the_first_slot_that_is_kept(window: int, known: int, ahead: int) -> None:
    past = frozenset(range(known + ahead + 1))
    assert iterations_to_keep(past, known, window) == slots_to_keep(past, known, window)


def test_without_a_window_every_transcript_stays() -> None:
    assert iterations_to_keep(frozenset({0, 2, 3}), -1, 2) == {0, 2, 3}


def test_the_unbroken_row() -> None:
    assert unbroken_row(frozenset({1, 2, 4, 5, 6})) == Run(4, 6)
    assert unbroken_row(frozenset({3})) == Run(3, 3)
    assert unbroken_row(frozenset()) is None
    assert announcement(frozenset({1, 2, 4, 5, 6})) == (6, -4)
    assert announcement(frozenset()) == (-1, 0)


@st.composite
def committed(draw: st.DrawFn) -> frozenset[int]:
    """Steps of slots with up to two gaps."""
    return frozenset(range(draw(st.integers(0, 3)), draw(st.integers(6, 12)))) - draw(
        st.frozensets(st.integers(0, 11), max_size=2)
    )


@settings(max_examples=400)
@given(st.lists(committed(), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from(["fixed", "rolling"]))
def test_what_is_known_everywhere_is_loadable_everywhere(ranks: list[frozenset[int]], window: int, mode: str) -> None:
    schedule = SlotSchedule(tuple((name,) for name in "abc"[:window]), mode)
    specs = {step: schedule.spec(step) for step in range(12)}
    slots = {step: slot(step, "".join(s.full), "".join(s.weights_only)) for step, s in specs.items()}
    operators = frozenset("abc"[:window])
    longest = longest_run(window, mode, False)
    told = [announcement(steps) for steps in ranks]
    known = known_everywhere((min(t[0] for t in told), min(t[1] for t in told)), longest)
    if known >= 0:
        kept = [slots_to_keep(steps, known, longest) for steps in ranks]
        run = common_run([({s: slots[s] for s in steps}, operators) for steps in kept])
        assert run is not None
        assert run.last >= known


def test_the_newest_window_of_the_slowest_rank_need_not_be_anybody_elses() -> None:
    # Windows of one slot; the first rank has lost the slot of step 8, the second has not come further than it.
    broken, slow = frozenset({6, 7, 9, 10}), frozenset({6, 7, 8})
    told = [announcement(broken), announcement(slow)]
    assert known_everywhere((min(t[0] for t in told), min(t[1] for t in told)), 1) == -1
    assert min(max(broken), max(slow)) not in broken & slow
