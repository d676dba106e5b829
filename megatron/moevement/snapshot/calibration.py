"""Calibrates the copy engine against this rank's link and model, in the first iterations."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.moevement.errors import StoreError
from megatron.moevement.events import EventLog
from megatron.moevement.operators.state import TrainingState, full_pieces
from megatron.moevement.snapshot.bandwidth import Chunks, LinkProbe, choose_chunks, measure_bandwidth
from megatron.moevement.snapshot.copy_time import CopyTime
from moevement_ext import CopyEngine

# Training and copies compete for the device's memory and for its driver: on an H200 a link of 52 GB/s gave 40 GB/s.
PROBED_ITERATIONS = 4


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
    """Times iterations, then measures the link once and sets the engine's chunks, then copies beside iterations.

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
        self._probe: LinkProbe | None = None
        self._times = 0
        self._beside = list[float]()
        self.done = len(self._chunks) == 1
        self.found: Calibrated | None = None

    @property
    def iterations(self) -> int:
        """Iterations timed so far."""
        return len(self._time.seconds)

    @property
    def bytes_per_second_beside_training(self) -> float | None:
        """What the link gives while an iteration runs; None until enough iterations have been probed."""
        if self.found is None or len(self._beside) < PROBED_ITERATIONS:
            return None
        return min(statistics.median(self._beside), self.found.bytes_per_second)

    def begin_iteration(self) -> None:
        """Starts to time an iteration, or to copy beside it."""
        if self._probe is None:
            self._time.begin(self._state.stream())
        else:
            self._probe.start(self._times)

    def fence(self) -> None:
        """The iteration that is timed or copied beside, if one is, has come to its optimizer step."""
        if self._probe is None:
            self._time.fence(self._state.stream())
            return
        self._beside.append(self._probe.stop())
        if len(self._beside) == PROBED_ITERATIONS:
            self._forget_probe()

    def run(self, events: EventLog, then_beside_training: bool = False) -> Calibrated:
        """Measures, reports, and leaves the engine, which is idle, with the best chunks.

        At least two iterations are timed; the first isn't counted.

        Args:
            events: who is told.
            then_beside_training: whether the next iterations are probed.

        Raises:
            StoreError: there is no room to measure with.
        """
        # What makes an iteration longer than another comes from outside, and the slot must fit into the short ones.
        seconds = min(self._time.seconds[1:])
        pieces, place = full_pieces(self._state), (self._directory, self._rank, self._state.stream())
        self._probe = LinkProbe(self._engine, pieces, *place)
        try:
            rates = measure_bandwidth(self._probe, self._engine, self._chunks)
        except BaseException:
            self._forget_probe()
            raise
        best = choose_chunks(rates, self._awaited, seconds)
        self._engine.set_chunks(best.nbytes, best.in_flight)
        self.done = True
        self.found = Calibrated(best, rates[best], seconds, self._awaited, rates)
        if not self._probe.nbytes:
            # There is nothing to copy, and no limit.
            self._beside = [rates[best]] * PROBED_ITERATIONS
        if then_beside_training and self._probe.nbytes:
            # More than fits, so that the link is busy all the time; but no more than all of the state, which no slot
            # exceeds: on the CPU copies take the cores from training.
            state = sum(piece.nbytes for piece in pieces)
            self._times = math.ceil(min(rates[best] * seconds + self._probe.nbytes, state) / self._probe.nbytes)
        else:
            self._forget_probe()
        events.emit("calibration", **self.found.fields())
        return self.found

    def try_run(self, events: EventLog) -> None:
        """Like `run`, where training can go on without: if there is no room to measure, chunks stay what they are."""
        try:
            self.run(events)
        except StoreError as error:
            self.done = True
            events.emit("calibration_failed", reason=str(error))

    def reset(self) -> None:
        """Forgets what was timed and measured, and frees the scratch memory; the engine keeps its chunks.

        After a failure all ranks begin again, those that kept their process with those that take over.
        """
        self._forget_probe()
        self._time, self._beside, self.found = CopyTime(self._engine), [], None
        # Those that were done would begin slots before those that are not.
        self.done = len(self._chunks) == 1

    def _forget_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None
