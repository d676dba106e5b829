"""The program of one simulated rank: an iteration and a recovery, read top to bottom."""

from collections.abc import Generator
from typing import Any

from megatron.moevement.recovery.decide import Decision, Offer
from megatron.moevement.recovery.phases import Phase, Standing, path
from megatron.moevement.recovery.plan import announcement
from megatron.moevement.types import IterationRecord, Run
from tests.simulation.case import MODULUS, gathered, initial
from tests.simulation.kernel import Kernel, PeerLost, Process, Steps
from tests.simulation.memory import Memory, Rules
from tests.simulation.passes import Model
from tests.simulation.shared import Shared


class RankProgram:
    """Trains, and recovers whenever its generation fails."""

    def __init__(self, kernel: Kernel, process: Process, shared: Shared, replacement: bool) -> None:
        self.kernel, self.process, self.shared = kernel, process, shared
        self.case, self.rank = kernel.case, process.rank
        self.rules: Rules = shared.rules
        self.memory: Memory = shared.memory_of(self.rank, kernel.lost)
        self.standing = Standing(None, Phase.LEAVE) if replacement else Standing(0, Phase.TRAIN)
        self.names = frozenset(self.case.operators[self.rank])
        self.model = Model(self)
        if not replacement:
            self.model.state = {**initial(self.case, self.rank)}
        self.records = {s.record.iteration: s.record for s in self.memory.slots.values() if s.record is not None}
        self.known = -1
        self.minimum: int | None = None
        self.copying = self.committing = False

    def died(self) -> None:
        """A copy that was under way is never handed over."""
        self.shared.copied.pop(self.rank, None)

    def at(self) -> None:
        """A message boundary."""
        self.process.boundary(self.standing.phase)

    def main(self) -> Steps:
        """The program."""
        while True:
            try:
                if self.standing.phase is not Phase.TRAIN:
                    yield from self.recover()
                yield from self.train()
                return
            except PeerLost:
                self.standing.failed()

    # ----------------------------------------------------------------------------------------------- training

    def train(self) -> Steps:
        """To the end."""
        self.shared.check(self)
        if self.process.generation == 0 and self.standing.step == 0:
            yield from self.gather_weights("first")
        while self.standing.step != self.case.iterations:
            yield from self.iteration()
        yield from self.everybody("end", 0, max)

    def iteration(self) -> Steps:
        """One iteration, in the manager's order."""
        step = self.standing.step
        assert step is not None
        self.standing.next_iteration()
        yield from self.begin_slot(step)
        yield from self.model.passes(step, {})
        yield from self.fence()
        self.memory.transcript[step].complete = True
        self.standing.gradients_final()
        self.at()
        norm = yield from self.everybody(("norm", step), self.model.own, lambda parts: sum(parts) % MODULUS)
        self.model.update(step, norm, frozenset())
        self.note_record(IterationRecord(step, None, norm, False, (), (), 1.0, step))
        self.standing.updated()
        self.shared.check(self)
        yield from self.gather_weights(step)
        if self.minimum is not None:
            name, self.minimum = ("minimum", self.minimum), None
            minimum = yield from self.process.take(name)
            heard = self.rules.known_everywhere(minimum, self.case.longest_run)
            self.shared.window_everywhere |= heard > self.known
            self.known = max(self.known, heard)
        self.minimum = step
        self.contribute(
            ("minimum", step), tuple(range(self.case.world)), announcement(frozenset(self.memory.slots)), _minimum
        )
        if self.case.dense_every and (step + 1) % self.case.dense_every == 0:
            self.kernel.at(
                3 * self.kernel.delay(self.rank, -2), self.shared.write_dense, self, step + 1, {**self.model.state}
            )

    def note_record(self, record: IterationRecord) -> None:
        """Keeps the records that a replay may need."""
        self.records[record.iteration] = record
        self.records.pop(record.iteration - 4 * self.case.longest_run, None)

    # -------------------------------------------------------------------------------------------------- slots

    def begin_slot(self, step: int) -> Steps:
        """Frees slots, and begins to copy the slot of the step."""
        self.memory.retain(self.rules, self.known, self.case.longest_run)
        if len(self.memory.slots) + self.committing >= self.case.ring:
            yield from self.drain()
            self.memory.retain(self.rules, self.known, self.case.longest_run)
            if len(self.memory.slots) >= self.case.ring:
                self.shared.window_given_up(self, step)
                del self.memory.slots[min(self.memory.slots)]
        self.at()
        self.copying = (self.rank, step) not in self.case.failed_slots
        if self.copying:
            self.shared.begin_copy(self, step)

    def fence(self) -> Steps:
        """Hands the copied slot over, once the one before is committed."""
        if not self.copying:
            return
        yield from self.drain()
        self.copying, self.committing = False, True
        self.memory.pending = self.shared.copied.pop(self.rank)
        self.kernel.at(2 * self.kernel.delay(self.rank, self.rank), self.commit)
        self.at()

    def commit(self) -> None:
        """The committer's thread."""
        slot, self.committing = self.memory.pending, False
        if not self.process.alive or slot is None:
            return
        self.memory.pending, slot.committed = None, True
        self.memory.slots[slot.info.step] = slot
        self.process.woken("commit")

    def drain(self) -> Steps:
        """Waits for the committer."""
        while self.committing:
            yield from self.process.wait("commit")

    # ------------------------------------------------------------------------------------------- collectives

    def contribute(self, name: Any, members: tuple[int, ...], value: Any, reduce: Any) -> None:
        """A part in a collective."""
        self.at()
        self.kernel.contribute(self.process, name, members, value, reduce)

    def everybody(self, name: Any, value: Any, reduce: Any) -> Generator[None, None, Any]:
        """A collective of the world."""
        return (yield from self.collective(name, tuple(range(self.case.world)), value, reduce))

    def collective(self, name: Any, members: tuple[int, ...], value: Any, reduce: Any) -> Generator[None, None, Any]:
        """A collective of some ranks."""
        self.contribute(name, members, value, reduce)
        result = yield from self.process.take(name)
        self.at()
        return result

    def stage_ranks(self) -> tuple[int, ...]:
        """The ranks of the own stage."""
        first = self.rank // self.case.width * self.case.width
        return tuple(range(first, first + self.case.width))

    def gather_weights(self, when: Any) -> Steps:
        """Every rank of the stage gets all its weights; doing it twice changes nothing."""
        own = self.model.own_weights()
        self.model.weights = yield from self.collective(("weights", when), self.stage_ranks(), own, gathered)

    # ----------------------------------------------------------------------------------------------- recovery

    def recover(self) -> Steps:
        """From LEAVE to TRAIN."""
        self.at()
        self.minimum, self.copying = None, False
        self.shared.copied.pop(self.rank, None)
        yield from self.drain()
        self.standing.enter(Phase.JOIN)
        self.at()
        yield from self.process.join()
        self.standing.enter(Phase.AGREE)
        offers = yield from self.everybody("offers", self.offer(), list)
        decision = self.shared.decision(self, offers)
        yield from self.carry_out(decision)
        yield from self.everybody("meet", self.standing.step, self.shared.same_step)
        self.known = decision.loadable_everywhere
        self.standing.enter(Phase.TRAIN)

    def offer(self) -> Offer:
        """What this rank has."""
        memory = self.memory
        for rank, step in self.case.damaged:
            if rank == self.rank:
                memory.slots.pop(step, None)
        slots = memory.committed()
        if self.rules.offers_uncommitted and memory.pending is not None:
            slots[memory.pending.info.step] = memory.pending.info
        return Offer(
            self.rank,
            self.standing.step,
            self.standing.position,
            memory.run_id if slots else "",
            slots,
            self.names,
            frozenset(i for i, entry in memory.transcript.items() if entry.complete),
            {**self.records},
            self.shared.dense_step(),
        )

    def carry_out(self, decision: Decision) -> Steps:
        """This rank's part."""
        phases = path(decision, self.rank)
        yield from self.exchange_records(decision)
        if Phase.LOAD not in phases:
            if Phase.ROLL_FORWARD in phases:
                self.standing.enter(Phase.ROLL_FORWARD)
                self.at()
                record = self.records[decision.target - 1]
                self.model.update(record.iteration, record.grad_norm, frozenset())
                self.standing.updated()
            # The gathering of the weights behind the last update may have been cut off.
            yield from self.gather_weights("again")
            if Phase.SERVE in phases:
                self.standing.enter(Phase.SERVE)
                self.serve(decision)
        else:
            self.standing.enter(Phase.LOAD)
            self.model.state, self.model.frozen = {}, {}
            self.at()
            self.known = decision.loadable_everywhere
            if decision.source in ("dense", "scratch"):
                self.memory.clear(f"run{self.process.generation}")
                self.records.clear()
                self.model.state = self.shared.dense_state(decision, self.rank)
                yield from self.gather_weights("loaded")
            elif decision.run is not None:
                yield from self.replay(decision.run, decision.run.last, frozenset(range(self.case.world)))
            else:
                (plan,) = [plan for plan in decision.segments if self.rank in plan.ranks]
                yield from self.replay(plan.run, decision.target, plan.ranks)
            self.standing.reached(decision.target)
            self.shared.check(self)
        self.standing.enter(Phase.MEET)

    def exchange_records(self, decision: Decision) -> Steps:
        """Ranks that replay or roll forward get the records from those who have them."""
        wanting = decision.roll_forward.union(*(plan.ranks for plan in decision.segments))
        for iteration, holder in decision.record_source.items():
            if holder == self.rank:
                for rank in sorted(wanting - {holder}):
                    self.at()
                    self.process.post(rank, ("record", iteration), self.records[iteration])
            elif self.rank in wanting:
                self.records[iteration] = yield from self.process.take(("record", iteration))

    def serve(self, decision: Decision) -> None:
        """Sends what the neighbours in a segment need of the transcript, and what it received from them."""
        for plan in decision.segments:
            for rank in sorted(plan.ranks & self.case.grid.neighbours[self.rank]):
                for iteration in range(plan.run.first, decision.target):
                    entry = self.memory.transcript[iteration]
                    sent = {key[1:]: value for key, value in entry.sent.items() if key[0] == rank}
                    received = {key[1:]: value for key, value in entry.received.items() if key[0] == rank}
                    self.at()
                    self.process.post(rank, ("feed", self.rank, iteration), (sent, received))

    def replay(self, run: Run, target: int, members: frozenset[int]) -> Steps:
        """Conversion and catch-up: every slot of the run, and every iteration up to the target."""
        self.memory.drop_after(target)
        active: set[str] = set()
        for step in range(run.first, target + 1):
            if step <= run.last:
                self.shared.load_slot(self, step, active)
                yield from self.gather_weights(("loaded", step))
            if step == target:
                break
            self.at()
            phase = Phase.CONVERT if step < run.last else Phase.CATCH_UP
            if self.standing.phase is not phase:
                self.standing.enter(phase)
            # The conversion's own slots hold the records that it needs.
            kept = self.memory.slot(step + 1).record if step < run.last else self.records[step]
            assert kept is not None and kept.iteration == step
            if step > run.last:
                yield from self.begin_slot(step)
            feeds = {}
            for rank in sorted(self.case.grid.neighbours[self.rank] - members):
                feeds[rank] = yield from self.process.take(("feed", rank, step))
            yield from self.model.passes(step, feeds)
            if step > run.last:
                yield from self.fence()
            self.memory.transcript[step].complete = True
            self.model.update(step, kept.grad_norm, self.names - active)
            yield from self.gather_weights(("replayed", step))


def _minimum(told: list[tuple[int, int]]) -> tuple[int, int]:
    return min(t[0] for t in told), min(t[1] for t in told)
