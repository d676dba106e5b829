"""An idle worker process has its heap in memory, and nothing to look through, before it says that it is prepared.

Everything else is shown with real agents, in tests/distributed/test_agent.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.moevement.agent.channel import Channel

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import gc, json, resource, sys

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = faults()
for _ in range(2):
    blocks = [bytearray(b"x") * (2 << 20) for _ in range(50)]
    del blocks
print(json.dumps({"faults": faults() - before, "frozen": gc.get_freeze_count(), "arguments": sys.argv[1:]}))
"""
PAGES = 50 * (2 << 20) // os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("preload", ["json", ""])
def test_an_idle_process_has_the_pages_of_its_heap(tmp_path: Path, preload: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    channel, other = Channel.pair()
    words = ["-m", "megatron.moevement.agent.worker", str(other.fileno()), str(os.getpid()), "once", preload]
    command = [sys.executable, *words, str(script), "--flag"]
    with other:
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=(other.fileno(),), stdout=subprocess.PIPE)
    if preload:
        assert channel.receive() == ({"is": "prepared"}, [])
    channel.send({"environment": {}})
    output, _ = process.communicate(timeout=60)
    channel.close()
    found = json.loads(output)
    assert process.returncode == 0 and found["arguments"] == ["--flag"]
    if preload:
        assert found["faults"] < PAGES // 10 and found["frozen"] > 0
    else:
        # The control: a process that was not idle before takes every page, and gives some of them back in between.
        assert found["faults"] > PAGES and found["frozen"] == 0
