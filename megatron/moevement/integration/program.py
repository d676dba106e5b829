"""What `pretrain_gpt.py` does once the flags are parsed: build, recover, train, end cleanly."""

from __future__ import annotations

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.events import EventLog
from megatron.moevement.integration import distributed, state_digest, train_loop, training_log
from megatron.moevement.integration.attach import SparseHooks, build_manager
from megatron.moevement.integration.job import TrainingJob, build_job
from megatron.moevement.training_config import TrainingConfig


def run(config: TrainingConfig, sparse: SparseCheckpointConfig) -> None:
    """Trains, from where the job was before if it was stopped.

    Raises:
        ConfigError, StoreError: something that the user can mend; the message says what.
    """
    topology = distributed.start(config)
    job = build_job(config, topology)
    log = training_log.TrainingLog(config, topology.rank, train_loop.NoHooks())
    history = _train_sparse(job, sparse, log) if sparse.enabled else train_loop.train(job, log)
    log.close()
    if config.state_digest is not None:
        state_digest.write_state_digest(config.state_digest, job, history)
    distributed.stop()


def _train_sparse(
    job: TrainingJob, sparse: SparseCheckpointConfig, log: train_loop.Hooks
) -> list[train_loop.IterationOutcome]:
    events = EventLog(sparse.log_directory, job.topology.rank)
    manager, _ = build_manager(job, sparse, events)
    start = manager.start(None)
    if job.topology.rank == 0:
        print(f"start from {start.source} step {start.step} {start.conversion}", *start.reasons, sep="\n  ", flush=True)
    history = train_loop.train(job, SparseHooks(job, manager, log))
    manager.finish(durable=False)
    events.close()
    return history
