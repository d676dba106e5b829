"""The model: core's GPTModel in chunks, in 16-bit weights, wrapped for data parallelism."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal, scaled_init_method_normal

from megatron.moevement.integration.layer_spec import block_spec
from megatron.moevement.training_config import TrainingConfig


def compute_dtype(config: TrainingConfig) -> torch.dtype:
    """The dtype of weights and activations."""
    return torch.bfloat16 if config.bf16 else torch.float16


def transformer_config(config: TrainingConfig) -> TransformerConfig:
    """Core's configuration of the model. Fused kernels that need other packages or torch.compile are off."""
    dtype = compute_dtype(config)
    activation: Callable[[torch.Tensor], torch.Tensor]
    activation = torch.nn.functional.silu if config.swiglu else torch.nn.functional.gelu
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.ffn_hidden_size,
        hidden_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        add_bias_linear=not config.disable_bias_linear,
        gated_linear_unit=config.swiglu,
        activation_func=activation,
        normalization=config.normalization,
        init_method=init_method_normal(config.init_method_std),
        output_layer_init_method=scaled_init_method_normal(config.init_method_std, config.num_layers),
        num_moe_experts=config.num_experts,
        moe_ffn_hidden_size=config.moe_ffn_hidden_size or config.ffn_hidden_size or 4 * config.hidden_size,
        moe_router_topk=config.moe_router_topk,
        moe_router_pre_softmax=config.moe_router_pre_softmax,
        moe_router_load_balancing_type=config.moe_router_load_balancing_type,
        moe_aux_loss_coeff=config.moe_aux_loss_coeff,
        moe_z_loss_coeff=config.moe_z_loss_coeff,
        moe_router_score_function=config.moe_router_score_function,
        moe_router_enable_expert_bias=config.moe_router_enable_expert_bias,
        moe_router_bias_update_rate=config.moe_router_bias_update_rate,
        moe_router_dtype=config.moe_router_dtype,
        moe_token_dispatcher_type=config.moe_token_dispatcher_type,
        moe_grouped_gemm=False,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        sequence_parallel=config.sequence_parallel,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_size,
        bf16=config.bf16,
        fp16=config.fp16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        deterministic_mode=config.deterministic_mode,
        transformer_impl="local",
        recompute_granularity=config.recompute_granularity,
        recompute_method=config.recompute_method,
        recompute_num_layers=config.recompute_num_layers,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        # Under the interleaved schedule of two stages both neighbours are the same rank, and a batch of operations
        # would match an activation with a gradient; operations posted one by one are matched by order and group.
        batch_p2p_comm=config.virtual_pipeline_size is None,
        # Exchanges are waited for, not overlapped: their order, and with it the result, is the same in every run.
        overlap_p2p_comm=False,
        # Under the interleaved schedule an output may still be in flight when its memory would be given up.
        deallocate_pipeline_outputs=config.virtual_pipeline_size is None,
    )


def bind_missing_names() -> None:
    """Bind the name that core's router reads but imports only with TransformerEngine.

    None is the value that core itself gives it elsewhere when TransformerEngine is missing; without it the first
    router call raises NameError, on any device.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def build_chunks(
    config: TrainingConfig, model_config: TransformerConfig, padded_vocab_size: int, device: torch.device
) -> list[DistributedDataParallel]:
    """The model chunks of this rank, initialised, in 16 bits, wrapped for data parallelism.

    Data-parallel copies start equal. The gradient hooks that the schedules call are set in `model_config`.
    """
    bind_missing_names()
    stages = [None] if config.virtual_pipeline_size is None else list(range(config.virtual_pipeline_size))
    bare = [_bare_chunk(config, model_config, padded_vocab_size, stage) for stage in stages]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.bf16 or config.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        use_distributed_optimizer=config.use_distributed_optimizer,
        bucket_size=_bucket_size(config),
    )
    chunks = [
        DistributedDataParallel(
            config=model_config,
            ddp_config=ddp_config,
            module=Float16Module(model_config, chunk.to(device)),
            # Megatron gives only the first chunk buckets: the others' gradients are needed much later.
            disable_bucketing=position > 0,
        )
        for position, chunk in enumerate(bare)
    ]
    for chunk in chunks:
        chunk.broadcast_params()
    return chunks


def _bare_chunk(
    config: TrainingConfig, model_config: TransformerConfig, padded_vocab_size: int, vp_stage: int | None
) -> GPTModel:
    chunk = GPTModel(
        config=model_config,
        transformer_layer_spec=block_spec(config, model_config, vp_stage),
        vocab_size=padded_vocab_size,
        max_sequence_length=config.max_position_embeddings or config.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=not config.untie_embeddings_and_output_weights,
        position_embedding_type=config.position_embedding_type,
        vp_stage=vp_stage,
    )
    chunk.model_type = ModelType.encoder_or_decoder
    return chunk


def _bucket_size(config: TrainingConfig) -> int | None:
    """Parameters per gradient bucket: Megatron's default grows with the data-parallel size."""
    if not config.overlap_grad_reduce:
        return None
    return config.ddp_bucket_size or max(40_000_000, 1_000_000 * config.data_parallel_size)
