"""`python -m megatron.moevement.agent`: see docs/agent.md."""

import sys
from collections.abc import Sequence

from megatron.moevement.agent.options import parse


def main(argv: Sequence[str]) -> int:
    """Runs the agent; its exit status."""
    options = parse(argv)
    # After the command line is found good: a mistake costs no import of torch.
    from megatron.moevement.agent.run import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
