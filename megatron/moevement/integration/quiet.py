"""Silences the warnings that megatron.core gives on every start without optional packages.

Call it before anything of megatron.core is imported: they are raised while its modules load.
"""

from __future__ import annotations

import warnings


def quiet_core_warnings() -> None:
    """Ignore megatron.core's notes about missing packages and torch's about functions that core still uses."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
    for caller in (r"torch\.distributed\.", r"megatron\.core\."):
        warnings.filterwarnings("ignore", category=FutureWarning, module=caller)
