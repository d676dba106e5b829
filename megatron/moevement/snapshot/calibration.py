"""Calibrates the copy engine against this rank's link and model, in the first iterations."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.moevement.events import EventLog
from megatron.moevement.operators.state import TrainingState, full_pieces
from megatron.moevement.snapshot.bandwidth import Chunks, choose_chunks, measure_bandwidth
from megatron.moevement.snapshot.copy_time import CopyTime
from moevement_ext import CopyEngine


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a calibration found: the chunks that the engine uses now, what they give, and by candidate the bandwidth.

    `copy_seconds` are those of an iteration in which a slot can be copied.
    """

    chunks: Chunks
    bytes_per_second: float
    copy_seconds: float
    awaited_copies: int
    rates: dict[Chunks, float]

    def fields(self) -> dict[str, Any]:
        """For an event."""
        return {
            "chunk_bytes": self.chunks.nbytes,
            "chunks_in_flight": self.chunks.in_flight,
            "bytes_per_second": self.bytes_per_second,
            "copy_seconds": self.copy_seconds,
            "awaited_copies": self.awaited_copies,
            "rates": [[chunks.nbytes, chunks.in_flight, rate] for chunks, rate in self.rates.items()],
        }


class Calibration:
    """Times iterations, then measures the link once and sets the engine's chunks.

    Args:
        engine: what is calibrated.
        state: the training state, which is copied from.
        directory: where the slots will lie.
        rank: of this process.
        chunks: what to choose from; with a single one there is nothing to do but to measure, if that is asked for.
        awaited_copies: small copies to the host that the model waits for in an iteration.
    """

    def __init__(
        self,
        engine: CopyEngine,
        state: TrainingState,
        directory: Path,
        rank: int,
        chunks: Sequence[Chunks],
        awaited_copies: int,
    ) -> None:
        self._engine, self._state, self._chunks, self._awaited = engine, state, tuple(chunks), awaited_copies
        self._directory, self._rank = directory, rank
        self._time = CopyTime(engine)
        self.done = len(self._chunks) == 1

    @property
    def iterations(self) -> int:
        """Iterations timed so far."""
        return len(self._time.seconds)

    def begin_iteration(self) -> None:
        """Starts to time an iteration."""
        self._time.begin(self._state.stream())

    def fence(self) -> None:
        """The timed iteration, if one is, has come to its optimizer step."""
        self._time.fence()

    def run(self, events: EventLog) -> Calibrated:
        """Measures, reports, and leaves the engine, which is idle, with the best chunks.

        At least two iterations are timed; the first isn't counted.
        """
        seconds = statistics.median(self._time.seconds[1:])
        place = (self._directory, self._rank, self._state.stream())
        rates = measure_bandwidth(self._engine, full_pieces(self._state), *place, self._chunks)
        best = choose_chunks(rates, self._awaited, seconds)
        self._engine.set_chunks(best.nbytes, best.in_flight)
        self.done = True
        found = Calibrated(best, rates[best], seconds, self._awaited, rates)
        events.emit("calibration", **found.fields())
        return found
