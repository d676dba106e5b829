"""Tests of the model: its configuration, its classes, its dtypes."""

from collections.abc import Callable

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron.moevement.integration import model
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.training_config import TrainingConfig


def test_flags_reach_the_model(make_config: Callable[..., TrainingConfig]) -> None:
    built = model.transformer_config(make_config(swiglu=True, normalization="RMSNorm", moe_router_dtype="fp32"))
    assert built.gated_linear_unit
    assert built.activation_func is torch.nn.functional.silu
    assert built.normalization == "RMSNorm"
    assert built.moe_router_dtype == "fp32"
    assert built.params_dtype == torch.bfloat16
    assert not built.overlap_p2p_comm


def test_interleaved_chunks_exchange_operation_by_operation(make_config: Callable[..., TrainingConfig]) -> None:
    plain = model.transformer_config(make_config(num_layers=4, world_size=2, pipeline_model_parallel_size=2))
    chunked = model.transformer_config(
        make_config(num_layers=4, world_size=2, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
    )
    assert plain.batch_p2p_comm
    assert plain.deallocate_pipeline_outputs
    assert not chunked.batch_p2p_comm
    assert not chunked.deallocate_pipeline_outputs


def test_experts_are_sequential_and_weights_16_bit(build: Callable[..., TrainingJob]) -> None:
    chunk = build().chunks[0]
    kinds = [type(module) for module in chunk.modules()]
    assert kinds.count(SequentialMLP) == 2
    assert {parameter.dtype for parameter in chunk.parameters()} == {torch.bfloat16}


def test_dtypes(make_config: Callable[..., TrainingConfig]) -> None:
    assert model.compute_dtype(make_config()) == torch.bfloat16
    assert model.compute_dtype(make_config(bf16=False, fp16=True)) == torch.float16


def test_the_router_finds_its_name() -> None:
    model.bind_missing_names()
    assert hasattr(moe_utils, "te_general_gemm")
