"""Tests of the warning filters."""

import warnings

from megatron.moevement.integration import quiet


def test_only_known_noise_is_silenced() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet.quiet_core_warnings()
        warnings.warn_explicit("no package", UserWarning, "f", 1, module="megatron.core.optimizer")
        warnings.warn_explicit("old name", FutureWarning, "f", 1, module="torch.distributed.c10d_logger")
        warnings.warn_explicit(
            "load", FutureWarning, "f", 1, module="megatron.core.dist_checkpointing.strategies.torch"
        )
        warnings.warn_explicit("ours", UserWarning, "f", 1, module="megatron.moevement.manager")
    assert [str(entry.message) for entry in caught] == ["ours"]
