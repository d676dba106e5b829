"""A training state small enough to follow, and ranks that are threads: recoveries in one process, in milliseconds."""

import ctypes
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from megatron.moevement.errors import MoevementError
from megatron.moevement.operators.state import MemoryRange, RecordedOperator, nothing
from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.types import IterationRecord, OperatorKind, Presence, StartState
from tests.support.slots import BUFFER, MemoryState, start_state

T = TypeVar("T")
WAIT_SECONDS = 20.0


class ToyState(MemoryState):
    """Implements `TrainingState`. The loss depends on every weight, every update on the loss and the learning rate.

    A compute weight is the upper half of its master weight, as bf16 is of FP32; a frozen operator's weights take part
    in the loss, but nothing of it changes.
    """

    def __init__(self, table: OperatorTable, seed: int = 0) -> None:
        super().__init__(table)
        self.fill(seed)
        self.step = 0
        self.tokens: dict[str, int] = {}
        self._adam = dict.fromkeys(table.names, 0.0)
        self._clone = ctypes.create_string_buffer(BUFFER.nbytes)
        self._derive(table.names)

    def _arrays(self, operator: str, presence: Presence) -> list[npt.NDArray[np.uint8]]:
        return [np.frombuffer(piece, dtype=np.uint8) for piece in self._memory[operator, presence]]

    def _derive(self, operators: Iterable[str]) -> None:
        for name in operators:
            masters = self._arrays(name, Presence.FULL)[::3]
            for master, weight in zip(masters, self._arrays(name, Presence.WEIGHTS_ONLY), strict=True):
                weight.reshape(-1, 2)[:] = master.reshape(-1, 4)[:, 2:]

    def everything(self) -> dict[str, object]:
        """All that a recovery must restore, by name."""
        state: dict[str, object] = {f"{n}.{p}": self.contents(n, p) for n in self.table.names for p in Presence}
        return {**state, **{f"{n}.step": s for n, s in self._adam.items()}, "buffer": self.buffer.raw, "at": self.step}

    def train(self, rate: float = 0.25, frozen: frozenset[str] = frozenset()) -> IterationRecord:
        """One iteration; returns its record."""
        weights = b"".join(self.contents(o.name, Presence.WEIGHTS_ONLY) for o in self.table)
        signal = zlib.crc32(weights + self.buffer.raw)
        for name in self.table.names - frozen:
            for piece in self._arrays(name, Presence.FULL):
                piece[:] = piece * np.uint8(5) + np.uint8((signal + int(rate * 1000)) % 256)
            self._adam[name] += 1
        self._derive(self.table.names - frozen)
        bias = np.frombuffer(self.buffer, dtype=np.uint8)
        bias[:] = bias + np.uint8(signal % 251)
        self.step += 1
        at = self.step - 1
        return IterationRecord(at, signal / 7, signal / 3, False, (rate, rate), (0.1, 0.0), 1.0, at * 8)

    def adam_steps(self, operator: str) -> tuple[float, ...]:
        """See TrainingState."""
        return tuple(self._adam[operator] for _ in self.table[operator].slices)

    def start_state(self, step: int) -> tuple[StartState, Sequence[MemoryRange]]:
        """See TrainingState."""
        ctypes.memmove(self._clone, self.buffer, BUFFER.nbytes)
        return start_state(step), [MemoryRange(ctypes.addressof(self._clone), BUFFER.nbytes)]

    def popularity(self) -> dict[str, int]:
        """See TrainingState."""
        return {o.name: self.tokens.get(o.name, 1) for o in self.table if o.kind is OperatorKind.EXPERT}

    def load(self, operators: Sequence[RecordedOperator]) -> None:
        """See TrainingState."""
        for operator in operators:
            targets = self.pieces(operator.name, operator.presence)
            for source, target in zip(operator.pieces, targets, strict=True):
                assert source.nbytes == target.nbytes
                ctypes.memmove(target.address, source.address, source.nbytes)
            if operator.presence is Presence.FULL:
                self._adam[operator.name] = operator.adam_steps[0]
                self._derive([operator.name])

    def load_start_state(self, state: StartState, buffers: Sequence[MemoryRange]) -> None:
        """See TrainingState."""
        ctypes.memmove(self.buffer, buffers[0].address, BUFFER.nbytes)
        self.step = state.step

    def replay(
        self, record: IterationRecord, frozen: frozenset[str], before_update: Callable[[], None] = nothing
    ) -> IterationRecord:
        """See TrainingState."""
        assert self.step == record.iteration
        before_update()
        return self.train(record.learning_rates[0], frozen)

    def differing_weights(self, operators: Sequence[RecordedOperator]) -> tuple[str, ...]:
        """See TrainingState."""
        return tuple(
            operator.name
            for operator in operators
            if b"".join(ctypes.string_at(p.address, p.nbytes) for p in operator.pieces)
            != self.contents(operator.name, Presence.WEIGHTS_ONLY)
        )


class ThreadAgreement(Agreement):
    """Agreement between threads of one process instead of gloo ranks."""

    def __init__(self, rank: int, barrier: threading.Barrier, values: list[Any]) -> None:
        self._rank, self._barrier, self._values = rank, barrier, values
        self._minimum: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        """See Agreement."""
        return self._rank

    @property
    def size(self) -> int:
        """See Agreement."""
        return len(self._values)

    def gather(self, value: Any) -> list[Any]:
        """See Agreement."""
        self._values[self._rank] = value
        self._barrier.wait(WAIT_SECONDS)
        values = list(self._values)
        self._barrier.wait(WAIT_SECONDS)
        return values

    def maximum(self, values: Sequence[float]) -> tuple[float, ...]:
        """See Agreement."""
        return tuple(max(column) for column in zip(*self.gather(values), strict=True))

    def start_minimum(self, values: Sequence[int]) -> None:
        """See Agreement."""
        self._minimum = tuple(min(column) for column in zip(*self.gather(values), strict=True))

    def finish_minimum(self) -> tuple[int, ...] | None:
        """See Agreement."""
        found, self._minimum = self._minimum, None
        return found

    def barrier(self) -> None:
        """See Agreement."""
        self.gather(None)


def on_ranks(ranks: int, work: Callable[[ThreadAgreement], T]) -> list[T | Exception]:
    """What `work` returned or raised on every rank. A rank that doesn't take part in a collective breaks it."""
    barrier, values = threading.Barrier(ranks), [None] * ranks
    results: list[T | Exception] = [RuntimeError("did not finish")] * ranks

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadAgreement(rank, barrier, values))
        except (AssertionError, OSError, ValueError, LookupError, RuntimeError, MoevementError) as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def alone() -> ThreadAgreement:
    """A world of one rank."""
    return ThreadAgreement(0, threading.Barrier(1), [None])
