"""Counts the tokens routed to each expert, at the router itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.router import TopKRouter


class RouterPopularity:
    """Forward hooks on every router of this rank.

    A router sees all experts of its layer, so counts summed over the tensor- and data-parallel ranks of the stage (the
    expert-parallel ranks among them) are those of the whole batch. Forward passes without gradients are left out:
    under full recomputation every pass runs twice, once without.
    """

    def __init__(self, chunks: list[DistributedDataParallel]) -> None:
        self._counts: dict[int, torch.Tensor] = {}
        for chunk in chunks:
            for router in (module for module in chunk.modules() if isinstance(module, TopKRouter)):
                router.register_forward_hook(self._count)

    def _count(self, router: Any, _inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        if not torch.is_grad_enabled() or not router.training:
            return
        routed = outputs[1].sum(dim=0, dtype=torch.int64)
        layer = router.layer_number - 1
        self._counts[layer] = self._counts[layer] + routed if layer in self._counts else routed

    def take(self) -> dict[tuple[int, int], int]:
        """Tokens by (layer, expert) since the last call, summed over the stage; starts again from 0. Collective."""
        if not self._counts:
            return {}
        layers = sorted(self._counts)
        totals = torch.stack([self._counts[layer] for layer in layers])
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(totals, group=group)
        self._counts.clear()
        rows = totals.tolist()
        return {(layer, expert): n for layer, row in zip(layers, rows, strict=True) for expert, n in enumerate(row)}
