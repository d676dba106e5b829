"""A slot in every iteration: committed, retained, counted when it fails."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron.moevement import slot_cycle
from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import MoevementError
from megatron.moevement.events import EventLog
from megatron.moevement.planning import make_plan
from megatron.moevement.recovery.plan import slots_to_keep
from megatron.moevement.schedule.reordering import Reordering
from megatron.moevement.slot_cycle import SlotCycle, Tools
from megatron.moevement.slot_memory import SlotMemory
from megatron.moevement.snapshot.capture import Capture
from megatron.moevement.store.format import Manifest
from megatron.moevement.store.host_store import SlotLease
from moevement_ext import CopyEngine, DigestPool
from tests.support.tables import small_table
from tests.support.toy import ToyState, alone

TABLE = small_table(2, 4)


class Lab:
    """A toy state and its cycle of slots, window 3."""

    def __init__(self, directory: Path, **knobs: Any) -> None:
        config = SparseCheckpointConfig(enabled=True, directory=directory, window=3, **knobs)
        self.state, agreement, engine = ToyState(TABLE, 0), alone(), CopyEngine()
        self.events: list[dict[str, Any]] = []
        log = EventLog(None, 0)
        log.listen(self.events.append)
        self.plan = make_plan(config, self.state, agreement, None, 3)
        memory = SlotMemory(config, agreement, engine, directory / "slots", 1)
        self.store = memory.create(self.plan, {"identity": {}, "operators": TABLE.to_json()}, 1)
        tools = Tools(config, self.state, agreement, engine, DigestPool(1), log)
        self.cycle = SlotCycle(tools, self.store, self.plan, self.plan.schedule, 0)

    def take(self, step: int, loadable: int = -1) -> None:
        """The slot of a step."""
        self.cycle.begin(step, None, loadable)
        self.cycle.fence()

    def steps(self) -> set[int]:
        """Committed."""
        self.cycle.interrupt()
        return set(self.store.committed)


def test_slots_are_kept_as_long_as_a_window_needs_them(tmp_path: Path) -> None:
    lab = Lab(tmp_path, reorder=False)
    for step in range(4):
        lab.take(step)
    assert lab.steps() == {0, 1, 2, 3} and lab.cycle.announcement == (3, 0)
    lab.take(4, loadable=3)
    assert lab.steps() == {1, 2, 3, 4}
    status = lab.cycle.status(4)
    assert status["memory_used_bytes"] == 4 * lab.plan.memory.slot_bytes and status["failed_slots"] == 0
    assert status["window"] == 3 and status["window_index"] == 1 and status["oldest_age_steps"] <= 3


def test_a_slot_committed_while_others_are_freed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tmp_path, reorder=False)
    for step in range(4):
        lab.take(step)
    commit, go = lab.store.commit, threading.Event()

    def commit_late(lease: SlotLease, manifest: Manifest, data_bytes: int) -> None:
        assert go.wait(20)
        commit(lease, manifest, data_bytes)

    def decide_slowly(steps: frozenset[int], loadable_everywhere: int, longest_run: int) -> frozenset[int]:
        go.set()
        lab.cycle.interrupt()
        return slots_to_keep(steps, loadable_everywhere, longest_run)

    monkeypatch.setattr(lab.store, "commit", commit_late)
    monkeypatch.setattr(slot_cycle, "slots_to_keep", decide_slowly)
    lab.cycle.begin(4, None, -1)
    go.clear()
    lab.cycle.fence()
    lab.take(5, loadable=3)
    assert lab.steps() == {1, 2, 3, 4, 5}


def test_without_news_the_ring_gives_up_its_oldest_slot(tmp_path: Path) -> None:
    lab = Lab(tmp_path, reorder=False)
    for step in range(lab.plan.memory.slots + 2):
        lab.take(step)
    assert len(lab.steps()) == lab.plan.memory.slots
    assert [e["step"] for e in lab.events if e["kind"] == "window_given_up"] == [0, 1]


def test_an_interrupted_slot_is_none_and_a_failed_one_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(tmp_path)
    lab.take(0)
    lab.cycle.begin(1, None, -1)
    assert lab.steps() == {0}
    with monkeypatch.context() as patch:
        patch.setattr(Capture, "begin", _refuse)
        lab.take(1)
    lab.take(1)
    assert lab.steps() == {0, 1} and lab.cycle.failed_slots == 1
    lab.cycle.close()


def test_copies_that_fail_late_in_a_run_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tmp_path)
    late = 10 * lab.plan.longest_run
    for step in range(late):
        lab.take(step, loadable=step - 1)
    with monkeypatch.context() as patch:
        patch.setattr(Capture, "fence", _refuse)
        for step in range(late, late + 3):
            lab.cycle.begin(step, None, late - 1)
            lab.cycle.fence()
            # The real fence would have dropped it.
            lab.cycle.interrupt()
    lab.take(late + 3, loadable=late - 1)
    assert [e["step"] for e in lab.events if e["kind"] == "slot_failed"] == [late, late + 1, late + 2]
    # Operators are as old as the last failure, which lost what was captured.
    assert lab.cycle.status(late + 3)["oldest_age_steps"] == 2
    lab.cycle.close()


def test_an_operator_that_is_never_captured_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, name = Lab(tmp_path), min(TABLE.names)
    spec = type(lab.cycle.schedule).spec

    def without(schedule: Any, step: int) -> Any:
        whole = spec(schedule, step)
        return dataclasses.replace(whole, full=tuple(n for n in whole.full if n != name))

    monkeypatch.setattr(type(lab.cycle.schedule), "spec", without)
    for step in range(12):
        lab.take(step, loadable=step - 1)
    failed = [e for e in lab.events if e["kind"] == "slot_failed"]
    bound = max(lab.plan.longest_run, 3)
    assert [e["step"] for e in failed] == [bound + 1, 2 * bound + 2][: len(failed)] and failed
    assert f"{name} was last captured {bound + 1} steps ago" in failed[0]["reason"]
    assert bound + 1 not in lab.steps()


def _refuse(*_: Any) -> int:
    raise MoevementError("no free slot")


def test_it_goes_on_behind_a_recovery(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.cycle.continue_from({step: lab.plan.schedule.spec(step) for step in (4, 5, 6)}, 6)
    lab.take(6)
    assert lab.cycle.status(6)["oldest_age_steps"] == 3


def test_behind_a_recovery_the_common_question_is_asked_like_on_those_who_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    lab = Lab(tmp_path)
    monkeypatch.setattr(
        Reordering, "next_schedule", lambda _self, schedule, step, *_rest: asked.append(step) or schedule
    )
    lab.cycle.maybe_reorder(0)
    assert not asked, "nothing is known before the first window"
    lab.cycle.continue_from({step: lab.plan.schedule.spec(step) for step in (4, 5, 6)}, 6)
    lab.cycle.maybe_reorder(6)
    assert asked == [6]
