"""Pinning: in order, behind the caller, undone at the end; memory that can't be pinned is no error."""

import threading

import pytest

from megatron.moevement.operators.state import MemoryRange
from megatron.moevement.snapshot.pinning import Pinning
from moevement_ext import CopyEngine
from tests.support.engines import PinningEngine

RANGES = [MemoryRange(4096 * i, 4096) for i in range(1, 5)]


def test_ranges_are_pinned_in_order_behind_the_caller() -> None:
    engine = PinningEngine()
    pinning = Pinning(engine, RANGES)
    assert not pinning.done and pinning.pinned == 1
    engine.go.set()
    pinning.wait()
    assert pinning.done and engine.registered == [r.address for r in RANGES] and not pinning.problem
    pinning.close()
    assert engine.registered == [] and pinning.pinned == 0


def test_closing_early_pins_no_more() -> None:
    engine = PinningEngine()
    pinning = Pinning(engine, RANGES)
    closing = threading.Thread(target=pinning.close)
    closing.start()
    engine.go.set()
    closing.join(20)
    assert not closing.is_alive() and engine.registered == [] and pinning.done


@pytest.mark.parametrize("fail_at", [1, 3])
def test_what_cannot_be_pinned_is_reported(fail_at: int) -> None:
    engine = PinningEngine(fail_at)
    engine.go.set()
    pinning = Pinning(engine, RANGES)
    pinning.wait()
    assert pinning.done and pinning.pinned == fail_at - 1 and "pinned" in pinning.problem


def test_on_the_cpu_there_is_nothing_to_wait_for() -> None:
    pinning = Pinning(CopyEngine(), RANGES)
    assert pinning.done and pinning.pinned == 0 and not pinning.problem
    pinning.close()
    assert Pinning(PinningEngine(), []).done
