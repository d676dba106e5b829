"""pretrain_gpt.py as the agent's workers run it in tests: it notes its process, and has its faults in place.

The variable `MOEVEMENT_TEST_WORKER` holds JSON: `folder`, where every process of a rank writes a line, and `faults`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

SETTINGS = "MOEVEMENT_TEST_WORKER"


def main() -> int:
    """Runs the rank."""
    settings: dict[str, Any] = json.loads(os.environ[SETTINGS])
    rank, generation = os.environ["RANK"], os.environ["MOEVEMENT_GENERATION"]
    with (Path(settings["folder"]) / f"processes.{rank}").open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "generation": int(generation)}) + "\n")
    if settings["faults"]:
        # As pretrain_gpt.py does before it imports what faults change.
        from megatron.moevement.integration import preload  # noqa: F401
        from tests.support import faults

        faults.install(settings["faults"])
    import pretrain_gpt

    return pretrain_gpt.main()


if __name__ == "__main__":
    sys.exit(main())
