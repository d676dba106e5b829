"""Small stores for unit tests: a table, its memory, and slots written by the real capture."""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from megatron.moevement.operators.state import MemoryRange
from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.snapshot.layout import piece_sizes, slot_layout
from megatron.moevement.store.format import Manifest
from megatron.moevement.store.host_store import HostStore, SlotLease
from megatron.moevement.types import BufferInfo, IterationRecord, Presence, SlotSpec, StartState
from moevement_ext import DIGEST_LEAF_BYTES

BUFFER = BufferInfo("chunk0.bias", "torch.float32", (4,), 16)


def start_state(step: int) -> StartState:
    """A start state with every field set."""
    return StartState(
        step, step * 8, step * 8, ({"scale": 4096.0, "growth_tracker": 1.0},), {"torch": bytes(range(256))}, (BUFFER,)
    )


def record(iteration: int) -> IterationRecord:
    """A record whose floats have all their bits."""
    return IterationRecord(iteration, 1 / 3, 0.1 + 0.2, False, (1e-3 / 7, 0.0), (0.1,), 4096.0, iteration * 8)


class MemoryState:
    """Plain memory in the place of a model: every operator's master, moments and weight are ctypes buffers."""

    def __init__(self, table: OperatorTable) -> None:
        self.table = table
        self._memory: dict[tuple[str, Presence], list[ctypes.Array[ctypes.c_char]]] = {}
        for operator in table:
            for presence in Presence:
                sizes = piece_sizes(operator, presence)
                self._memory[operator.name, presence] = [ctypes.create_string_buffer(n) for n in sizes]
        self.buffer = ctypes.create_string_buffer(BUFFER.nbytes)

    def fill(self, step: int) -> None:
        """Other bytes in every piece, for every step."""
        pieces = [piece for pieces in self._memory.values() for piece in pieces]
        for number, piece in enumerate([*pieces, self.buffer]):
            ctypes.memset(piece, (7 * number + 31 * step + 1) % 256, len(piece))

    def contents(self, operator: str, presence: Presence) -> bytes:
        """All bytes of an operator's pieces."""
        return b"".join(piece.raw for piece in self._memory[operator, presence])

    def pieces(self, operator: str, presence: Presence) -> Sequence[MemoryRange]:
        """See TrainingState."""
        return [MemoryRange(ctypes.addressof(p), len(p)) for p in self._memory[operator, presence]]

    def adam_steps(self, operator: str) -> tuple[float, ...]:
        """See TrainingState."""
        return tuple(5.0 for _ in self.table[operator].slices)

    def start_state(self, step: int) -> tuple[StartState, Sequence[MemoryRange]]:
        """See TrainingState."""
        return start_state(step), [MemoryRange(ctypes.addressof(self.buffer), BUFFER.nbytes)]

    def arrival(self) -> Callable[[], bool]:
        """See TrainingState."""
        return lambda: True

    def stream(self) -> int:
        """See TrainingState."""
        return 0


def manifest(spec: SlotSpec, rank: int = 0, run_id: str = "run") -> Manifest:
    """A manifest without digests."""
    steps = dict.fromkeys(spec.full, (5.0, 5.0))
    return Manifest(rank, run_id, spec, start_state(spec.step), record(spec.step - 1), steps, {})


def create_store(path: Path, table: OperatorTable, slots: int = 4) -> HostStore:
    """An empty store with room for any slot of the table."""
    room = slot_layout(table, [o.name for o in table], [], [BUFFER]).nbytes
    return HostStore.create(path, {"identity": {"--seed": 1}, "run_id": "run"}, slots, 32768, room)


def write_leased(lease: SlotLease, data: bytes) -> None:
    """Puts data where a capture would copy it to."""
    ctypes.memmove(lease.data_address, data, len(data))


def expected_digest(data: bytes | memoryview, sizes: Sequence[int]) -> str:
    """The digest of a region by python-xxhash alone: of the digests of its pieces, each of those of its leaves."""
    pieces, begin, leaf = b"", 0, DIGEST_LEAF_BYTES
    for size in sizes:
        piece = bytes(data[begin : begin + size])
        leaves = [xxhash.xxh3_128_digest(piece[at : at + leaf]) for at in range(0, size, leaf)]
        pieces += xxhash.xxh3_128_digest(b"".join(leaves))
        begin += size
    return str(xxhash.xxh3_128_hexdigest(pieces))
