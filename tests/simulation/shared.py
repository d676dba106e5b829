"""What lies outside the processes: host memories, dense checkpoints, and the checkers that see everything."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron.moevement.recovery.decide import Decision, Offer, Position
from megatron.moevement.recovery.phases import Phase
from megatron.moevement.recovery.plan import common_run
from megatron.moevement.recovery.scope import closure
from megatron.moevement.types import SlotInfo
from tests.simulation.case import Case, Undisturbed, Violation, initial
from tests.simulation.memory import Memory, Rules, Slot, capture

if TYPE_CHECKING:
    from tests.simulation.worker import RankProgram


class Shared:
    """Storage and checkers of one simulated job."""

    def __init__(self, case: Case, rules: Rules) -> None:
        self.case, self.rules = case, rules
        self.undisturbed = Undisturbed(case)
        self.copied: dict[int, Slot] = {}
        self.sources: list[str] = []
        self.longest_replay = self.probed = self.rolled_forward = 0
        self.window_everywhere = self.memory_lost = False
        self._memories = [Memory("run0") for _ in range(case.world)]
        self._dense: dict[int, dict[int, dict[str, int]]] = {}
        self._decisions: dict[int, Decision] = {}

    @property
    def most_iterations(self) -> int:
        """The most iterations that any transcript held."""
        return max(memory.most_iterations for memory in self._memories)

    def memory_of(self, rank: int, lost: set[int]) -> Memory:
        """The host memory that a process of the rank finds."""
        if rank in lost:
            lost.discard(rank)
            self.memory_lost = True
            self._memories[rank] = Memory("")
        if not self.rules.offers_uncommitted:
            self._memories[rank].pending = None
        return self._memories[rank]

    # -------------------------------------------------------------------------------------------------- slots

    def begin_copy(self, worker: "RankProgram", step: int) -> None:
        """The copy engine."""
        spec = self.case.spec(worker.rank, step)
        info = SlotInfo(step, 0, frozenset(spec.full), frozenset(spec.weights_only), 0)
        self.copied[worker.rank] = capture(info, worker.model.state, worker.records.get(step - 1))

    def load_slot(self, worker: "RankProgram", step: int, active: set[str]) -> None:
        """Loads a slot as the conversion does; what is active already is compared instead."""
        slot = worker.memory.slot(step)
        model = worker.model
        if slot.record is not None:
            worker.records[slot.record.iteration] = slot.record
        for name, full in slot.full.items():
            if name in active and model.state[name] != full:
                raise Violation("inexact", f"rank {worker.rank}: {name} replayed to step {step} differs from its slot")
            model.state[name] = full
            model.frozen.pop(name, None)
        model.frozen |= {n: weight for n, weight in slot.weights.items() if n not in active and n not in slot.full}
        active.update(slot.full)

    def window_given_up(self, worker: "RankProgram", step: int) -> None:
        """The ring was too small."""
        self.window_everywhere = False
        if not self.case.loses_slots:
            raise Violation("retention", f"rank {worker.rank} gives up a window at step {step}: its ring is full")

    # -------------------------------------------------------------------------------------------------- dense

    def write_dense(self, worker: "RankProgram", step: int, state: dict[str, int]) -> None:
        """One rank's part of a dense checkpoint is on disk."""
        if worker.process.alive:
            self._dense.setdefault(step, {})[worker.rank] = state

    def dense_step(self) -> int | None:
        """The newest dense checkpoint of which all parts are there."""
        return max((s for s, parts in self._dense.items() if len(parts) == self.case.world), default=None)

    def dense_state(self, decision: Decision, rank: int) -> dict[str, int]:
        """The state to load when there are no slots."""
        return {**(self._dense[decision.target][rank] if decision.source == "dense" else initial(self.case, rank))}

    # ----------------------------------------------------------------------------------------------- checkers

    def check(self, worker: "RankProgram") -> None:
        """The state is that of a run without failures."""
        step = worker.standing.step
        if (
            step is None
            or step > self.case.iterations
            or worker.model.state != self.undisturbed.full[step][worker.rank]
        ):
            raise Violation("mixed", f"the state of rank {worker.rank} is not that of Step {step}")

    def same_step(self, steps: list[int]) -> int:
        """All ranks meet at one Step."""
        if len(set(steps)) != 1:
            raise Violation("mixed", f"ranks meet at Steps {steps}")
        return steps[0]

    def decision(self, worker: "RankProgram", offers: Sequence[Offer]) -> Decision:
        """The decision of a generation; every rank comes to the same, so it is computed once."""
        generation = worker.process.generation
        if generation not in self._decisions:
            decision = self.rules.decide(self.case.grid, offers)
            self._decisions[generation] = decision
            self.sources.append(decision.source)
            self.rolled_forward += len(decision.roll_forward)
            self._bounded(decision)
            whole = self.window_everywhere and not self.memory_lost and not self.case.damaged
            if whole and common_run([(o.slots, o.operators) for o in offers]) is None:
                raise Violation("retention", "all ranks held a window, and no node was lost; now there is none")
            if decision.source in ("dense", "scratch"):
                self.window_everywhere = self.memory_lost = False
            worker.kernel.note(
                f"generation {generation}: {decision.source}, target {decision.target}"
                + "".join(
                    f", stages {p.stages} replay {p.run.first} to {decision.target - 1}" for p in decision.segments
                )
                + (f", {sorted(decision.roll_forward)} roll forward" if decision.roll_forward else "")
                + "".join(f"; {reason}" for reason in decision.reasons)
            )
        return self._decisions[generation]

    def _bounded(self, decision: Decision) -> None:
        for plan in decision.segments:
            replayed = decision.target - plan.run.first
            self.longest_replay = max(self.longest_replay, replayed)
            if replayed > self.case.replay_bound and not self.case.loses_slots:
                raise Violation("bound", f"stages {plan.stages} replay {replayed}, W is {self.case.window}")

    def probe(self, workers: dict[int, Any]) -> None:
        """If any one stage died now, it could recover alone; asked only when all ranks train and hold a window."""
        programs: list[RankProgram] = [workers[rank] for rank in range(self.case.world)]
        if any(p.standing.phase is not Phase.TRAIN or not p.process.alive for p in programs) or self.case.loses_slots:
            return
        if common_run([(p.memory.committed(), p.names) for p in programs]) is None:
            if self.window_everywhere and not self.memory_lost:
                raise Violation("retention", "the window that all ranks held is gone")
            return
        offers = [p.offer() for p in programs]
        for stage in range(self.case.stages):
            failed = closure(self.case.grid, {stage})
            if len(failed) == self.case.stages:
                continue
            dead = self.case.grid.ranks_of(failed)
            asked = [_dead(offer, programs[offer.rank]) if offer.rank in dead else offer for offer in offers]
            decision = self.rules.decide(self.case.grid, asked)
            self.probed += 1
            if decision.source != "local":
                why = "; ".join(decision.reasons)
                raise Violation("retention", f"stages {sorted(failed)} could not recover alone: {why}")
            self._bounded(decision)


def _dead(offer: Offer, program: "RankProgram") -> Offer:
    kept = (slot.record for slot in program.memory.slots.values())
    records = {record.iteration: record for record in kept if record is not None}
    return replace(offer, step=None, position=Position.RUNNING, records=records)
