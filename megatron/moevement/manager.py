"""One iteration and one recovery, read top to bottom: the face of sparse checkpointing for a training loop."""

import itertools
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron.moevement import injection
from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.events import EventLog
from megatron.moevement.operators.state import TrainingState
from megatron.moevement.planning import Measured, SparsePlan, Surroundings, make_plan
from megatron.moevement.recovery.conversion import Conversion, Progress, StartPoint, convert, require_same_loss
from megatron.moevement.recovery.plan import known_everywhere
from megatron.moevement.recovery.sources import SlotReader
from megatron.moevement.recovery.start import (
    Found,
    SlotOffer,
    choose_source,
    find_store,
    open_quietly,
    restart_count,
    store_path,
)
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.schedule.slots import SlotSchedule, schedule_of
from megatron.moevement.slot_cycle import NO_SLOTS, Retention, SlotCycle, Tools, schedule_fields
from megatron.moevement.slot_memory import SlotMemory, together
from megatron.moevement.snapshot.bandwidth import measure_digests
from megatron.moevement.snapshot.calibration import Calibration
from megatron.moevement.store.host_store import HostStore, discard
from megatron.moevement.types import IterationRecord, Run
from moevement_ext import CopyEngine, DeviceDigests, DigestPool

# What a rank says it can load while its slots' memory isn't pinned yet; slots are captured once all ranks' memory is.
NOT_PINNED = -2
# Iterations whose record is kept although no window can need it: what is copied, digested, and not heard of yet.
RECORDS_BEYOND_RUN = 4


