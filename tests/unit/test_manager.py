"""The manager around a toy model: exact after a crash, at every step, and never in the way of training."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.moevement.config import GIB, SparseCheckpointConfig
from megatron.moevement.errors import MoevementError, RecoveryError, StoreError
from megatron.moevement.events import EventLog
from megatron.moevement.manager import SparseCheckpointManager
from megatron.moevement.planning import Surroundings
from megatron.moevement.recovery.plan import newest_run
from megatron.moevement.recovery.start import store_path
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.snapshot.calibration import PROBED_ITERATIONS
from megatron.moevement.snapshot.capture import Capture
from megatron.moevement.store import committer
from megatron.moevement.store.format import DigestedRegion, region_digests
from megatron.moevement.types import SlotSpec
from moevement_ext import CopyEngine, DeviceDigests, DigestPool
from tests.support.engines import PinningEngine
from tests.support.tables import small_table
from tests.support.toy import ThreadAgreement, ToyState, alone, on_ranks

TABLE = small_table()
LAST = 14


class Worker:
    """A rank: its state, its manager and what the manager reported."""

    def __init__(
        self,
        directory: Path,
        agreement: Agreement | None = None,
        seed: int = 0,
        engine: CopyEngine | None = None,
        device_digests: DeviceDigests | None = None,
        **knobs: Any,
    ) -> None:
        self.config = SparseCheckpointConfig(enabled=True, directory=directory, **{"window": 2, **knobs})
        self.state, self.agreement = ToyState(TABLE, seed), agreement or alone()
        self.events: list[dict[str, Any]] = []
        log = EventLog(None, self.agreement.rank)
        log.listen(self.events.append)
        surroundings = Surroundings({"--seed": 1}, self.agreement.size, deterministic=True)
        self.engine: CopyEngine = engine or CopyEngine()
        parts = (self.config, self.state, self.agreement, self.engine, log, surroundings)
        self.manager = SparseCheckpointManager(*parts, device_digests)

    def train(self, until: int) -> "Worker":
        """Iterations up to Step `until`."""
        while self.state.step < until:
            self.manager.begin_iteration(self.state.step)
            self.manager.before_optimizer_step()
            self.manager.end_iteration(self.state.train(rate=0.001 * self.state.step))
        return self

    def crash(self) -> None:
        """Leaves everything as it is, once the slots under way are committed or rejected."""
        submitted = {e["iteration"] for e in self.events if e["kind"] == "iteration" and e["window"]}
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not submitted <= self.steps("slot") | self.steps("slot_failed"):
            time.sleep(0.005)

    def steps(self, kind: str) -> set[int]:
        """Steps of the events of a kind."""
        return {event["step"] for event in self.events if event["kind"] == kind}


def undisturbed(last: int) -> dict[str, object]:
    """All of the state of Step `last`."""
    state = ToyState(TABLE)
    while state.step < last:
        state.train(rate=0.001 * state.step)
    return state.everything()


@pytest.mark.parametrize("mode", ["fixed", "rolling"])
@pytest.mark.parametrize(("window", "crash_at"), [(1, 4), (2, 5), (3, 7), (3, 9), (5, 12)])
def test_a_crashed_run_ends_bit_identical(tmp_path: Path, mode: str, window: int, crash_at: int) -> None:
    first = Worker(tmp_path, window=window, window_mode=mode)
    assert first.manager.start(None).source == "scratch"
    first.train(crash_at).crash()
    second = Worker(tmp_path, seed=99, window=window, window_mode=mode)
    start = second.manager.start(None)
    assert start.source == "slots" and start.step == crash_at - 1 and start.conversion is not None
    assert second.state.everything() == undisturbed(crash_at - 1)
    assert second.train(LAST).state.everything() == undisturbed(LAST)


@pytest.mark.parametrize("window", [None, 3])
def test_digests_of_the_device_are_verified_by_the_threads(tmp_path: Path, window: int | None) -> None:
    digests = DeviceDigests(ranges_limit=1000, bytes_limit=64 << 20)
    first = Worker(tmp_path, device_digests=digests, window=window, max_window=3, measure_iterations=3)
    first.manager.start(None)
    first.train(12).crash()
    assert first.manager.plan is not None and not first.steps("slot_failed")
    assert {event["digested_by"] for event in first.events if event["kind"] == "slot"} == {"device"}
    measured = first.manager.plan.measured
    assert (measured is None) == (window is not None) and (measured is None or measured.digests_on_device)
    # The next one has no such device: the slots are the same.
    second = Worker(tmp_path, seed=99, window=window, max_window=3, measure_iterations=3)
    assert second.manager.start(None).step == 11
    assert second.train(LAST).state.everything() == undisturbed(LAST)
    second.crash()
    assert {event["digested_by"] for event in second.events if event["kind"] == "slot"} == {"threads"}
    first.manager.finish(durable=False)
    assert digests.closed


def test_a_second_crash_right_after_the_first(tmp_path: Path) -> None:
    first = Worker(tmp_path, window=3)
    first.manager.start(None)
    first.train(7).crash()
    for seed in (5, 6, 7):
        again = Worker(tmp_path, seed=seed, window=3)
        assert again.manager.start(None).step == 6
        assert again.state.everything() == undisturbed(6)
    again.train(8).crash()
    final = Worker(tmp_path, seed=8, window=3)
    assert final.manager.start(None).step == 7
    assert final.train(LAST).state.everything() == undisturbed(LAST)


def test_one_wrong_bit_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Worker(tmp_path, window=3)
    first.manager.start(None)
    first.train(7).crash()
    second = Worker(tmp_path, window=3)
    load = second.state.load

    def flip(operators: Any) -> None:
        load(operators)
        second.state.fill(1)

    monkeypatch.setattr(second.state, "load", flip)
    with pytest.raises(RecoveryError, match="not exact"):
        second.manager.start(None)


def test_ranks_recover_together(tmp_path: Path) -> None:
    def first(agreement: Agreement) -> None:
        worker = Worker(tmp_path, agreement)
        worker.manager.start(None)
        worker.train(6).crash()

    def second(agreement: Agreement) -> tuple[int | None, bool]:
        worker = Worker(tmp_path, agreement, seed=9)
        step = worker.manager.start(None).step
        return step, worker.train(LAST).state.everything() == undisturbed(LAST)

    assert on_ranks(3, first) == [None] * 3
    assert on_ranks(3, second) == [(5, True)] * 3


def test_a_failed_capture_is_counted_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Capture.begin

    def sometimes(self: Capture, spec: SlotSpec, record: Any) -> int:
        if spec.step == 6:
            raise MoevementError("no free slot")
        return begin(self, spec, record)

    monkeypatch.setattr(Capture, "begin", sometimes)
    worker = Worker(tmp_path)
    worker.manager.start(None)
    worker.train(LAST).crash()
    assert worker.steps("slot_failed") == {6} and [
        e["failed_slots"] for e in worker.events if e["kind"] == "slot_failed"
    ] == [1]
    assert worker.state.everything() == undisturbed(LAST)
    assert Worker(tmp_path, seed=9).manager.start(None).step == LAST - 1


def test_auto_measures_and_then_takes_slots(tmp_path: Path) -> None:
    worker = Worker(tmp_path, window=None, measure_iterations=3, max_window=3)
    worker.manager.start(None)
    worker.train(3)
    assert worker.manager.plan is None
    worker.train(LAST).crash()
    assert worker.manager.plan is not None and worker.manager.plan.measured is not None
    assert min(worker.steps("slot")) == 3 + PROBED_ITERATIONS
    again = Worker(tmp_path, seed=9, window=None)
    assert again.manager.start(None).source == "slots"
    assert again.manager.plan is not None
    assert again.manager.plan.schedule.window == worker.manager.plan.schedule.window


def test_whoever_begins_again_measures_again_like_a_new_process(tmp_path: Path) -> None:
    worker = Worker(tmp_path, window=None, measure_iterations=3, max_window=3)
    worker.manager.start(None)
    worker.train(4)
    assert worker.manager.plan is None
    # A failure elsewhere: all ranks begin again from a dense checkpoint.
    worker.manager.start(4)
    worker.train(4 + 3 + PROBED_ITERATIONS)
    assert worker.manager.plan is None, "a new process would not be ready either, and choosing is collective"
    worker.train(4 + 3 + PROBED_ITERATIONS + 1)
    assert worker.manager.plan is not None
    worker.manager.finish(durable=True)


def test_a_run_that_ends_while_it_measures_leaves_nothing(tmp_path: Path) -> None:
    worker = Worker(tmp_path, window=None, measure_iterations=3)
    worker.manager.start(None)
    worker.train(4)
    assert list(tmp_path.rglob(".bandwidth*"))
    worker.manager.finish(durable=True)
    assert not list(tmp_path.rglob(".bandwidth*"))


def test_a_newer_dense_checkpoint_is_asked_for(tmp_path: Path) -> None:
    first = Worker(tmp_path)
    first.manager.start(None)
    first.train(6).crash()
    second = Worker(tmp_path, seed=9)
    start = second.manager.start(8)
    assert (start.source, start.step, start.conversion) == ("dense", 8, None)
    assert Worker(tmp_path).manager.start(None).source == "scratch", "the slots were replaced by the new run's"


def test_fresh_discards_in_the_first_start_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    first = Worker(tmp_path)
    first.manager.start(None)
    first.train(6).crash()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Worker(tmp_path, fresh=True).manager.start(None).source == "slots"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert Worker(tmp_path, fresh=True).manager.start(None).source == "scratch"


@pytest.mark.parametrize(("durable", "keep", "kept"), [(True, False, False), (False, False, True), (True, True, True)])
def test_slots_go_once_the_last_step_is_durable(tmp_path: Path, durable: bool, keep: bool, kept: bool) -> None:
    worker = Worker(tmp_path, keep=keep)
    worker.manager.start(None)
    worker.train(5)
    assert worker.manager.finish(durable) == kept
    assert store_path(worker.config.job_directory, 0).exists() == kept


def test_slots_of_another_window_are_refused(tmp_path: Path) -> None:
    first = Worker(tmp_path, window=2)
    first.manager.start(None)
    first.train(5).crash()
    with pytest.raises(StoreError, match="--sparse-ckpt-window: 2 then, 3 now"):
        Worker(tmp_path, window=3).manager.start(None)
    with pytest.raises(StoreError, match="--sparse-ckpt-window-mode: rolling then, fixed now"):
        Worker(tmp_path, window=2, window_mode="fixed").manager.start(None)


def test_too_little_memory_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    worker = Worker(tmp_path, host_memory_gib=1e-6)
    with pytest.raises(StoreError, match="--sparse-ckpt-host-memory-gib"):
        worker.manager.start(None)
    assert not store_path(worker.config.job_directory, 0).exists()


def test_slots_above_the_limit_of_memory_are_refused_and_stay(tmp_path: Path) -> None:
    first = Worker(tmp_path)
    first.manager.start(None)
    first.train(5).crash()
    assert first.manager.plan is not None
    taken = first.manager.plan.memory.total_bytes / GIB
    with pytest.raises(StoreError, match=r"--sparse-ckpt-host-memory-gib .*: the slots in .* take .* GiB; raise"):
        Worker(tmp_path, host_memory_gib=taken * 0.999).manager.start(None)
    assert Worker(tmp_path, host_memory_gib=taken).manager.start(None).step == 4


def test_ages_and_memory_stay_in_their_bounds(tmp_path: Path) -> None:
    worker = Worker(tmp_path, window=3)
    worker.manager.start(None)
    worker.train(LAST).crash()
    figures = [event for event in worker.events if event["kind"] == "iteration"]
    assert all(f["oldest_age_steps"] <= f["oldest_age_bound_steps"] for f in figures)
    assert all(f["memory_used_bytes"] <= f["memory_limit_bytes"] for f in figures)
    assert all(f["slot_bytes"] > 0 for f in figures) and not worker.steps("window_given_up")
    known = [f["loadable_step"] for f in figures]
    assert known == sorted(known) and 0 <= known[-1] < LAST


def test_slots_are_taken_once_the_memory_of_all_ranks_is_pinned(tmp_path: Path) -> None:
    engine = PinningEngine()
    worker = Worker(tmp_path, engine=engine)
    worker.manager.start(None)
    worker.train(3)
    assert not worker.manager.capturing and not worker.steps("slot") and not worker.steps("slot_failed")
    engine.go.set()
    deadline = time.monotonic() + 20
    while not worker.manager.capturing and time.monotonic() < deadline:
        worker.train(worker.state.step + 1)
    first = min(worker.steps("pinned"))
    worker.train(first + 6).crash()
    assert min(worker.steps("slot")) == first and not worker.steps("slot_failed")
    again = Worker(tmp_path, seed=9)
    again.manager.start(None)
    again.train(first + 8)
    assert again.state.everything() == undisturbed(first + 8)


def test_no_rank_takes_slots_before_the_memory_of_all_is_pinned(tmp_path: Path) -> None:
    def one(agreement: ThreadAgreement) -> set[int]:
        slow = PinningEngine() if agreement.rank else None
        worker = Worker(tmp_path, agreement, engine=slow)
        worker.manager.start(None)
        worker.train(3)
        assert not worker.manager.capturing
        if slow is not None:
            slow.go.set()
        for _ in range(5000):
            if worker.manager.capturing:
                break
            worker.train(worker.state.step + 1)
        worker.train(worker.state.step + 5).crash()
        assert not worker.steps("slot_failed")
        return worker.steps("pinned")

    first, second = on_ranks(2, one)
    assert isinstance(first, set) and first == second and min(first) >= 3


def test_a_window_is_there_when_all_its_slots_are(tmp_path: Path) -> None:
    for until, whole in ((2, False), (3, True)):
        worker = Worker(tmp_path / str(until), window=3, reorder=False)
        worker.manager.start(None)
        worker.train(until)
        worker.manager.finish(durable=False)
        assert worker.manager.has_window is whole


def test_slow_digests_make_training_wait_and_cost_no_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(pool: DigestPool, base: int, regions: Sequence[DigestedRegion]) -> dict[str, str]:
        time.sleep(0.02)
        return region_digests(pool, base, regions)

    monkeypatch.setattr(committer, "region_digests", slow)
    worker = Worker(tmp_path, window=3)
    worker.manager.start(None)
    worker.train(LAST).crash()
    assert not worker.steps("window_given_up") and not worker.steps("slot_failed")


def test_a_change_of_popularity_changes_the_order_and_stays_exact(tmp_path: Path) -> None:
    worker = Worker(tmp_path, window=2, reorder_change=0.0, reorder_share=0.1)
    worker.manager.start(None)
    for step in range(0, 40, 2):
        worker.state.tokens = {name: (number * 7 + step) % 11 for number, name in enumerate(sorted(TABLE.names))}
        worker.train(step + 2)
        if worker.steps("reorder"):
            break
    assert worker.steps("reorder")
    worker.train(worker.state.step + 3).crash()
    again = Worker(tmp_path, seed=9, window=2, reorder_change=0.0, reorder_share=0.1)
    start = again.manager.start(None)
    assert start.step == worker.state.step - 1 and again.state.everything() == undisturbed(worker.state.step - 1)


def test_what_a_segment_replays_is_marked_and_an_untold_iteration_is_told_once(tmp_path: Path) -> None:
    worker = Worker(tmp_path, window=2)
    worker.manager.start(None)
    worker.train(6).crash()
    records = {n: record for n in range(6) if (record := worker.manager.record(n)) is not None}
    run = newest_run(worker.manager.interrupt(verify=True).slots, TABLE.names)
    assert run is not None and run.last == 5
    worker.events.clear()
    worker.manager.recover(run, 6, records, worker.agreement)
    worker.manager.resume(run.last, records[5])
    told = [(e["iteration"], e["replayed"], e["interrupted"]) for e in worker.events if e["kind"] == "iteration"]
    assert told == [(5, True, False)]
    assert [e["source"] for e in worker.events if e["kind"] == "recovery_started"] == ["own host memory"]
    # The update of iteration 6 is done, and a failure comes before its end is noted.
    worker.manager.begin_iteration(6)
    record = worker.state.train(rate=0.006)
    for _ in range(2):
        worker.manager.interrupt(verify=False)
        worker.manager.resume(run.last, record)
    told = [(e["iteration"], e["replayed"], e["interrupted"]) for e in worker.events if e["kind"] == "iteration"]
    assert told == [(5, True, False), (6, False, True)]
    assert worker.train(LAST).state.everything() == undisturbed(LAST)
