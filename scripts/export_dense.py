"""Make a dense checkpoint from the slots of a job that has stopped: convert them, write Megatron's torch_dist format.

    torchrun --nproc-per-node 4 scripts/export_dense.py --output DIR <the flags of the job's pretrain_gpt.py>

Run it with as many processes, on the same nodes, and with the same flags as the job. The slots stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron.moevement import arguments
from megatron.moevement.config import (
    MIB,
    SparseCheckpointConfig,
    add_sparse_checkpoint_flags,
    config_from_namespace,
)
from megatron.moevement.errors import ConfigError, MoevementError, StoreError
from megatron.moevement.events import EventLog
from megatron.moevement.training_config import TrainingConfig

PROGRAM = "export_dense.py"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that this script has in addition to those of training."""
    parser.prog = PROGRAM
    add_sparse_checkpoint_flags(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the dense checkpoint")


def main() -> int:
    """Run the export; the exit status is 0 once the checkpoint is durable, 1 if it failed, 2 after a refusal."""
    config, namespace = arguments.parse(extra=add_flags)
    try:
        return export(config, config_from_namespace(namespace), namespace.output)
    except (ConfigError, StoreError) as error:
        arguments.refuse(PROGRAM, error)


def export(config: TrainingConfig, sparse: SparseCheckpointConfig, output: Path) -> int:
    """Recover from the slots and save; collective over the ranks that torchrun started.

    Raises:
        ConfigError, StoreError: there is no usable window, or a flag doesn't fit it.
        MoevementError: the conversion failed.
    """
    # The CPU backend stands before megatron.core: core fuses functions when it is imported.
    from megatron.moevement.integration import cpu_backend, quiet

    quiet.quiet_core_warnings()
    if config.use_cpu:
        cpu_backend.hide_cuda()
        cpu_backend.install()
    from megatron.moevement.integration import attach, dense_checkpoint, distributed
    from megatron.moevement.integration.job import build_job

    topology = distributed.start(config)
    job = build_job(config, topology)
    # Without a forced window nothing is created where nothing is found: this script only reads.
    reading = dataclasses.replace(sparse, window=None, fresh=False, dry_run=False)
    manager, _ = attach.build_manager(job, reading, EventLog(sparse.log_directory, topology.rank))
    start = manager.start(None)
    if start.source != "slots":
        manager.finish(durable=False)
        why = "; ".join(start.reasons) or "no slots"
        raise ConfigError(
            f"--sparse-ckpt-dir {sparse.job_directory}: no window that all ranks can load ({why}); "
            "name the directory, job name and flags that the slots were written with"
        )
    result = dense_checkpoint.save_dense(job, output)
    manager.finish(durable=False)
    distributed.stop()
    if topology.rank == 0:
        if result.ok:
            size = result.nbytes / MIB
            print(f"{output}: step {result.step}, {size:.1f} MiB, written in {result.seconds:.1f} s", flush=True)
        else:
            print(f"{PROGRAM}: error: --output {output}: {result.error}", file=sys.stderr, flush=True)
    return 0 if result.ok else 1


def run() -> int:
    """`main`, with a conversion's failure in one line."""
    try:
        return main()
    except MoevementError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(run())