class SparseCheckpointManager:
    """Takes a slot in every iteration and recovers from slots.

    The training loop calls `start` once, then for every iteration `begin_iteration`, `before_optimizer_step` and
    `end_iteration`, and `finish` at the end. All are collective: every rank calls them for the same steps.
    """

    def __init__(
        self,
        config: SparseCheckpointConfig,
        state: TrainingState,
        agreement: Agreement,
        engine: CopyEngine,
        events: EventLog,
        surroundings: Surroundings,
        device_digests: DeviceDigests | None = None,
    ) -> None:
        self._config, self._state, self._agreement, self._engine = config, state, agreement, engine
        self._events, self._surroundings = events, surroundings
        self._path = store_path(config.job_directory, agreement.rank)
        self._identity = {
            **surroundings.identity,
            "--sparse-ckpt-window-mode": config.window_mode,
            "--sparse-ckpt-reorder": config.reorder,
        }
        self._threads = config.threads(surroundings.ranks_on_node)
        self._digests = DigestPool(self._threads) if config.digest != "off" else None
        self._memory = SlotMemory(config, agreement, engine, self._path, surroundings.ranks_on_node)
        self._tools = Tools(config, state, agreement, engine, self._digests, events, device_digests)
        place, copies = (config.job_directory, agreement.rank), (surroundings.chunks, surroundings.awaited_copies)
        self._calibration = Calibration(engine, state, *place, *copies)
        self._store: HostStore | None = None
        self._cycle: SlotCycle | None = None
        self._record: IterationRecord | None = None
        self._records: dict[int, IterationRecord] = {}
        self._found, self._unusable = Found(None, "no slots"), frozenset[int]()
        self._loadable_everywhere = self._told = -1
        self._alone = self._verified = self._started = False
        self._iteration_starts: list[float] = []
        self._first_step = 0
        self.plan: SparsePlan | None = None

    @property
    def retention(self) -> Retention | None:
        """What decides how long slots and transcripts are kept; None while no slots are taken."""
        if self._cycle is None or self.plan is None:
            return None
        return Retention(self._cycle.store.content["run_id"], self._loadable_everywhere, self.plan.longest_run)

    @property
    def has_window(self) -> bool:
        """Whether this rank has committed a whole window."""
        return self._cycle is not None and self._cycle.has_window

    def record(self, iteration: int) -> IterationRecord | None:
        """The record of a recent iteration."""
        return self._records.get(iteration)

    @property
    def capturing(self) -> bool:
        """Whether iterations take slots: the window is chosen and its memory is pinned on all ranks."""
        return self._cycle is not None

    # ------------------------------------------------------------------------------------------------ recovery

    def start(self, dense_step: int | None) -> StartPoint:
        """Recovers from the slots of an earlier worker if there are any that all ranks can load.

        Args:
            dense_step: step of the newest dense checkpoint, None without one. The caller loads it if the result's
                source is `dense`.

        Raises:
            StoreError: the slots are in use or of another model, layout or format, or there is no room for new ones.
            RecoveryError: the replay wasn't exact.
        """
        self._set_down()
        self._memory.lock()
        if self._config.fresh and restart_count() == 0 and not self._started:
            together(self._agreement, lambda: discard(self._path))
        self._started = True
        injection.reached("start")
        path, wanted = None if self._config.dry_run else self._path, {**self._identity}
        if self._config.window is not None:
            wanted["--sparse-ckpt-window"] = self._config.window
        found = find_store(path, wanted, self._agreement, self._config.host_memory_gib)
        choice = choose_source(found, self._state, self._agreement, self._digests, dense_step)
        if not self._config.dry_run:
            run = [choice.run.first, choice.run.last] if choice.run is not None else None
            self._events.emit("start", run=run, dense_step=choice.dense_step, reasons=choice.reasons)
        if choice.run is None:
            if found.store is not None:
                found.store.close()
            self._first_step = choice.dense_step or 0
            if self._config.window is not None:
                self._adopt(None, self._config.window)
            source = "scratch" if choice.dense_step is None else "dense"
            return StartPoint(source, choice.dense_step, None, choice.reasons)
        assert found.store is not None
        conversion = self._convert(found.store, choice.run, choice.unusable, self._agreement)
        self._loadable_everywhere = choice.run.last
        return StartPoint("slots", choice.run.last, conversion, choice.reasons)

    def _convert(self, store: HostStore, run: Run, unusable: frozenset[int], agreement: Agreement) -> Conversion:
        """Makes the state of Step `run.last` from slots, and goes on with their schedule. Collective over the group."""
        reader = SlotReader(store, self._state.table, self._agreement.rank, self._digests)
        self._events.emit("recovery_started", first=run.first, last=run.last, replays=run.replays, source=reader.source)
        if store is not self._store:
            self._memory.pin(store)
        self._memory.wait_until_pinned()
        conversion = convert(
            self._state, reader, run, agreement, self._surroundings.deterministic, self._report_conversion
        )
        specs = {step: reader.manifest(step).spec for step in run.steps}
        schedule = schedule_of(specs, run.last, self._config.window_mode)
        self.plan = make_plan(self._config, self._state, agreement, None, schedule.window)
        # Slots of later steps belong to iterations that will run again; each is replaced by its own capture.
        # Damaged ones go too: this rank would go on announcing them.
        store.drop(step for step in store.committed if step > run.last or step in unusable)
        self._use(store, schedule, run.last).continue_from(specs, run.last)
        for record in (reader.manifest(step).record for step in run.steps):
            if record is not None:
                self._note(record)
        self._events.emit(
            "recovery_finished",
            step=run.last,
            replays=conversion.replays,
            compared=conversion.compared,
            different=conversion.different,
            seconds=conversion.seconds,
            **schedule_fields(schedule),
        )
        return conversion

    def _set_down(self) -> None:
        """Lets go of slots, schedule and measurements; the slots stay where they are."""
        self._calibration.reset()
        self._iteration_starts.clear()
        if self._cycle is not None:
            self._cycle.close()
        if self._store is not None:
            self._memory.give_back(self._store, keep=True)
        if self._found.store is not None and self._found.store is not self._store:
            self._found.store.close()
        self._found = Found(None, "no slots")
        self._store = self._cycle = self._record = None
        self._records.clear()
        self._loadable_everywhere = -1

    def interrupt(self, verify: bool) -> SlotOffer:
        """After a failure elsewhere: drops what is under way, and says what slots this rank could load.

        Args:
            verify: whether the slots' digests are checked; needed only where they may be loaded.
        """
        self._agreement.forget()
        if self._cycle is not None:
            self._cycle.interrupt()
        if self._store is None and self._found.store is None:
            self._memory.lock_alone()
            self._found = open_quietly(self._path)
        store = self._store or self._found.store
        records = dict(self._records)
        if store is None:
            return SlotOffer("", {}, self._state.table.names, records, (self._found.problem,))
        reader = SlotReader(store, self._state.table, self._agreement.rank, self._digests)
        usable, rejected = reader.verified() if verify else (store.committed, {})
        self._unusable, self._verified = frozenset(rejected), verify
        problems = tuple(f"slot of step {step}: {why}" for step, why in rejected.items())
        return SlotOffer(store.content["run_id"], usable, self._state.table.names, records, problems)

    def recover(self, run: Run | None, target: int, records: Mapping[int, IterationRecord], group: Agreement) -> None:
        """Brings this rank, with its segment, to Step `target` while all others keep their state.

        Converts `run`, then replays up to the target and takes the slots of these iterations again. Collective over
        the segment's ranks, which are `group`.
        """
        store = self._store or self._found.store
        assert run is not None and store is not None
        if self._cycle is not None:
            self._cycle.close()
        if not self._verified:
            # This stage has joined others that failed. What is found wrong isn't offered when all agree again.
            reader = SlotReader(store, self._state.table, self._agreement.rank, self._digests)
            for step in run.steps:
                reader.verify(step)
        self._records.update(records)
        self._convert(store, run, self._unusable, group)
        self._alone = True
        try:
            for iteration in range(run.last, target):
                started = time.perf_counter()
                record = records[iteration]
                injection.reached("catch_up", iteration)
                self.begin_iteration(iteration)
                replayed = self._state.replay(record, frozenset(), self.before_optimizer_step)
                require_same_loss(replayed, record, group, self._surroundings.deterministic)
                self.end_iteration(record)
                self._report_conversion(Progress(iteration, 0, 0, True, time.perf_counter() - started))
        finally:
            self._alone = False
        self._told = target - 1

    def resume(self, loadable_everywhere: int, record: IterationRecord | None) -> None:
        """All ranks stand at one Step again: goes on as if nothing had happened.

        Args:
            loadable_everywhere: what every rank can load, the same number on all of them.
            record: of the iteration before, where its end was not reported: the failure came first.
        """
        if record is not None:
            self._note(record)
            if record.iteration > self._told:
                self._tell(record, interrupted=True)
        self._loadable_everywhere = loadable_everywhere
        self._iteration_starts.clear()

    def _report_conversion(self, progress: Progress) -> None:
        self._events.emit("conversion", **asdict(progress))

    # ----------------------------------------------------------------------------------------------- iteration

    def begin_iteration(self, step: int) -> None:
        """Starts copying the slot of `step`. A capture that fails is counted and reported, training goes on."""
        self._iteration_starts.append(time.perf_counter())
        del self._iteration_starts[: -1 if self._store is not None else 0]
        if self._store is None:
            self._measure(step)
        elif not self._calibration.done and self._calibration.iterations >= self._config.measure_iterations:
            self._calibration.try_run(self._events)
        if self._store is None or not self._calibration.done:
            self._calibration.begin_iteration()
        elif self._cycle is None and self._loadable_everywhere > NOT_PINNED:
            self._begin_captures(step)
        if self._cycle is None:
            return
        if not self._alone:
            self._cycle.maybe_reorder(step)
        self._cycle.begin(step, self._record, self._loadable_everywhere)
        injection.reached("capture", step)

    def before_optimizer_step(self) -> None:
        """The fence: returns when every copy of the slot has been read from the device."""
        self._calibration.fence()
        if self._cycle is not None:
            self._cycle.fence()

    def end_iteration(self, record: IterationRecord) -> None:
        """Notes the record of the iteration for the next slot, and tells the other ranks what this one can load."""
        self._note(record)
        if self._store is not None and not self._alone:
            known = self._agreement.finish_minimum()
            if known is not None and self.plan is not None:
                loadable = known_everywhere((known[0], known[1]), self.plan.longest_run)
                self._loadable_everywhere = max(self._loadable_everywhere, loadable)
            if self._cycle is None:
                self._events.emit("pinning", slots=self._memory.pinned_slots, of=self._store.geometry.slots)
            self._agreement.start_minimum(self._announcement)
        self._tell(record)

    def _tell(self, record: IterationRecord, interrupted: bool = False) -> None:
        self._told = record.iteration
        self._events.emit("iteration", replayed=self._alone, interrupted=interrupted, **self.status(record))

    def _note(self, record: IterationRecord) -> None:
        """The next slot holds the record; a few more are kept for others who replay."""
        self._record = self._records[record.iteration] = record
        kept = 0 if self.plan is None else self.plan.longest_run + RECORDS_BEYOND_RUN
        for iteration in [i for i in self._records if i < record.iteration - kept]:
            del self._records[iteration]

    def status(self, record: IterationRecord) -> dict[str, Any]:
        """The figures of an iteration for displays: bytes, seconds and steps as their names say."""
        plan, slots = self.plan, NO_SLOTS if self._cycle is None else self._cycle.status(record.iteration)
        return {
            "iteration": record.iteration,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "skipped": record.skipped,
            "learning_rate": record.learning_rates[0] if record.learning_rates else 0.0,
            "seconds": time.perf_counter() - self._iteration_starts[-1] if self._iteration_starts else 0.0,
            **slots,
            "loadable_step": self._loadable_everywhere,
            "memory_limit_bytes": plan.memory.total_bytes if plan is not None else 0,
        }

    @property
    def _announcement(self) -> tuple[int, int]:
        """What this rank tells the others that it can load."""
        if self._cycle is not None:
            return self._cycle.announcement
        return (-1 if self._memory.pinned else NOT_PINNED), 0

    def finish(self, durable: bool) -> bool:
        """Ends cleanly; removes the slots if the last step is durable elsewhere and they are not to be kept.

        Returns whether the slots are kept.
        """
        if self._cycle is not None:
            self._cycle.close()
        self._agreement.finish_minimum()
        self._agreement.barrier()
        self._calibration.reset()
        kept = self._store is not None and (self._config.keep or not durable)
        self._memory.give_back(self._store, kept)
        for digests in (self._digests, self._tools.device_digests):
            if digests is not None:
                digests.close()
        self._engine.close()
        self._events.emit("finished", kept=kept)
        return kept

    # ---------------------------------------------------------------------------------------------------- parts

    def _measure(self, step: int) -> None:
        """Chooses W once enough iterations are timed; the first one includes warm-up and isn't counted."""
        times, link = self._iteration_starts, self._calibration
        if len(times) <= self._config.measure_iterations:
            return
        if link.found is None:
            together(self._agreement, lambda: link.run(self._events, then_beside_training=True))
        assert link.found is not None
        bandwidth = link.bytes_per_second_beside_training
        if bandwidth is None:
            return
        self._first_step = step
        timed = itertools.pairwise(times[1 : self._config.measure_iterations + 1])
        iteration = statistics.median(after - before for before, after in timed)
        rates = (bandwidth, iteration, link.found.copy_seconds, link.found.chunks)
        digests = measure_digests(self._digests, self._state, self._tools.device_digests)
        self._adopt(Measured(*rates, digests, self._tools.device_digests is not None), None)

    def _adopt(self, measured: Measured | None, window: int | None) -> None:
        """Makes the plan and takes its memory, on all ranks or on none; all begin when that of all is pinned."""
        self.plan = make_plan(self._config, self._state, self._agreement, measured, window)
        self._memory.check(self.plan)
        if self._config.dry_run:
            return
        identity = {**self._identity, "--sparse-ckpt-window": self.plan.schedule.window}
        content = {"identity": identity, "operators": self._state.table.to_json()}
        self._store = self._memory.create(self.plan, content, self._threads)
        self._events.emit("plan", **schedule_fields(self.plan.schedule), memory_bytes=self.plan.memory.total_bytes)
        self._loadable_everywhere = min(self._agreement.gather(self._announcement[0]))
        if self._loadable_everywhere > NOT_PINNED:
            self._begin_captures(self._first_step)

    def _begin_captures(self, step: int) -> None:
        """The memory of all ranks is pinned: the first slot is that of `step`."""
        assert self._store is not None and self.plan is not None
        self._first_step = step
        self._events.emit("pinned", step=step, problem=self._memory.problem)
        self._use(self._store, self.plan.schedule, step)

    def _use(self, store: HostStore, schedule: SlotSchedule, step: int) -> SlotCycle:
        assert self.plan is not None
        self._store, self._cycle = store, SlotCycle(self._tools, store, self.plan, schedule, step)
        return self._cycle
