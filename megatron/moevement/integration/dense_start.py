"""From which dense checkpoint a job starts, which it must not find, and from what a stopped job goes on."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import ConfigError, StoreError
from megatron.moevement.integration.dense_checkpoint import find_dense, load_dense
from megatron.moevement.integration.job import TrainingJob


def newest_dense(job: TrainingJob, also_save: bool) -> tuple[str, int] | None:
    """Directory and step of the newest dense checkpoint in `--load`, and in `--save` after a restart. Collective.

    In a first start only `--load` counts, as in Megatron: `--save` may hold the checkpoints of another run.
    """
    candidates = []
    # In one order on all ranks: each answer is rank 0's.
    for directory in dict.fromkeys((job.config.load, job.config.save if also_save else None)):
        if directory is None:
            continue
        step = find_dense(directory).step
        if step is not None:
            candidates.append((step, str(directory)))
        elif directory == job.config.load and job.topology.rank == 0:
            print(f"warning: --load {directory}: no dense checkpoint there", file=sys.stderr, flush=True)
    if not candidates:
        return None
    step, directory = max(candidates)
    return directory, step


def check_scratch(job: TrainingJob) -> None:
    """What starts from scratch was to load nothing, and finds no other run's checkpoints in `--save`. Collective.

    After a failure it would take the newest one there for its own. With `--load` and `--save` alike, as a job has them
    that is started again and again, there is nothing to load at first.

    Raises:
        ConfigError: on every rank.
    """
    load, save = job.config.load, job.config.save
    if load is not None and not loads_what_it_saves(job):
        raise ConfigError(f"--load {load}: no dense checkpoint is there; correct the folder, or start without --load")
    step = None if save is None else find_dense(save).step
    if step is not None:
        raise ConfigError(
            f"--save {save} holds a checkpoint of step {step}: add --load {save} to go on from it, or choose another "
            "directory"
        )


def loads_what_it_saves(job: TrainingJob) -> bool:
    """Whether `--load` and `--save` are one folder."""
    load, save = job.config.load, job.config.save
    return load is not None and save is not None and Path(load).resolve() == Path(save).resolve()


def load_newest(job: TrainingJob, directory: str, step: int) -> None:
    """Loads the checkpoint of `step`, or the newest older one that isn't damaged.

    Raises:
        StoreError: all of them are damaged.
    """
    wanted: int | None = step
    while wanted is not None:
        try:
            load_dense(job, directory, wanted)
        except StoreError as error:
            if job.topology.rank == 0:
                print(f"warning: {error}; trying an older one", file=sys.stderr, flush=True)
            wanted = find_dense(directory, before=wanted).step
            continue
        if job.topology.rank == 0:
            print(f"dense checkpoint of step {wanted} loaded from {directory}", flush=True)
        return
    raise StoreError(f"--load {directory}: every dense checkpoint is damaged; choose another directory")


def what_is_kept(job: TrainingJob, sparse: SparseCheckpointConfig, window: bool, saved: bool) -> str:
    """From what a stopped job goes on, for people.

    Args:
        window: whether slots are kept, and hold a window.
        saved: whether `--save` has a dense checkpoint of the last step.
    """
    save = job.config.save
    if window:
        fresh = " without --sparse-ckpt-fresh" if sparse.fresh else ""
        return f"slots are kept in {sparse.job_directory}; the same command{fresh} goes on from there"
    if not saved:
        return "before the first window was complete; the same command starts where this one did"
    if loads_what_it_saves(job):
        return f"a dense checkpoint is in {save}; the same command goes on from there"
    return f"a dense checkpoint is in {save}; add --load {save} to go on from there"
