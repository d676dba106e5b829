"""Manifests keep every bit."""

import math

from hypothesis import given
from hypothesis import strategies as st

from megatron.moevement.store import format as fmt
from megatron.moevement.types import IterationRecord, SlotSpec, StartState
from tests.support.slots import manifest
from tests.unit.schedule.test_slots import schedule

FLOATS = st.floats(allow_nan=False, width=64)


def test_round_trip() -> None:
    wanted = manifest(schedule(3, "fixed").spec(4))
    assert fmt.decode_manifest(fmt.encode_manifest(wanted)) == wanted


@given(FLOATS, FLOATS, st.lists(FLOATS), st.binary(max_size=40))
def test_floats_and_blobs_keep_every_bit(loss: float, norm: float, rates: list[float], blob: bytes) -> None:
    record = IterationRecord(3, loss, norm, False, tuple(rates), (), 1.0, 0)
    start = StartState(4, 1, 2, (), {"rng": blob}, ())
    wanted = fmt.Manifest(0, "r", SlotSpec(4, 0, ("a",), (), (1,)), start, record, {"a": (1.0,)}, {"a": "00"})
    found = fmt.decode_manifest(fmt.encode_manifest(wanted))
    assert found == wanted and found.record is not None
    assert [math.copysign(1, r) for r in found.record.learning_rates] == [math.copysign(1, r) for r in rates]


def test_nan_and_infinite_losses_survive() -> None:
    record = IterationRecord(3, math.nan, math.inf, False, (), (), 1.0, 0)
    wanted = fmt.Manifest(0, "r", SlotSpec(4, 0, (), (), (0,)), StartState(4, 1, 2), record, {}, {})
    found = fmt.decode_manifest(fmt.encode_manifest(wanted)).record
    assert found is not None and found.loss is not None and math.isnan(found.loss) and found.grad_norm == math.inf
