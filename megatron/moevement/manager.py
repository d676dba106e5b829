"""One iteration and one recovery, read top to bottom: the face of sparse checkpointing for a training loop."""

import itertools
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.moevement import injection
from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import MoevementError
from megatron.moevement.events import EventLog
from megatron.moevement.operators.state import TrainingState
from megatron.moevement.planning import Measured, SparsePlan, make_plan
from megatron.moevement.recovery.conversion import Conversion, Progress, StartPoint, convert, require_same_loss
from megatron.moevement.recovery.plan import newest_run, slots_to_keep
from megatron.moevement.recovery.sources import SlotReader
from megatron.moevement.recovery.start import (
    Choice,
    Found,
    SlotOffer,
    choose_source,
    find_store,
    open_quietly,
    restart_count,
    store_path,
)
from megatron.moevement.schedule.age import SnapshotAge
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.schedule.reordering import Reordering
from megatron.moevement.schedule.slots import SlotSchedule, schedule_of
from megatron.moevement.slot_memory import SlotMemory, together
from megatron.moevement.snapshot.bandwidth import measure_bandwidth
from megatron.moevement.snapshot.capture import Capture
from megatron.moevement.store.committer import Committed, Committer
from megatron.moevement.store.host_store import HostStore, discard
from megatron.moevement.types import IterationRecord, Presence, Run
from moevement_ext import CopyEngine, DigestPool


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the manager is told of the job: how it was built and where it runs.

    `identity` holds, by flag, every value that slots must have been written with. `ranks_on_node` share the slots'
    directory. `deterministic` makes a difference between a replay and what was recorded an error.
    """

    identity: Mapping[str, Any]
    ranks_on_node: int
    deterministic: bool


@dataclass(frozen=True, slots=True)
class Retention:
    """The run that slots are of, the newest step that every rank can load, and slots of the longest run."""

    run_id: str
    loadable_everywhere: int
    longest_run: int


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
        self._digests = DigestPool(self._threads) if config.digest else None
        self._memory = SlotMemory(config, agreement, engine, self._path, surroundings.ranks_on_node)
        self._store: HostStore | None = None
        self._capture: Capture | None = None
        self._committer: Committer | None = None
        self._schedule: SlotSchedule | None = None
        self._age: SnapshotAge | None = None
        self._record: IterationRecord | None = None
        self._records: dict[int, IterationRecord] = {}
        self._found, self._alone = Found(None, "no slots"), False
        self._loadable = self._loadable_everywhere = -1
        self._started = False
        self._iteration_starts: list[float] = []
        self._order = Reordering(config, state.table)
        self._first_step = 0
        self._slot_bytes, self._stall_seconds, self._fence_started_time = 0, 0.0, 0.0
        self.plan: SparsePlan | None = None
        self.failed_slots = 0

    @property
    def retention(self) -> Retention | None:
        """What decides how long slots and transcripts are kept; None while no slots are taken."""
        if self._store is None or self._capture is None or self.plan is None:
            return None
        return Retention(self._store.content["run_id"], self._loadable_everywhere, self.plan.longest_run)

    def record(self, iteration: int) -> IterationRecord | None:
        """The record of a recent iteration."""
        return self._records.get(iteration)

    @property
    def capturing(self) -> bool:
        """Whether iterations take slots: the window is chosen and its memory is pinned on all ranks."""
        return self._capture is not None

    # ------------------------------------------------------------------------------------------------ recovery

    def start(self, dense_step: int | None) -> StartPoint:
        """Recovers from the slots of an earlier worker if there are any that all ranks can load.

        Args:
            dense_step: step of the newest dense checkpoint, None without one. The caller loads it if the result's
                source is `dense`.

        Raises:
            StoreError: the slots are of another model, layout or format, or there is no room for new ones.
            RecoveryError: the replay wasn't exact.
        """
        if self._config.fresh and restart_count() == 0 and not self._started:
            together(self._agreement, lambda: discard(self._path))
        self._started = True
        injection.reached("start")
        self._set_down()
        path = None if self._config.dry_run else self._path
        wanted = {**self._identity}
        if self._config.window is not None:
            wanted["--sparse-ckpt-window"] = self._config.window
        found = find_store(path, wanted, self._agreement)
        choice = choose_source(found, self._state, self._agreement, self._digests, dense_step)
        self._events.emit("start", run=_run_list(choice), dense_step=choice.dense_step, reasons=choice.reasons)
        if choice.run is None:
            if found.store is not None:
                found.store.close()
            self._first_step = choice.dense_step or 0
            if self._config.window is not None:
                self._adopt(None, self._config.window)
            source = "scratch" if choice.dense_step is None else "dense"
            return StartPoint(source, choice.dense_step, None, choice.reasons)
        assert found.store is not None
        conversion = self._convert(found.store, choice.run, self._agreement)
        self._loadable_everywhere = choice.run.last
        return StartPoint("slots", choice.run.last, conversion, choice.reasons)

    def _convert(self, store: HostStore, run: Run, agreement: Agreement) -> Conversion:
        """Makes the state of Step `run.last` from slots, and goes on with their schedule. Collective over the group."""
        reader = SlotReader(store, self._state.table, self._agreement.rank, self._digests)
        self._events.emit("recovery_started", first=run.first, last=run.last, replays=run.replays)
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
        store.keep_only(frozenset(step for step in store.committed if step <= run.last))
        self._use(store, schedule, run.last)
        for step, spec in specs.items():
            if self._age is not None and step < run.last:
                self._age.note(step, spec.full)
        self._record = reader.manifest(run.last).record
        self._order.restart(run.last)
        self._loadable = run.last
        self._events.emit(
            "recovery_finished",
            step=run.last,
            replays=conversion.replays,
            compared=conversion.compared,
            different=conversion.different,
            seconds=conversion.seconds,
            **_schedule_fields(schedule),
        )
        return conversion

    def _set_down(self) -> None:
        """Lets go of slots and schedule; the slots stay where they are."""
        if self._capture is not None:
            self._capture.cancel()
        if self._committer is not None:
            self._committer.close()
        if self._store is not None:
            self._memory.give_back(self._store, keep=True)
        self._store = self._capture = self._committer = self._schedule = self._age = self._record = None
        self._loadable = self._loadable_everywhere = -1

    def interrupt(self, verify: bool) -> SlotOffer:
        """After a failure elsewhere: drops what is under way, and says what slots this rank could load.

        Args:
            verify: whether the slots' digests are checked; needed only where they may be loaded.
        """
        self._agreement.forget()
        if self._capture is not None:
            self._capture.cancel()
        if self._committer is not None:
            self._committer.drain()
        if self._store is None:
            self._found = open_quietly(self._path)
        store = self._store or self._found.store
        records = dict(self._records)
        if store is None:
            return SlotOffer("", {}, self._state.table.names, records, (self._found.problem,))
        reader = SlotReader(store, self._state.table, self._agreement.rank, self._digests)
        usable, rejected = reader.verified() if verify else (store.committed, {})
        problems = tuple(f"slot of step {step}: {why}" for step, why in rejected.items())
        return SlotOffer(store.content["run_id"], usable, self._state.table.names, records, problems)

    def recover(self, run: Run | None, target: int, records: Mapping[int, IterationRecord], group: Agreement) -> None:
        """Brings this rank, with its segment, to Step `target` while all others keep their state.

        Converts `run`, then replays up to the target and takes the slots of these iterations again. Collective over
        the segment's ranks, which are `group`.
        """
        store = self._store or self._found.store
        assert run is not None and store is not None
        if self._committer is not None:
            self._committer.close()
        self._records.update(records)
        self._convert(store, run, group)
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

    def resume(self, loadable_everywhere: int, record: IterationRecord | None) -> None:
        """All ranks stand at one Step again: goes on as if nothing had happened.

        Args:
            loadable_everywhere: what every rank can load, the same number on all of them.
            record: of the iteration before, where its end was not reported.
        """
        if record is not None:
            self._note(record)
        self._loadable_everywhere = loadable_everywhere
        self._iteration_starts.clear()

    def _report_conversion(self, progress: Progress) -> None:
        self._events.emit(
            "conversion",
            step=progress.step,
            loaded_full=progress.loaded_full,
            frozen=progress.frozen,
            replayed=progress.replayed,
            seconds=progress.seconds,
        )

    # ----------------------------------------------------------------------------------------------- iteration

    def begin_iteration(self, step: int) -> None:
        """Starts copying the slot of `step`. A capture that fails is counted and reported, training goes on."""
        self._iteration_starts.append(time.perf_counter())
        if self._store is None:
            self._measure(step)
        elif self._capture is None and self._loadable_everywhere > NOT_PINNED:
            self._begin_captures(step)
        if self._schedule is None or self._capture is None:
            return
        if not self._alone:
            self._maybe_reorder(step)
        self._retain()
        spec = self._schedule.spec(step)
        try:
            self._slot_bytes = self._capture.begin(spec, self._record)
        except MoevementError as error:
            self._slot_failed(step, str(error))
            return
        injection.reached("capture", step)
        assert self._age is not None
        self._age.capture(step, spec.full)

    def before_optimizer_step(self) -> None:
        """The fence: returns when every copy of the slot has been read from the device."""
        if self._capture is None or self._committer is None:
            return
        started, self._fence_started_time = time.perf_counter(), time.time()
        try:
            copied, _ = self._capture.fence()
        except MoevementError as error:
            self._slot_failed(-1, str(error))
            return
        if copied is not None:
            self._committer.submit(copied)
        self._stall_seconds = time.perf_counter() - started

    def end_iteration(self, record: IterationRecord) -> None:
        """Notes the record of the iteration for the next slot, and tells the other ranks what this one can load."""
        self._note(record)
        if self._store is not None and not self._alone:
            known = self._agreement.finish_minimum()
            if known is not None:
                self._loadable_everywhere = max(self._loadable_everywhere, known)
            if self._capture is None:
                self._loadable = -1 if self._memory.pinned else NOT_PINNED
                self._events.emit("pinning", slots=self._memory.pinned_slots, of=self._store.geometry.slots)
            self._agreement.start_minimum(self._loadable)
        self._events.emit("iteration", **self.status(record))

    def _note(self, record: IterationRecord) -> None:
        """The next slot holds the record; a few more are kept for others who replay."""
        self._record = self._records[record.iteration] = record
        kept = 0 if self.plan is None else self.plan.longest_run + RECORDS_BEYOND_RUN
        for iteration in [i for i in self._records if i < record.iteration - kept]:
            del self._records[iteration]

    def status(self, record: IterationRecord) -> dict[str, Any]:
        """The figures of an iteration for displays: bytes, seconds and steps as their names say."""
        step = record.iteration + 1
        oldest, age = self._age.oldest(step) if self._age is not None else ("", 0)
        committed = len(self._store.committed) if self._store is not None else 0
        window = self._schedule.window if self._schedule is not None else 0
        return {
            "iteration": record.iteration,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "skipped": record.skipped,
            "learning_rate": record.learning_rates[0] if record.learning_rates else 0.0,
            "seconds": time.perf_counter() - self._iteration_starts[-1] if self._iteration_starts else 0.0,
            "slot_bytes": self._slot_bytes,
            "stall_seconds": self._stall_seconds,
            "fence_started_time": self._fence_started_time,
            "oldest_age_steps": age,
            "oldest_age_bound_steps": self._age.bound if self._age is not None else 0,
            "oldest_operator": oldest,
            "window": window,
            "window_index": self._schedule.index(record.iteration) if self._schedule is not None else 0,
            "loadable_step": self._loadable_everywhere,
            "memory_used_bytes": committed * self.plan.memory.slot_bytes if self.plan is not None else 0,
            "memory_limit_bytes": self.plan.memory.total_bytes if self.plan is not None else 0,
            "failed_slots": self.failed_slots,
        }

    def finish(self, durable: bool) -> bool:
        """Ends cleanly; removes the slots if the last step is durable elsewhere and they are not to be kept.

        Returns whether the slots are kept.
        """
        if self._capture is not None:
            self._capture.cancel()
        self._agreement.finish_minimum()
        if self._committer is not None:
            self._committer.close()
        self._agreement.barrier()
        kept = self._store is not None and (self._config.keep or not durable)
        if self._store is not None:
            self._memory.give_back(self._store, kept)
        if self._digests is not None:
            self._digests.close()
        self._engine.close()
        self._events.emit("finished", kept=kept)
        return kept

    # ---------------------------------------------------------------------------------------------------- parts

    def _measure(self, step: int) -> None:
        """Chooses W once enough iterations are timed; the first one includes warm-up and isn't counted."""
        times = self._iteration_starts
        if len(times) <= self._config.measure_iterations:
            return
        iteration = statistics.median(after - before for before, after in itertools.pairwise(times[1:]))
        pieces = [p for o in self._state.table for p in self._state.pieces(o.name, Presence.FULL)]
        bandwidth = measure_bandwidth(
            self._engine, pieces, self._config.job_directory, self._agreement.rank, self._state.stream()
        )
        self._first_step = step
        self._adopt(Measured(bandwidth, iteration), None)

    def _adopt(self, measured: Measured | None, window: int | None) -> None:
        """Makes the plan and takes its memory, on all ranks or on none."""
        self.plan = make_plan(self._config, self._state, self._agreement, measured, window)
        self._memory.check(self.plan)
        if self._config.dry_run:
            return
        identity = {**self._identity, "--sparse-ckpt-window": self.plan.schedule.window}
        content = {"identity": identity, "operators": self._state.table.to_json()}
        self._store = self._memory.create(self.plan, content, self._threads)
        self._events.emit("plan", **_schedule_fields(self.plan.schedule), memory_bytes=self.plan.memory.total_bytes)
        self._loadable = self._loadable_everywhere = -1 if self._memory.pinned else NOT_PINNED
        if min(self._agreement.gather(self._loadable)) > NOT_PINNED:
            self._begin_captures(self._first_step)

    def _begin_captures(self, step: int) -> None:
        """The memory of all ranks is pinned: the first slot is that of `step`."""
        assert self._store is not None and self.plan is not None
        self._first_step = step
        self._events.emit("pinned", step=step, problem=self._memory.problem)
        self._use(self._store, self.plan.schedule, step)

    def _use(self, store: HostStore, schedule: SlotSchedule, step: int) -> None:
        assert self.plan is not None
        self._store, self._schedule = store, schedule
        self._capture = Capture(self._state, store, self._engine, self._agreement.rank, store.content["run_id"])
        self._committer = Committer(store, self._digests, self._on_committed)
        self._age = SnapshotAge(self._state.table.names, max(self.plan.longest_run, schedule.window), step)

    def _on_committed(self, slot: Committed) -> None:
        """Runs on the committer's thread."""
        if slot.error:
            self._slot_failed(slot.slot.lease.step, slot.error)
            return
        assert self._store is not None
        run = newest_run(self._store.committed, self._state.table.names)
        self._loadable = run.last if run is not None else -1
        self._events.emit(
            "slot",
            step=slot.slot.lease.step,
            data_bytes=slot.slot.data_bytes,
            digest_seconds=slot.digest_seconds,
            copy_started_time=slot.slot.copy_started_time,
            copy_seconds=slot.slot.copy_seconds,
        )

    def _slot_failed(self, step: int, why: str) -> None:
        """A failed save never ends training: counted, reported, and the next iteration tries again."""
        self.failed_slots += 1
        if self._age is not None and self._iteration_starts:
            self._age.restart(max(step, 0))
        self._events.emit("slot_failed", step=step, reason=why, failed_slots=self.failed_slots)

    def _retain(self) -> None:
        """Frees slots that no window needs; if that is not enough, waits for the digests, then gives up the oldest."""
        assert self._store is not None and self.plan is not None and self._committer is not None
        store = self._store
        store.keep_only(slots_to_keep(frozenset(store.committed), self._loadable_everywhere, self.plan.longest_run))
        if store.free_slots:
            return
        self._committer.drain()
        store.keep_only(slots_to_keep(frozenset(store.committed), self._loadable_everywhere, self.plan.longest_run))
        if not store.free_slots:
            oldest = min(store.committed)
            store.keep_only(frozenset(step for step in store.committed if step > oldest))
            self._events.emit("window_given_up", step=oldest, reason="no free slot")

    def _maybe_reorder(self, step: int) -> None:
        """At the start of a window: orders experts by popularity again if it has changed enough (paper 3.2)."""
        schedule = self._schedule
        assert schedule is not None and self.plan is not None
        if not self._config.reorder or schedule.index(step) or step == self._first_step:
            return
        counts, most = self._state.popularity(), max(self.plan.slot_bytes) + self.plan.spare_bytes

        def report(chosen: SlotSchedule, refused: bool) -> None:
            self._events.emit("reorder", step=step, refused=refused, **_schedule_fields(chosen))

        self._schedule = self._order.next_schedule(schedule, step, counts, most, self._agreement, report)


def _schedule_fields(schedule: SlotSchedule | None) -> dict[str, Any]:
    """What events say of a schedule."""
    if schedule is None:
        return {}
    return {"window": schedule.window, "window_mode": schedule.mode, "groups": schedule.groups}


def _run_list(choice: Choice) -> list[int] | None:
    return [choice.run.first, choice.run.last] if choice.run is not None else None
