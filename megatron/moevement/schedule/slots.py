"""Which operators the slot of a step holds, in both window modes."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.moevement.schedule.window import Groups
from megatron.moevement.types import SlotSpec


@dataclass(frozen=True, slots=True)
class SlotSchedule:
    """A division of the operators into W groups, of which slot `step % W` captures one in full.

    fixed: operators of later groups are weights-only, those of earlier groups absent (they were captured in this
    window already). rolling: every other operator is weights-only, so that any W slots in a row are a window.
    """

    groups: Groups
    mode: str

    @property
    def window(self) -> int:
        """W."""
        return len(self.groups)

    def index(self, step: int) -> int:
        """Place of the step's slot in its window."""
        return step % self.window

    def spec(self, step: int) -> SlotSpec:
        """What the slot of `step` holds."""
        index = self.index(step)
        others = self.groups[index + 1 :] if self.mode == "fixed" else self.groups[:index] + self.groups[index + 1 :]
        return SlotSpec(
            step,
            index,
            self.groups[index],
            tuple(name for group in others for name in group),
            tuple(len(group) for group in self.groups),
        )


def schedule_of(specs: Mapping[int, SlotSpec], last: int, mode: str) -> SlotSchedule:
    """The schedule that the slot of step `last` was taken with, so that training goes on with it after a recovery.

    Args:
        specs: what the slots of a run hold, by step.
        last: the run's last step.
        mode: window mode.

    Raises:
        KeyError: the specs are not those of a run.
    """
    spec = specs[last]
    names = list(spec.weights_only)
    groups: list[tuple[str, ...]] = []
    for index, length in enumerate(spec.group_lengths):
        if index == spec.index:
            groups.append(spec.full)
        elif index < spec.index and mode == "fixed" and length:
            # Captured earlier in this window and absent since; the order changes only between windows. A slot that
            # captured nothing need not be in the run.
            groups.append(specs[last - spec.index + index].full)
        else:
            groups.append(tuple(names[:length]))
            del names[:length]
    return SlotSchedule(tuple(groups), mode)


def longest_run(window: int, mode: str, reorder: bool) -> int:
    """Slots of the longest run that a recovery may have to convert.

    In fixed mode a run that ends inside a window starts with the window before it. In rolling mode a change of order
    moves operators to the end of the window, where they were captured last up to 2W-1 slots ago.
    """
    return 2 * window - 1 if mode == "fixed" or reorder else window


def ring_slots(window: int, mode: str, reorder: bool) -> int:
    """Slots of host memory that a rank needs so that a window that all ranks can load always exists.

    Behind the newest such window are up to three slots: one being copied, one being digested, and one whose commit
    the other ranks have not heard of yet.
    """
    return longest_run(window, mode, reorder) + 3
