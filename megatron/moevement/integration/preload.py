"""Imports what a training process needs, for processes that wait to take over a rank. Nothing here calls CUDA.

The CPU backend stands before megatron.core, which fuses functions when it is imported, so the waiting process looks at
the arguments that it will be started with.
"""

import sys

from megatron.moevement.integration import cpu_backend, quiet

quiet.quiet_core_warnings()
if "--use-cpu" in sys.argv:
    cpu_backend.hide_cuda()
    cpu_backend.install()

from megatron.moevement.integration import program  # noqa: E402

__all__ = ["program"]
