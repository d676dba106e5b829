"""Ascending popularity, non-expert operators last, ties by name; the reorder rule."""

from hypothesis import given
from hypothesis import strategies as st

from megatron.moevement.schedule.ordering import capture_order, should_reorder
from megatron.moevement.types import OperatorKind
from tests.support.tables import small_table

COUNTS = st.dictionaries(st.sampled_from([f"e{i}" for i in range(8)]), st.integers(0, 1000))


def test_popular_experts_come_late_and_non_experts_last() -> None:
    table = small_table(1, 3)
    order = capture_order(table, {"layer000.expert000": 9, "layer000.expert002": 5})
    assert order[:3] == ("layer000.expert001", "layer000.expert002", "layer000.expert000")
    assert table[order[3]].kind is OperatorKind.NON_EXPERT and order[-2:] == ("embedding", "output")


def test_ties_are_broken_by_name() -> None:
    table = small_table(2, 4)
    assert capture_order(table, dict.fromkeys(table.names, 7)) == capture_order(table, {})


def test_the_papers_trigger() -> None:
    before = dict.fromkeys("abcd", 1000)
    assert not should_reorder(before, before, 0.10, 0.25)
    assert should_reorder(before, {"a": 1000, "b": 1000, "c": 880, "d": 1120}, 0.10, 0.25)
    # 9% more is no change; one changed expert of eight is fewer than 25%.
    assert not should_reorder(before, {"a": 1090, "b": 910, "c": 1000, "d": 1000}, 0.10, 0.25)
    eight = dict.fromkeys("abcdefgh", 1000)
    assert not should_reorder(eight, {**eight, "a": 1500}, 0.10, 0.25)


def test_first_counts_are_a_change_and_no_counts_are_none() -> None:
    assert should_reorder({}, {"a": 1}, 0.1, 0.25)
    assert not should_reorder({"a": 1}, {}, 0.1, 0.25)
    assert not should_reorder({}, {}, 0.1, 0.25)


@given(COUNTS, st.integers(2, 9))
def test_shares_count_and_not_totals(counts: dict[str, int], factor: int) -> None:
    scaled = {name: count * factor for name, count in counts.items()}
    if sum(counts.values()):
        assert not should_reorder(counts, scaled, 0.1, 0.25)
