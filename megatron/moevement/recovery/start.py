"""From what training starts: slots of an earlier worker, a dense checkpoint, or from scratch; agreed by all ranks."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.moevement.config import GIB
from megatron.moevement.errors import SlotInvalid, StoreError
from megatron.moevement.operators.state import TrainingState
from megatron.moevement.recovery.plan import common_run
from megatron.moevement.recovery.sources import SlotReader
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.store.host_store import HostStore, refuse_directory
from megatron.moevement.types import IterationRecord, Run, SlotInfo
from moevement_ext import DigestPool


@dataclass(frozen=True, slots=True)
class Found:
    """What a rank found of an earlier worker: its store if it is usable, else why not."""

    store: HostStore | None
    problem: str


@dataclass(frozen=True, slots=True)
class SlotOffer:
    """What a rank could load after a failure elsewhere, and the records that it has; `problems` are for people."""

    run_id: str
    slots: Mapping[int, SlotInfo]
    operators: frozenset[str]
    records: Mapping[int, IterationRecord]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """The agreed source: `run` of slots, else the dense checkpoint of `dense_step`, else neither (scratch).

    `reasons` says, for people, why a better source was passed over. `unusable` are steps whose slots on this rank
    failed their verification.
    """

    run: Run | None
    dense_step: int | None
    reasons: tuple[str, ...]
    unusable: frozenset[int] = field(default=frozenset(), compare=False)


def store_path(directory: Path, rank: int) -> Path:
    """The slot file of a rank."""
    return directory / f"rank{rank:05d}.slots"


def open_quietly(path: Path) -> Found:
    """The store of a process that took over a rank while the others wait: whatever is wrong with it is only noted."""
    try:
        return Found(HostStore.open(path), "") if path.exists() else Found(None, "no slots")
    except (SlotInvalid, StoreError) as error:
        return Found(None, f"damaged slots: {error}")


def find_store(path: Path | None, identity: Mapping[str, Any], agreement: Agreement, host_memory_gib: float) -> Found:
    """Opens the slots that an earlier worker of this rank left; `path` is None if none are wanted. Collective.

    Raises:
        StoreError: on all ranks, if on any rank the slots belong to another model, layout or format, or take more than
            `host_memory_gib` (0: no limit): a person must decide. Damaged and missing files are not an error here,
            since a dense checkpoint may serve.
    """
    store, problem, refusal = None, "", ""
    try:
        if path is not None:
            refuse_directory(path)
        store = HostStore.open(path) if path is not None and path.exists() else None
        problem = "" if store else "no slots"
        if store is not None and path is not None:
            refusal = _mismatch(path, store.content["identity"], identity) or _excess(path, store, host_memory_gib)
    except SlotInvalid as error:
        problem = f"damaged slots: {error}"
    except StoreError as error:
        refusal = str(error)
    refusals = [text for text in agreement.gather(refusal) if text]
    if refusals:
        raise StoreError(refusals[0])
    return Found(store, problem)


def _mismatch(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    # The operators last: a flag says better what has changed. Before them flags that only matter beside another one.
    for key in sorted(wanted, key=lambda key: (key == "operators", key not in stored, key)):
        if stored.get(key) != wanted.get(key):
            what = "model" if key == "operators" else key
            detail = "" if key == "operators" else f": {stored.get(key)} then, {wanted.get(key)} now"
            return (
                f"{path}: the slots were written with another {what}{detail}; restore it, choose another "
                "--sparse-ckpt-name, or discard the slots with --sparse-ckpt-fresh"
            )
    return ""


def _excess(path: Path, store: HostStore, host_memory_gib: float) -> str:
    # What a plan is checked by.
    taken_gib = store.geometry.slots * store.geometry.slot_bytes / GIB
    if not host_memory_gib or taken_gib <= host_memory_gib:
        return ""
    return (
        f"--sparse-ckpt-host-memory-gib {host_memory_gib:g}: the slots in {path} take {taken_gib:.6f} GiB; raise it, "
        "or discard the slots with --sparse-ckpt-fresh"
    )


def choose_source(
    found: Found, state: TrainingState, agreement: Agreement, digests: DigestPool | None, dense_step: int | None
) -> Choice:
    """Agrees on the newest state that all ranks can have. Collective.

    Args:
        found: this rank's slots.
        state: for the names of the operators.
        digests: verifies slots; None verifies none.
        dense_step: step of the newest dense checkpoint, None without one. It wins over slots that end earlier.
    """
    reasons = [found.problem] if found.problem else []
    usable: Mapping[int, Any] = {}
    rejected: Mapping[int, str] = {}
    run_id = ""
    if found.store is not None:
        run_id = found.store.content["run_id"]
        usable, rejected = SlotReader(found.store, state.table, agreement.rank, digests).verified()
        reasons += [f"slot of step {step}: {why}" for step, why in rejected.items()]
        reasons += found.store.rejected
    offers = agreement.gather((run_id, usable, state.table.names, reasons))
    texts = tuple(f"rank {rank}: {text}" for rank, offer in enumerate(offers) for text in offer[3])
    if len({offer[0] for offer in offers}) > 1:
        present = [rank for rank, offer in enumerate(offers) if offer[0]]
        texts += (
            (f"only ranks {present} have slots of one run",)
            if len(present) < len(offers)
            else ("slots of different runs",)
        )
        return Choice(None, dense_step, texts)
    run = common_run([(offer[1], offer[2]) for offer in offers]) if run_id else None
    if run is None or (dense_step is not None and dense_step > run.last):
        if run_id and run is None:
            texts += ("no window is complete on all ranks",)
        return Choice(None, dense_step, texts)
    return Choice(run, dense_step, texts, frozenset(rejected))


def restart_count() -> int:
    """How often the launcher or the scheduler has restarted this job; 0 in the first start."""
    return sum(int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
