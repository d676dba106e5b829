"""The plan: one window for the world, memory that every slot fits into, and lines that say so."""

import pytest

from megatron.moevement.config import GIB, SparseCheckpointConfig
from megatron.moevement.errors import ConfigError
from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.planning import (
    DIGEST_RATE_UNDER_LOAD,
    Measured,
    SparsePlan,
    describe,
    make_plan,
)
from megatron.moevement.schedule.ordering import capture_order
from megatron.moevement.schedule.slots import ring_slots
from megatron.moevement.schedule.window import divide
from megatron.moevement.snapshot.bandwidth import Chunks
from megatron.moevement.snapshot.layout import slot_layout
from tests.support.slots import BUFFER
from tests.support.tables import small_table
from tests.support.toy import ThreadAgreement, ToyState, alone, on_ranks

CHUNKS, UNLIMITED = Chunks(8 << 20, 2), float("inf")
SHARE = SparseCheckpointConfig().copy_share
TABLE = small_table(expert_elements=10_000)
DENSE = sum(o.full_bytes for o in TABLE)


def config(**changes: object) -> SparseCheckpointConfig:
    """The configuration of a test."""
    return SparseCheckpointConfig(enabled=True, **changes)  # type: ignore[arg-type]


def plan(
    window: int | None, measured: Measured | None = None, table: OperatorTable = TABLE, **changes: object
) -> SparsePlan:
    """The plan of a world of one."""
    return make_plan(config(**changes), ToyState(table), alone(), measured, window)


@pytest.mark.parametrize("mode", ["fixed", "rolling"])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_a_forced_window_is_kept(window: int, mode: str) -> None:
    found = plan(window, window_mode=mode)
    assert found.schedule.window == window and found.schedule.mode == mode and len(found.slot_bytes) == window
    assert found.dense_bytes == DENSE and found.measured is None
    assert found.memory.slots == ring_slots(window, mode, reorder=True)


def test_a_window_of_more_slots_than_operators_is_refused() -> None:
    most = len(TABLE)
    assert make_plan(config(window=most), ToyState(TABLE), alone(), None, most).schedule.window == most
    with pytest.raises(ConfigError, match=f"--sparse-ckpt-window {most + 1}: no rank has more than {most} operators"):
        make_plan(config(window=most + 1), ToyState(TABLE), alone(), None, most + 1)


@pytest.mark.parametrize("reorder", [True, False])
@pytest.mark.parametrize("mode", ["fixed", "rolling"])
def test_every_slot_fits_into_its_memory(mode: str, reorder: bool) -> None:
    found = plan(3, window_mode=mode, reorder=reorder)
    for step in range(3):
        spec = found.schedule.spec(step)
        assert slot_layout(TABLE, spec.full, spec.weights_only, [BUFFER]).nbytes <= found.memory.data_bytes
    assert bool(found.spare_bytes) == reorder
    popular = {o.name: -number for number, o in enumerate(TABLE)}
    other = divide(TABLE, capture_order(TABLE, popular), 3, mode)
    light = [name for group in other[1:] for name in group]
    largest = slot_layout(TABLE, other[0], light, [BUFFER]).nbytes
    assert not reorder or largest <= found.memory.data_bytes, "a later order's slot fits too"


def test_auto_takes_the_smallest_window_that_fits_the_iteration() -> None:
    slow, fast = Measured(DENSE / 2, 2.0, 1.0, CHUNKS, UNLIMITED), Measured(DENSE * 1.5, 2.0, 1.0, CHUNKS, UNLIMITED)
    assert plan(None, fast).schedule.window == 1
    found = plan(None, slow)
    assert found.schedule.window > 1 and max(found.slot_bytes) <= slow.budget_bytes(SHARE)
    forced = plan(found.schedule.window - 1)
    assert max(forced.slot_bytes) > slow.budget_bytes(SHARE), "one slot fewer wouldn't fit"


def test_the_slowest_rank_decides_for_the_world() -> None:
    def one(agreement: ThreadAgreement) -> SparsePlan:
        speed = DENSE / 2 if agreement.rank == 1 else DENSE * 2
        return make_plan(config(), ToyState(TABLE), agreement, Measured(speed, 2.0, 1.0, CHUNKS, UNLIMITED), None)

    plans = on_ranks(3, one)
    assert all(
        isinstance(p, SparsePlan)
        and p.schedule == plan(None, Measured(DENSE / 2, 2.0, 1.0, CHUNKS, UNLIMITED)).schedule
        for p in plans
    )


