"""When experts are ordered anew by popularity, and how (paper 3.2)."""

from collections.abc import Callable, Mapping

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.schedule.ordering import capture_order, should_reorder
from megatron.moevement.schedule.slots import SlotSchedule
from megatron.moevement.schedule.window import divide, slot_bytes

# The first order by popularity may come with the first window.
_LONG_AGO = -(1 << 62)


class Reordering:
    """Keeps what the present order was made from. All ranks ask at the same steps.

    Args:
        config: the thresholds.
        table: the operators of this rank.
    """

    def __init__(self, config: SparseCheckpointConfig, table: OperatorTable) -> None:
        self._config, self._table = config, table
        self._counts: Mapping[str, int] = {}
        self._ordered_at = _LONG_AGO

    def restart(self, step: int) -> None:
        """The order is taken as made at `step`, from unknown counts; all ranks of a stage do so together."""
        self._counts, self._ordered_at = {}, step

    def next_schedule(
        self,
        schedule: SlotSchedule,
        step: int,
        counts: Mapping[str, int],
        most_bytes: int,
        agreement: Agreement,
        report: Callable[[SlotSchedule, bool], None],
    ) -> SlotSchedule:
        """The schedule from `step` on: a new one if popularity has changed enough. Collective.

        Args:
            schedule: the present one; `step` begins a window of it.
            step: where it may change.
            counts: tokens by expert since the last call, reduced over the stage.
            most_bytes: room of a slot.
            agreement: the world.
            report: told of a change, and of one that is refused for lack of room.
        """
        groups = schedule.groups
        due = step - self._ordered_at >= self._config.reorder_windows * schedule.window
        if due and should_reorder(self._counts, counts, self._config.reorder_change, self._config.reorder_share):
            order = capture_order(self._table, counts)
            groups = divide(self._table, order, schedule.window, schedule.mode)
        worst = max(slot_bytes(self._table, groups, schedule.mode))
        # All or none: data-parallel replicas must freeze the same operators in a replay.
        too_large = bool(agreement.maximum([float(worst > most_bytes)])[0])
        if groups == schedule.groups:
            return schedule
        chosen = schedule if too_large else SlotSchedule(groups, schedule.mode)
        if not too_large:
            self._counts, self._ordered_at = counts, step
        report(chosen, too_large)
        return chosen
