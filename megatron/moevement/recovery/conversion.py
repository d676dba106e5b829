"""Sparse-to-dense conversion: load a slot, replay its iteration, load the next (paper section 3.3; W-1 replays)."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron.moevement import injection
from megatron.moevement.errors import RecoveryError
from megatron.moevement.operators.state import TrainingState
from megatron.moevement.recovery.sources import SlotReader
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.types import IterationRecord, Run


@dataclass(frozen=True, slots=True)
class Progress:
    """One finished part of a conversion, for the display: iteration replayed (or -1: only loaded), counts, seconds."""

    step: int
    loaded_full: int
    frozen: int
    replayed: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did. `compared` counts values (compute weights of operators, losses) that were recorded by
    the failed run and recomputed here; `different` those that were not bitwise equal."""

    run: Run
    replays: int
    compared: int
    different: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StartPoint:
    """Where training starts: Step `step` (None: from scratch), already in place if it came from slots."""

    source: str
    step: int | None
    conversion: Conversion | None
    reasons: tuple[str, ...]


def convert(
    state: TrainingState,
    reader: SlotReader,
    run: Run,
    agreement: Agreement,
    deterministic: bool,
    report: Callable[[Progress], None],
) -> Conversion:
    """Makes the training state of Step `run.last`. Collective: all ranks convert the same run.

    Operators that are already active are not overwritten by a later weights-only copy: the copy is compared with the
    replayed weights instead, and so is each replayed loss with the recorded one. That is a proof of exactness in the
    recovery itself.

    Raises:
        RecoveryError: deterministic mode, and a compared value differs on some rank.
    """
    started = time.perf_counter()
    active: set[str] = set()
    compared = different = 0
    for step in run.steps:
        part_started = time.perf_counter()
        injection.reached("convert", step)
        spec = reader.manifest(step).spec
        known = active.intersection(spec.weights_only)
        differing = state.differing_weights(reader.operators(step, known))
        compared += len(known)
        different += len(differing)
        _require_equal(
            agreement, deterministic, f"compute weights of {', '.join(differing[:3])} at step {step}", differing
        )
        state.load(reader.operators(step, {*spec.full, *spec.weights_only} - known))
        state.load_start_state(reader.manifest(step).start, reader.buffers(step))
        active.update(spec.full)
        frozen = state.table.names - active
        if step < run.last:
            record = reader.manifest(step + 1).record
            if record is None or record.iteration != step:
                raise RecoveryError(f"the slot of step {step + 1} has no record of iteration {step}")
            replayed = state.replay(record, frozenset(frozen))
            compared += 1
            different += require_same_loss(replayed, record, agreement, deterministic)
        report(Progress(step, len(spec.full), len(frozen), step < run.last, time.perf_counter() - part_started))
    return Conversion(run, run.replays, compared, different, time.perf_counter() - started)


def require_same_loss(
    replayed: IterationRecord, record: IterationRecord, agreement: Agreement, deterministic: bool
) -> bool:
    """Whether the replayed loss differs from the recorded one; a rank that doesn't know the loss says None. Collective.

    Raises:
        RecoveryError: it does, on some rank, in deterministic mode.
    """
    unequal = replayed.loss is not None and replayed.loss != record.loss and not _both_nan(replayed, record)
    what = f"loss of iteration {record.iteration} ({replayed.loss} instead of {record.loss})"
    _require_equal(agreement, deterministic, what, (what,) if unequal else ())
    return unequal


def _both_nan(one: IterationRecord, other: IterationRecord) -> bool:
    return one.loss is not None and other.loss is not None and one.loss != one.loss and other.loss != other.loss


def _require_equal(agreement: Agreement, deterministic: bool, what: str, differing: tuple[str, ...]) -> None:
    """Stops all ranks together if one of them found a difference; the others would wait for it forever."""
    found = [(rank, text) for rank, text in enumerate(agreement.gather(what if differing else "")) if text]
    if found and deterministic:
        rank, text = found[0]
        raise RecoveryError(
            f"the replay is not exact: rank {rank}: {text} differs from what the failed run recorded; restore "
            "--data-path and the training flags if they were changed; else the slots are kept for analysis, use "
            "--sparse-ckpt-fresh to go on from the dense checkpoint"
        )
