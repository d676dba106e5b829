"""`python -m megatron.moevement.agent`: see docs/agent.md."""

import sys

from megatron.moevement.agent.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
