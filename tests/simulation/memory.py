"""A rank's host memory, which outlives its process: slots and transcripts, kept by the rules of the product."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron.moevement.recovery.decide import Decision, Offer, decide
from megatron.moevement.recovery.plan import iterations_to_keep, known_everywhere, slots_to_keep
from megatron.moevement.recovery.scope import Grid
from megatron.moevement.types import IterationRecord, SlotInfo
from tests.simulation.case import Violation, weight_of

Kept = Callable[[frozenset[int], int, int], frozenset[int]]


@dataclass(frozen=True)
class Rules:
    """The code under test; mutation tests replace parts of it by broken ones."""

    decide: Callable[[Grid, Sequence[Offer]], Decision] = decide
    slots_to_keep: Kept = slots_to_keep
    iterations_to_keep: Kept = iterations_to_keep
    known_everywhere: Callable[[tuple[int, int], int], int] = known_everywhere
    offers_uncommitted: bool = False


@dataclass
class Slot:
    """A slot and the record of the iteration before it."""

    info: SlotInfo
    full: dict[str, int]
    weights: dict[str, int]
    record: IterationRecord | None
    committed: bool = False


@dataclass
class Transcript:
    """What a rank sent and received in one iteration, by peer and key."""

    sent: dict[tuple[int, str, int, int], int] = field(default_factory=dict)
    received: dict[tuple[int, str, int, int], int] = field(default_factory=dict)
    complete: bool = False


@dataclass
class Memory:
    """Host memory of one rank. `pending` is being copied or digested."""

    run_id: str
    slots: dict[int, Slot] = field(default_factory=dict)
    pending: Slot | None = None
    transcript: dict[int, Transcript] = field(default_factory=dict)
    most_iterations: int = 0

    def committed(self) -> dict[int, SlotInfo]:
        """What the planner sees."""
        return {step: slot.info for step, slot in self.slots.items()}

    def slot(self, step: int) -> Slot:
        """The slot of a step, as a reader finds it: committed or not."""
        pending = self.pending if self.pending is not None and self.pending.info.step == step else None
        slot = self.slots.get(step, pending)
        if slot is None:
            raise Violation("retention", f"there is no slot of step {step} any more")
        if not slot.committed:
            raise Violation("uncommitted", f"the slot of step {step} is loaded before it is committed")
        return slot

    def retain(self, rules: Rules, loadable_everywhere: int, longest_run: int) -> None:
        """Frees what no window needs."""
        self.most_iterations = max(self.most_iterations, len(self.transcript))
        keep = rules.slots_to_keep(frozenset(self.slots), loadable_everywhere, longest_run)
        self.slots = {step: slot for step, slot in self.slots.items() if step in keep}
        kept = rules.iterations_to_keep(frozenset(self.transcript), loadable_everywhere, longest_run)
        self.transcript = {i: entry for i, entry in self.transcript.items() if i in kept}

    def drop_after(self, step: int) -> None:
        """Slots of later Steps: their iterations run again."""
        self.slots = {at: slot for at, slot in self.slots.items() if at <= step}

    def clear(self, run_id: str) -> None:
        """A new history begins."""
        self.run_id, self.slots, self.pending, self.transcript = run_id, {}, None, {}


def capture(info: SlotInfo, state: Mapping[str, int], record: IterationRecord | None) -> Slot:
    """The slot of a state."""
    full = {name: state[name] for name in info.full}
    return Slot(info, full, {name: weight_of(state[name]) for name in info.weights_only}, record)
