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
    kept: set[int] = set()
    step = max(steps, default=-1)
    while step in steps:
        kept.add(step)
        step -= 1
    return frozenset(kept)


def iterations_to_keep(iterations: frozenset[int], loadable_everywhere: int, longest_run: int) -> frozenset[int]:
    """Iterations whose transcript must stay, so that any neighbour that fails can replay up to now.

    The neighbour's run ends at `loadable_everywhere` or later, so it starts no earlier than its slots are kept
    (`slots_to_keep`), and the first iteration that it replays is that of its first slot. Without such a window
    all stay: the neighbours' first windows grow from the first iteration on.
    """
    return frozenset(i for i in iterations if loadable_everywhere < 0 or i > loadable_everywhere - longest_run)
