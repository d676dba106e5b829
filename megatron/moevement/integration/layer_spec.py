"""The transformer layers: megatron.core's local modules, with normalisation that works under sequence parallelism.

Core's own local normalisation refuses sequence parallelism, and core's MoE layer requires it under tensor
parallelism. A normalisation acts on each token alone, so it needs no change but a mark on its parameters: core then
sums their gradients over the tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron.moevement.training_config import TrainingConfig

_NORMS: dict[str, Callable[..., torch.nn.Module]] = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class Norm:
    """Builds torch's LayerNorm or RMSNorm, by the name in the configuration, with marked parameters."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> torch.nn.Module:  # type: ignore[misc]
        norm = _NORMS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def block_spec(config: TrainingConfig, model_config: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers that one model chunk of this rank consists of.

    Args:
        config: the training configuration.
        model_config: core's TransformerConfig.
        vp_stage: number of the chunk in the interleaved schedule, None without one.
    """
    layer = get_gpt_layer_local_spec(num_experts=config.num_experts, moe_grouped_gemm=False)
    layer.submodules.input_layernorm = Norm
    layer.submodules.pre_mlp_layernorm = Norm
    layers = get_num_layers_to_build(model_config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm)
