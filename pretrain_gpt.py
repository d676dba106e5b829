"""Train a Mixture-of-Experts GPT with sparse checkpoints: parse, build, train. Start it with torchrun."""

from __future__ import annotations

import sys

from megatron.moevement import arguments
from megatron.moevement.config import SparseCheckpointConfig, add_sparse_checkpoint_flags, config_from_namespace
from megatron.moevement.errors import MoevementError
from megatron.moevement.training_config import TrainingConfig


def main() -> int:
    """Run the training script; the exit status is 0 after training, 2 after a refusal."""
    config, namespace = arguments.parse(extra=add_sparse_checkpoint_flags)
    try:
        run(config, config_from_namespace(namespace))
    except MoevementError as error:
        arguments.refuse(arguments.PROGRAM, error)
    return 0


def run(config: TrainingConfig, sparse: SparseCheckpointConfig) -> None:
    """Build everything and train.

    Raises:
        MoevementError: something that the user can mend; the message names the flag or file.
    """
    # The CPU backend stands before megatron.core: core fuses functions when it is imported.
    from megatron.moevement.integration import cpu_backend, quiet

    quiet.quiet_core_warnings()
    if config.use_cpu:
        cpu_backend.hide_cuda()
        cpu_backend.install()

    from megatron.moevement.integration import program

    program.run(config, sparse)


if __name__ == "__main__":
    sys.exit(main())
