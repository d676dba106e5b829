import subprocess
import sys

import pytest

PROGRAM = """
import sys
import megatron.moevement.integration.preload
from megatron.moevement.integration import cpu_backend
import torch
assert not torch.cuda.is_initialized()
print(cpu_backend.is_installed(), "megatron.moevement.integration.program" in sys.modules)
"""


@pytest.mark.parametrize("cpu", [True, False])
def test_the_cpu_backend_stands_before_core_if_the_script_asks_for_it(cpu: bool) -> None:
    command = [sys.executable, "-c", PROGRAM, *(["--use-cpu"] if cpu else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [str(cpu), "True"], done.stderr
