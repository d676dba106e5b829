"""Which dense checkpoint a job starts from, and which it must not find."""

from __future__ import annotations

import sys

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


def refuse_foreign_checkpoint(job: TrainingJob) -> None:
    """A run that starts from scratch must not find checkpoints of another run in `--save`. Collective.

    After a failure it would take the newest one there for its own.

    Raises:
        ConfigError: on every rank.
    """
    save = job.config.save
    step = None if save is None else find_dense(save).step
    if step is not None:
        raise ConfigError(
            f"--save {save} holds a checkpoint of step {step}: add --load {save} to go on from it, or choose another "
            "directory"
        )


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
