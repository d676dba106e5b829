"""Algorithm 1 with real sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.schedule.ordering import capture_order
from megatron.moevement.schedule.window import cost, divide, slot_bytes, smallest_window
from megatron.moevement.types import Operator, OperatorKind
from tests.support.tables import part, small_table

MODES = st.sampled_from(["fixed", "rolling"])


def test_the_papers_example() -> None:
    # Figure 6: six equal operators of P parameters, two a slot: 32P, 28P, 24P in fixed mode; 72P is dense.
    kinds = [OperatorKind.EXPERT] * 4 + [OperatorKind.NON_EXPERT, OperatorKind.ROUTER]
    table = OperatorTable(Operator(f"o{i}", k, 0, i, (part(f"w{i}", 1),)) for i, k in enumerate(kinds))
    groups = divide(table, capture_order(table, {}), 3, "fixed")
    assert slot_bytes(table, groups, "fixed") == [32, 28, 24]
    # Rolling: 12 + 2(W-1) bytes per parameter and window (DESIGN section 4).
    assert sum(slot_bytes(table, divide(table, capture_order(table, {}), 3, "rolling"), "rolling")) == 6 * (12 + 2 * 2)


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 200), st.integers(1, 200), st.integers(1, 40), MODES)
def test_every_operator_is_in_exactly_one_group(
    layers: int, experts: int, big: int, small: int, window: int, mode: str
) -> None:
    table = small_table(layers, experts, big, small)
    groups = divide(table, capture_order(table, {}), window, mode)
    names = [name for group in groups for name in group]
    assert len(groups) == window
    assert sorted(names) == sorted(table.names) and len(names) == len(set(names))
    assert {"embedding", "output"} <= set(groups[-1]), "tied copies on both ends must change together"


@given(st.integers(1, 8), st.integers(2, 12), MODES)
def test_a_division_is_no_worse_than_by_count(experts: int, window: int, mode: str) -> None:
    table = small_table(2, experts, 100, 100)
    order = [n for n in capture_order(table, {}) if n not in ("embedding", "output")]
    per = -(-len(order) // window)
    by_count = [tuple(order[i * per : (i + 1) * per]) for i in range(window)]
    without_ends = OperatorTable(table[name] for name in order)
    ours = divide(without_ends, order, window, mode)
    assert max(slot_bytes(without_ends, ours, mode)) <= max(slot_bytes(without_ends, tuple(by_count), mode))


def test_the_window_shrinks_with_the_budget() -> None:
    table = small_table(2, 8)
    order = capture_order(table, {})
    dense = sum(o.full_bytes for o in table)
    windows = [smallest_window(table, order, "rolling", dense * share, 64).window for share in (1.0, 0.5, 0.3)]
    assert windows[0] == 1 and windows == sorted(windows) and windows[2] > 2
    for window, share in zip(windows, (1.0, 0.5, 0.3), strict=True):
        assert cost(table, order, window, "rolling").worst_slot_bytes <= dense * share
        if window > 1:
            assert cost(table, order, window - 1, "rolling").worst_slot_bytes > dense * share


def test_an_impossible_budget_gives_the_smallest_worst_slot() -> None:
    table = small_table(2, 8)
    order = capture_order(table, {})
    best = smallest_window(table, order, "fixed", 1.0, 64)
    assert best.worst_slot_bytes == min(
        cost(table, order, w, "fixed").worst_slot_bytes for w in range(1, len(table) + 1)
    )


@pytest.mark.parametrize("mode", ["fixed", "rolling"])
def test_more_slots_than_operators_leaves_slots_empty(mode: str) -> None:
    table = small_table(1, 1)
    groups = divide(table, capture_order(table, {}), 50, mode)
    assert len(groups) == 50 and groups[0] == ()
