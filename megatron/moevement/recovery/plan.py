"""Which slots a recovery loads and which must stay: pure functions. Both window modes use the same planner."""

from collections.abc import Mapping, Sequence

from megatron.moevement.types import Run, SlotInfo

Slots = Mapping[int, SlotInfo]


def is_window(slots: Slots, operators: frozenset[str], run: Run) -> bool:
    """Whether a dense state of Step `run.last` can be made from the run's slots.

    Every operator must be full in one slot, and weights-only in every slot of the run before that one, because the
    replays before it need its weights.
    """
    waiting = set(operators)
    for step in run.steps:
        info = slots.get(step)
        if info is None or not waiting <= (info.full | info.weights_only):
            return False
        waiting -= info.full
    return not waiting


def shortest_run(slots: Slots, operators: frozenset[str], last: int) -> Run | None:
    """The shortest run that ends at step `last` and is a window on this rank, or None."""
    missing = set(operators)
    first = last
    while first in slots:
        missing -= slots[first].full
        if not missing and is_window(slots, operators, Run(first, last)):
            return Run(first, last)
        first -= 1
    return None


def newest_run(slots: Slots, operators: frozenset[str]) -> Run | None:
    """This rank's window with the newest end, or None."""
    for last in sorted(slots, reverse=True):
        run = shortest_run(slots, operators, last)
        if run is not None:
            return run
    return None


def common_run(ranks: Sequence[tuple[Slots, frozenset[str]]]) -> Run | None:
    """The window with the newest end that every rank can load, or None.

    All ranks load the same steps. After a change of order the shortest run of one rank may start earlier than that of
    another, so the earliest start is tried for all.

    Args:
        ranks: per rank, its verified slots by step, and the names of its operators.
    """
    if not ranks:
        return None
    shared = set(ranks[0][0]).intersection(*(slots for slots, _ in ranks[1:]))
    for last in sorted(shared, reverse=True):
        own = [shortest_run(slots, operators, last) for slots, operators in ranks]
        found = [run for run in own if run is not None]
        if len(found) < len(own):
            continue
        run = Run(min(r.first for r in found), last)
        if all(is_window(slots, operators, run) for slots, operators in ranks):
            return run
    return None


def slots_to_keep(steps: frozenset[int], loadable_everywhere: int, longest_run: int) -> frozenset[int]:
    """Steps whose slots must stay, given what all ranks are known to be able to load.

    Args:
        steps: this rank's committed steps.
        loadable_everywhere: newest step at which every rank is known to end a window, -1 if none.
        longest_run: slots of the longest window (`schedule.slots.longest_run`). No rank's window that ends at
            `loadable_everywhere` starts earlier, so all ranks keep the same slots without a further exchange.

    Without such a window the unbroken row that ends at the newest step stays, because a window grows from it.
    """
    if loadable_everywhere >= 0:
        return frozenset(step for step in steps if step > loadable_everywhere - longest_run)
    row = unbroken_row(steps)
    return frozenset(row.steps) if row is not None else frozenset()


def unbroken_row(steps: frozenset[int]) -> Run | None:
    """The row of slots without a gap that ends at the newest step; None without slots."""
    if not steps:
        return None
    first = last = max(steps)
    while first - 1 in steps:
        first -= 1
    return Run(first, last)


def announcement(steps: frozenset[int]) -> tuple[int, int]:
    """What a rank tells the others of its committed slots: end and negative start of its unbroken row.

    The element-wise minimum over all ranks says which row they have in common (`known_everywhere`).
    """
    row = unbroken_row(steps)
    return (row.last, -row.first) if row is not None else (-1, 0)


def known_everywhere(minimum: tuple[int, int], longest_run: int) -> int:
    """The step at which all ranks can end a window, from the minimum of their announcements; negative if none.

    The newest step of the slowest rank alone would not do: a rank that has lost a slot to a failed copy can end no
    window near the gap, and the slowest may stand just there.
    """
    last, first = minimum[0], -minimum[1]
    return last if last < 0 or last - longest_run + 1 >= first else -1


def iterations_to_keep(iterations: frozenset[int], loadable_everywhere: int, longest_run: int) -> frozenset[int]:
    """Iterations whose transcript must stay, so that any neighbour that fails can replay up to now.

    The neighbour's run ends at `loadable_everywhere` or later, so it starts no earlier than its slots are kept
    (`slots_to_keep`), and the first iteration that it replays is that of its first slot. Without such a window
    all stay: the neighbours' first windows grow from the first iteration on.
    """
    return frozenset(i for i in iterations if loadable_everywhere < 0 or i > loadable_everywhere - longest_run)