def test_the_largest_rank_decides_the_memory_of_all() -> None:
    def one(agreement: ThreadAgreement) -> SparsePlan:
        return make_plan(config(), ToyState(TABLE if agreement.rank else small_table()), agreement, None, 2)

    plans = on_ranks(2, one)
    assert all(isinstance(p, SparsePlan) and p.memory == plan(2).memory for p in plans)
    assert plan(2, table=small_table()).memory != plan(2).memory


def test_the_plan_is_said_in_words() -> None:
    found = plan(None, Measured(DENSE / 2, 2.0, 1.0, CHUNKS, UNLIMITED))
    text = "\n".join(describe(found, ToyState(TABLE), config(), ranks=4))
    assert "8 expert, " in text and f"W={found.schedule.window} rolling (auto)" in text
    assert f"{4 * found.memory.total_bytes / GIB:.3f} GiB for 4 ranks" in text and "fits into one" in text
    assert f"replays {found.schedule.window - 1} to {found.longest_run - 1} iterations" in text
    hopeless = plan(None, Measured(1.0, 2.0, 1.0, CHUNKS, UNLIMITED))
    assert "expect a stall" in "\n".join(describe(hopeless, ToyState(TABLE), config(), ranks=1))
    assert "(forced)" in "\n".join(describe(plan(2), ToyState(TABLE), config(window=2), ranks=1))


def test_a_slot_that_only_just_fits_before_the_optimizer_step_makes_the_window_longer() -> None:
    largest = max(plan(2).slot_bytes)
    tight, ample = (Measured(rate, 2.0, 1.0, CHUNKS, UNLIMITED) for rate in (largest * 1.01, largest / SHARE))
    assert plan(None, ample).schedule.window == 2 < plan(None, tight).schedule.window


def test_a_smaller_share_of_the_link_makes_windows_longer_where_that_makes_slots_small_enough() -> None:
    weights = sum(o.weights_bytes for o in TABLE)
    fast = Measured(DENSE * 1.3, 1.0, 1.0, CHUNKS, UNLIMITED)
    usual, modest = plan(None, fast), plan(None, fast, copy_share=0.5)
    assert usual.schedule.window < modest.schedule.window
    assert max(modest.slot_bytes) <= fast.budget_bytes(0.5) < max(plan(modest.schedule.window - 1).slot_bytes)
    # Every slot has all weights, which take a third of the time: no window makes it a quarter, some make it 0.55.
    barely = Measured(weights * 3, 1.0, 1.0, CHUNKS, UNLIMITED)
    windows = [plan(None, barely, copy_share=share).schedule.window for share in (0.25, 0.55, 0.8)]
    assert windows[0] == windows[1] > windows[2]
    said = describe(plan(None, barely, copy_share=0.25), ToyState(TABLE), config(copy_share=0.25), 1)
    assert any("takes more of it than --sparse-ckpt-copy-share" in line for line in said)


def test_digests_that_are_slower_than_the_link_make_the_window_longer() -> None:
    fast, slow = (Measured(DENSE * 2, 2.0, 1.0, CHUNKS, rate) for rate in (UNLIMITED, DENSE / 4))
    assert slow.budget_bytes(SHARE) == DIGEST_RATE_UNDER_LOAD * DENSE / 2 < fast.budget_bytes(SHARE)
    assert fast.budget_bytes(SHARE) == DENSE * 2 * SHARE
    assert plan(None, slow).schedule.window > plan(None, fast).schedule.window
    by_device = Measured(DENSE * 2, 2.0, 1.0, CHUNKS, DENSE / 4, digests_on_device=True)
    for who, measured in (("threads", slow), ("the device", by_device)):
        lines = describe(plan(None, measured), ToyState(TABLE), config(), 1)
        assert any(line.startswith(f"digests          by {who}, at ") for line in lines)
    silent = describe(plan(None, slow), ToyState(TABLE), config(digest="off"), 1)
    assert not any(line.startswith("digests") for line in silent)
