"""Snapshot age and its bound."""

import pytest

from megatron.moevement.errors import AgreementError
from megatron.moevement.schedule.age import SnapshotAge
from megatron.moevement.schedule.slots import SlotSchedule
from tests.unit.schedule.test_slots import TABLE, schedule


@pytest.mark.parametrize("mode", ["fixed", "rolling"])
def test_the_bound_holds_for_a_fixed_order(mode: str) -> None:
    plan: SlotSchedule = schedule(4, mode)
    age = SnapshotAge(TABLE.names, bound=4, first_step=0)
    for step in range(20):
        age.capture(step, plan.spec(step).full)
    assert age.oldest(20)[1] <= 4 and age.age("output", 20) == 1


def test_a_broken_schedule_is_noticed() -> None:
    age = SnapshotAge(frozenset({"a", "b"}), bound=2, first_step=0)
    age.capture(0, ["a"])
    age.capture(1, ["a"])
    age.capture(2, ["a"])
    with pytest.raises(AgreementError, match="operator b was last captured 3 steps ago"):
        age.capture(3, ["a"])


def test_a_restart_counts_from_there() -> None:
    age = SnapshotAge(frozenset({"a"}), bound=2, first_step=0)
    age.restart(10)
    assert age.oldest(11) == ("a", 1)
    age.note(11, ["a"])
    assert age.oldest(11) == ("a", 0)


def test_no_operators() -> None:
    assert SnapshotAge(frozenset(), 1, 0).oldest(9) == ("", 0)
