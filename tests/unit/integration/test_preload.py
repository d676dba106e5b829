"""Idle processes import everything before they know their rank, with the CPU backend where it is asked for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import json, sys
import megatron.moevement.integration.preload
import torch
from megatron.moevement.integration import cpu_backend
import torch.distributed as dist
from torch._dynamo import trace_rules
made = trace_rules.get_torch_obj_rule_map()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
complete = trace_rules.get_torch_obj_rule_map.__wrapped__() == made
print(complete and trace_rules.get_torch_obj_rule_map() is made, file=sys.stderr)
print(json.dumps([cpu_backend.is_installed(), torch.cuda.is_initialized(), "megatron.core" in sys.modules]))
"""


@pytest.mark.parametrize("flag", ["--use-cpu", "--bf16"])
def test_everything_is_imported_and_cuda_untouched(flag: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, flag], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.split()[-1] == "True", "the table of torch's compiler is complete, and stays"
    assert json.loads(done.stdout) == [flag == "--use-cpu", False, True]
