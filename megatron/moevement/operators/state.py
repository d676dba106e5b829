"""What the rest of the package needs of a training job, and nothing more. `integration` implements it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.types import IterationRecord, Presence, StartState


def nothing() -> None:
    """What needs not be done."""


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """A range of device or host memory: address and length in bytes."""

    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RecordedOperator:
    """One operator of a committed slot, ready to be loaded.

    `pieces` are ranges of the slot's host memory in the order of `TrainingState.pieces`; `adam_steps` has one entry
    a parameter slice and is empty for weights-only.
    """

    name: str
    presence: Presence
    pieces: tuple[MemoryRange, ...]
    adam_steps: tuple[float, ...]


class TrainingState(Protocol):
    """The training state of one rank, as operators.

    Addresses stay valid until the next optimizer step at least; loading happens in place.
    """

    @property
    def table(self) -> OperatorTable:
        """The operators of this rank."""
        ...

    def pieces(self, operator: str, presence: Presence) -> Sequence[MemoryRange]:
        """Device ranges of the operator: per slice master, exp_avg, exp_avg_sq if full, else the compute weight."""
        ...

    def adam_steps(self, operator: str) -> tuple[float, ...]:
        """Adam's step counter of every slice of the operator."""
        ...

    def start_state(self, step: int) -> tuple[StartState, Sequence[MemoryRange]]:
        """Everything besides operators, and the device ranges that hold the buffers' contents.

        The ranges hold copies, which stay unchanged while the iteration runs.
        """
        ...

    def popularity(self) -> dict[str, int]:
        """Tokens routed to each expert operator of this rank since the last call. Collective over the stage."""
        ...

    def stream(self) -> int:
        """Handle of the device stream whose work must be finished before a piece may be read; 0 on the CPU."""
        ...

    def arrival(self) -> Callable[[], bool]:
        """Marks what the device's stream has been given by now; returns what tells whether the device has done it."""
        ...

    def load(self, operators: Sequence[RecordedOperator]) -> None:
        """Loads operators in place and makes them whole on all data-parallel ranks. Collective over the stage."""
        ...

    def load_start_state(self, state: StartState, buffers: Sequence[MemoryRange]) -> None:
        """Restores RNG, scheduler, scaler, data position and buffers."""
        ...

    def replay(
        self, record: IterationRecord, frozen: frozenset[str], before_update: Callable[[], None] = nothing
    ) -> IterationRecord:
        """Runs iteration `record.iteration` again with the recorded decisions; `frozen` operators don't change.

        `before_update` is called when gradients are final and weights still unchanged.

        Returns the record of what the replay itself computed, for comparison; its loss is None on a rank that replays
        without the last stage.
        """
        ...

    def differing_weights(self, operators: Sequence[RecordedOperator]) -> tuple[str, ...]:
        """Names of the weights-only operators whose compute weights differ in any bit from the recorded ones."""
        ...


def full_pieces(state: TrainingState) -> list[MemoryRange]:
    """Device ranges of all operators in full: whatever slots hold of them, window after window."""
    return [piece for operator in state.table for piece in state.pieces(operator.name, Presence.FULL)]
