"""What an idle worker process imports before it knows its rank; it looks at the script's arguments in `sys.argv`."""

import importlib
import sys
from typing import Any

from megatron.moevement.integration import cpu_backend, quiet

quiet.quiet_core_warnings()
if "--use-cpu" in sys.argv:
    # The CPU backend stands before megatron.core: core fuses functions when it is imported.
    cpu_backend.hide_cuda()
    cpu_backend.install()
importlib.import_module("megatron.moevement.integration.program")
# The table that the first call of a compiled function makes, while all others would wait for the replacement. torch
# drops it whenever groups are made, in case it is older than torch.distributed; this one isn't, so it stays.
_rules: Any = importlib.import_module("torch._dynamo.trace_rules")
_rules.clear_lru_cache()
_rules.get_torch_obj_rule_map()
_rules.clear_lru_cache = lambda: None
