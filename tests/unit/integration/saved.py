"""The whole state of a job as its operators give it, copied aside and put back."""

import ctypes
from collections.abc import Sequence

from megatron.moevement.integration import train_loop
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.operator_state import OperatorState
from megatron.moevement.operators.state import MemoryRange, RecordedOperator
from megatron.moevement.types import IterationRecord, Presence


class Saved:
    """A copy of every operator in both presences, and of the start state."""

    def __init__(self, state: OperatorState, step: int) -> None:
        self._kept: list[ctypes.Array[ctypes.c_char]] = []
        self.start, buffers = state.start_state(step)
        self.buffers = self._copies(buffers)
        self.operators = {
            (o.name, presence): RecordedOperator(
                o.name,
                presence,
                self._copies(state.pieces(o.name, presence)),
                state.adam_steps(o.name) if presence is Presence.FULL else (),
            )
            for o in state.table
            for presence in Presence
        }

    def _copies(self, pieces: Sequence[MemoryRange]) -> tuple[MemoryRange, ...]:
        copies = [ctypes.create_string_buffer(ctypes.string_at(p.address, p.nbytes), p.nbytes) for p in pieces]
        self._kept += copies
        return tuple(MemoryRange(ctypes.addressof(copy), len(copy)) for copy in copies)

    def restore(self, state: OperatorState) -> None:
        """Everything as it was."""
        state.load([operator for (_, presence), operator in self.operators.items() if presence is Presence.FULL])
        state.load_start_state(self.start, self.buffers)

    def piece(self, name: str, presence: Presence, number: int = 0) -> bytes:
        """The bytes of one piece."""
        piece = self.operators[name, presence].pieces[number]
        return ctypes.string_at(piece.address, piece.nbytes)


class Recorder(train_loop.NoHooks):
    """Makes the record of the iteration that it sees."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.record: IterationRecord | None = None
        self.rates: tuple[float, ...] = ()
        self.decays: tuple[float, ...] = ()

    def before_optimizer_step(self, iteration: int) -> None:
        """Rates before the scheduler moves on."""
        self.rates = tuple(float(group["lr"]) for group in self.job.optimizer.param_groups)
        self.decays = tuple(float(group["weight_decay"]) for group in self.job.optimizer.param_groups)

    def after_optimizer_step(self, iteration: int, outcome: train_loop.IterationOutcome) -> None:
        """The record."""
        self.record = IterationRecord(
            iteration,
            outcome.loss,
            outcome.grad_norm,
            outcome.skipped,
            self.rates,
            self.decays,
            outcome.loss_scale,
            self.job.samples_before(iteration),
        )


def train_one(job: TrainingJob) -> IterationRecord:
    """One iteration and its record."""
    recorder = Recorder(job)
    for chunk in job.chunks:
        chunk.train()
    train_loop.train_iteration(job, recorder)
    assert recorder.record is not None
    return recorder.record
