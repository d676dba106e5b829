"""`python -m megatron.moevement.agent`: see docs/agent.md."""

import os
import sys
from collections.abc import Sequence

from megatron.moevement.agent.options import parse


def main(argv: Sequence[str]) -> int:
    """Runs the agent; its exit status."""
    options = parse(argv)
    # torch says with the C++ stack of a warning that a peer is gone, which here is said in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # After the command line is found good: a mistake costs no import of torch.
    from megatron.moevement.agent.run import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
