"""When the order of experts changes, and that all ranks change it or none."""

from collections.abc import Mapping

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.schedule.reordering import Reordering
from megatron.moevement.schedule.slots import SlotSchedule
from tests.support.tables import small_table
from tests.support.toy import alone
from tests.unit.schedule.test_slots import schedule

TABLE = small_table(2, 4)
EXPERTS = sorted(name for name in TABLE.names if ".expert" in name)
LIKE_THE_ORDER = {name: 100 + number for number, name in enumerate(EXPERTS)}
OTHERWISE = {name: 1000 - 200 * number for number, name in enumerate(EXPERTS)}


class Asked:
    """One rank's order, and what was reported of it."""

    def __init__(self) -> None:
        config = SparseCheckpointConfig(enabled=True, window=3, reorder_windows=2)
        self.order, self.reports = Reordering(config, TABLE), list[bool]()

    def __call__(self, now: SlotSchedule, step: int, counts: Mapping[str, int], room: int = 1 << 40) -> SlotSchedule:
        return self.order.next_schedule(
            now, step, counts, room, alone(), lambda _, refused: self.reports.append(refused)
        )


def test_the_first_order_comes_with_the_first_counts() -> None:
    asked, first = Asked(), schedule(3, "rolling")
    second = asked(first, 3, OTHERWISE)
    assert second.groups != first.groups and asked.reports == [False]
    assert sorted(name for group in second.groups for name in group) == sorted(TABLE.names)


def test_it_changes_only_when_popularity_has_changed_and_not_too_soon() -> None:
    asked, first = Asked(), schedule(3, "rolling")
    second = asked(first, 3, OTHERWISE)
    assert asked(second, 9, OTHERWISE) is second
    assert asked(second, 6, LIKE_THE_ORDER) is second, "two windows must pass"
    assert asked(second, 9, LIKE_THE_ORDER).groups != second.groups
    assert asked.reports == [False, False]


def test_an_order_without_room_is_refused_and_reported() -> None:
    asked, first = Asked(), schedule(3, "rolling")
    assert asked(first, 3, OTHERWISE, room=1) is first and asked.reports == [True]
    # It is still due.
    assert asked(first, 6, OTHERWISE) is not first


def test_after_a_recovery_the_ranks_of_a_stage_wait_together() -> None:
    asked, first = Asked(), schedule(3, "rolling")
    asked.order.restart(4)
    assert asked(first, 6, OTHERWISE) is first, "the order counts as made at the recovery"
    assert asked(first, 12, OTHERWISE) is not first
