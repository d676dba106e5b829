"""A device that digests wrongly is found out before training."""

import numpy as np
import pytest

from megatron.moevement.snapshot.digest_check import BYTES, RANGES, check_device_digests
from moevement_ext import CopyEngine, DeviceDigests, EngineError
from tests.support.engines import SlowDigests
from tests.support.slots import MemoryState
from tests.support.tables import small_table

LIMITS = {"ranges_limit": RANGES, "bytes_limit": BYTES}


class WrongDigests(DeviceDigests):
    """Turns one bit of the last digest."""

    def wait(self, ticket: int, timeout_seconds: float) -> bytes | None:
        """The digests."""
        found = super().wait(ticket, timeout_seconds)
        return found and found[:-1] + bytes([found[-1] ^ 1])


@pytest.mark.parametrize("elements", [100, 500_000])
def test_right_digests_pass_and_wrong_ones_do_not(elements: int) -> None:
    state = MemoryState(small_table(expert_elements=elements))
    state.fill(3)
    with CopyEngine() as engine, DeviceDigests(**LIMITS) as digests:
        check_device_digests(digests, engine, state)
        with pytest.raises(EngineError, match="not those of the same bytes"):
            check_device_digests(WrongDigests(**LIMITS), engine, state)
        digests.close()
        with pytest.raises(EngineError, match="closed"):
            check_device_digests(digests, engine, state)


def test_both_ends_of_the_sizes_are_looked_at_from_every_kind_of_address() -> None:
    state, asked = MemoryState(small_table(expert_elements=500_000)), list[tuple[int, int]]()

    class Recording(DeviceDigests):
        def submit(self, addresses: object, sizes: object, stream: int = 0, label: str = "") -> int:
            asked.extend(zip(np.asarray(addresses).tolist(), np.asarray(sizes).tolist(), strict=True))
            return super().submit(addresses, sizes, stream, label)  # type: ignore[arg-type]

    with CopyEngine() as engine, Recording(**LIMITS) as recording:
        check_device_digests(recording, engine, state)
    assert len(asked) == RANGES and sum(size for _, size in asked) <= BYTES
    assert len({address % 32 for address, _ in asked}) > 5
    assert max(size for _, size in asked) > (1 << 20)


def test_a_device_that_never_answers_is_given_up() -> None:
    digests = SlowDigests(**LIMITS)
    with CopyEngine() as engine, pytest.raises(EngineError, match="took longer than"):
        check_device_digests(digests, engine, MemoryState(small_table()))
    assert digests.cancelled == [1]


def test_a_rank_that_owns_nothing_has_nothing_to_check() -> None:
    class Empty(MemoryState):
        def pieces(self, operator: str, presence: object) -> list[object]:  # type: ignore[override]
            return []

    with CopyEngine() as engine, DeviceDigests(**LIMITS) as digests:
        check_device_digests(digests, engine, Empty(small_table()))  # type: ignore[arg-type]
