"""What is refused before anything is built, and what to do instead.

`UNSUPPORTED` names flags that Megatron-LM knows and this project does not; `check` finds combinations
that cannot work. Both raise `UsageError`, one line that names the flag and the remedy.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping

from megatron.moevement.errors import ConfigError
from megatron.moevement.training_config import TrainingConfig, flag_name


class UsageError(ConfigError):
    """The command line (or what it points at) cannot be used; the message is `--flag ...: remedy`."""

    def __init__(self, flag: str, problem: str, remedy: str) -> None:
        super().__init__(f"{flag} {problem}: {remedy}")
        self.flag = flag


_NO_ENGINE = "remove the flag; layers come from megatron.core's local implementation"
_NO_FP8 = "remove the flag and train with --bf16"
_NO_FSDP = "remove the flag and use --use-distributed-optimizer"
_SEQUENTIAL = "remove the flag; experts run as SequentialMLP"
_NO_ALTERNATIVE = "remove the flag; there is no replacement yet"

UNSUPPORTED: Mapping[str, str] = {
    "--moe-grouped-gemm": _SEQUENTIAL,
    "--moe-use-legacy-grouped-gemm": _SEQUENTIAL,
    "--moe-permute-fusion": "remove the flag; the fused permutation needs TransformerEngine",
    "--moe-enable-deepep": "use --moe-token-dispatcher-type alltoall",
    "--moe-flex-dispatcher-backend": "use --moe-token-dispatcher-type alltoall",
    "--moe-shared-expert-intermediate-size": _NO_ALTERNATIVE,
    "--moe-shared-expert-overlap": _NO_ALTERNATIVE,
    "--moe-expert-capacity-factor": "remove the flag; tokens are never dropped",
    "--moe-pad-expert-input-to-capacity": "remove the flag; tokens are never dropped",
    "--moe-layer-freq": "remove the flag; every layer is a mixture of experts",
    "--moe-layer-recompute": "use --recompute-granularity full",
    "--moe-input-jitter-eps": _NO_ALTERNATIVE,
    "--fp8-format": _NO_FP8,
    "--fp8-recipe": _NO_FP8,
    "--fp8-param-gather": _NO_FP8,
    "--fp4-format": _NO_FP8,
    "--use-megatron-fsdp": _NO_FSDP,
    "--use-custom-fsdp": _NO_FSDP,
    "--use-torch-fsdp2": _NO_FSDP,
    "--data-parallel-sharding-strategy": _NO_FSDP,
    "--num-distributed-optimizer-instances": _NO_ALTERNATIVE,
    "--use-precision-aware-optimizer": "remove the flag; moments and master weights are FP32",
    "--optimizer-cpu-offload": "remove the flag; sparse checkpoints already keep copies in host memory",
    "--optimizer": "remove the flag; the optimizer is AdamW",
    "--enable-cuda-graph": _NO_ALTERNATIVE,
    "--cuda-graph-impl": _NO_ALTERNATIVE,
    "--external-cuda-graph": _NO_ALTERNATIVE,
    "--use-flash-attn": _NO_ENGINE,
    "--attention-backend": _NO_ENGINE,
    "--use-mcore-models": "remove the flag; models always come from megatron.core",
    "--tp-comm-overlap": _NO_ENGINE,
    "--multi-latent-attention": _NO_ALTERNATIVE,
    "--mtp-num-layers": _NO_ALTERNATIVE,
    "--group-query-attention": "remove the flag; every head has its own keys and values",
    "--num-query-groups": "remove the flag; every head has its own keys and values",
    "--decoder-first-pipeline-num-layers": "choose a --num-layers that divides evenly over the stages",
    "--decoder-last-pipeline-num-layers": "choose a --num-layers that divides evenly over the stages",
    "--pipeline-model-parallel-layout": "choose a --num-layers that divides evenly over the stages",
    "--num-virtual-stages-per-pipeline-rank": "use --num-layers-per-virtual-pipeline-stage",
    "--rampup-batch-size": "remove the flag; the batch size is constant",
    "--train-samples": "use --train-iters",
    "--lr-decay-samples": "use --lr-decay-iters",
    "--lr-warmup-samples": "use --lr-warmup-iters",
    "--lr-warmup-fraction": "use --lr-warmup-iters",
    "--mock-data": "prepare real text with scripts/prepare_data.py --python-stdlib",
    "--calculate-per-token-loss": _NO_ALTERNATIVE,
    "--eval-iters": "remove the flag; validation is not run during training",
    "--eval-interval": "remove the flag; validation is not run during training",
    "--async-save": "remove the flag; use the --sparse-ckpt flags",
    "--ckpt-format": "remove the flag; dense checkpoints are torch_dist",
    "--use-dist-ckpt": "remove the flag; dense checkpoints are torch_dist",
}


def check_supported(flag: str) -> None:
    """Refuse a flag that Megatron-LM has and this project has not.

    Raises:
        UsageError: with the remedy.
    """
    if flag in UNSUPPORTED:
        raise UsageError(flag, "is not supported", UNSUPPORTED[flag])


def check(config: TrainingConfig) -> None:
    """Refuse combinations of flags that cannot work together.

    Raises:
        UsageError: for the first one found, naming the flag to change and how.
    """
    for rules in _RULES:
        for error in rules(config):
            raise error


def check_outputs(config: TrainingConfig) -> None:
    """Refuse output folders that can't be made or written, before an hour of training would be lost on them.

    Raises:
        UsageError: for the first one found.
    """
    digests = None if config.state_digest is None else os.path.dirname(os.path.abspath(config.state_digest))
    folders = {"--save": config.save, "--tensorboard-dir": config.tensorboard_dir, "--state-digest": digests}
    for flag, folder in folders.items():
        try:
            if folder is not None:
                os.makedirs(folder, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UsageError(flag, f"{folder}: {error.strerror}", "name a folder that can be written") from error


def _precision(c: TrainingConfig) -> Iterator[UsageError]:
    if c.bf16 == c.fp16:
        found = "and --fp16 were both given" if c.bf16 else "or --fp16 is required"
        yield UsageError("--bf16", found, "give exactly one of them")
    scaling = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
    for name in scaling if not c.fp16 else ():
        if _given(c, name):
            yield UsageError(flag_name(name), "has no effect under --bf16", "remove it or use --fp16")
    if c.min_loss_scale > c.initial_loss_scale:
        yield UsageError("--min-loss-scale", "is above --initial-loss-scale", "lower it")
    if c.transformer_impl != "local":
        yield UsageError("--transformer-impl", f"{c.transformer_impl} is not supported", "use local")


def _given(c: TrainingConfig, name: str) -> bool:
    """Whether the flag of `name` changes anything: its value isn't the default."""
    return bool(getattr(c, name) != next(f.default for f in dataclasses.fields(c) if f.name == name))


def _layout(c: TrainingConfig) -> Iterator[UsageError]:
    world, tensor, pipeline = c.world_size, c.tensor_model_parallel_size, c.pipeline_model_parallel_size
    if c.context_parallel_size > 1:
        yield UsageError("--context-parallel-size", "above 1 is not supported", "remove it or shorten --seq-length")
    expert_group = c.expert_tensor_size * c.expert_model_parallel_size * pipeline
    group = math.lcm(tensor * pipeline, expert_group)
    remedy = f"start a multiple of {group} processes (--nproc-per-node), which all parallel sizes divide, or change one"
    if world % (tensor * pipeline):
        yield UsageError(
            "--pipeline-model-parallel-size",
            f"{pipeline} x --tensor-model-parallel-size {tensor} does not divide {world} processes",
            remedy,
        )
    if world % expert_group:
        yield UsageError(
            "--expert-model-parallel-size",
            f"{c.expert_model_parallel_size} x expert tensor size {c.expert_tensor_size} x {pipeline} stages does not"
            f" divide {world} processes",
            remedy,
        )
    if c.num_layers % pipeline:
        yield UsageError(
            "--num-layers", f"{c.num_layers} does not divide over {pipeline} stages", f"use a multiple of {pipeline}"
        )
    if tensor > 1 and not c.sequence_parallel:
        yield UsageError(
            "--tensor-model-parallel-size", "above 1 with experts needs sequence parallelism", "add --sequence-parallel"
        )
    if c.sequence_parallel and tensor == 1:
        yield UsageError("--sequence-parallel", "needs --tensor-model-parallel-size above 1", "remove it")
    if c.sequence_parallel and c.seq_length % tensor:
        yield UsageError(
            "--seq-length", f"{c.seq_length} does not divide over {tensor} ranks", f"use a multiple of {tensor}"
        )
    if not c.disable_bias_linear and (c.expert_tensor_size > 1 or c.expert_model_parallel_size == 1):
        # With one expert-parallel rank megatron.core 0.16.1 adds the bias in place to a view, which autograd forbids.
        yield UsageError(
            "--disable-bias-linear",
            "is missing: experts with biases need --expert-model-parallel-size above 1 and expert tensor size 1",
            "add it",
        )


def _gloo(c: TrainingConfig) -> Iterator[UsageError]:
    if c.backend == "gloo" and c.expert_tensor_size > 1 and c.moe_token_dispatcher_type == "alltoall":
        yield UsageError(
            "--expert-tensor-parallel-size",
            f"{c.expert_tensor_size} needs gathers of unequal parts with the alltoall dispatcher, which gloo has not",
            "set it to 1",
        )


def _interleaving(c: TrainingConfig) -> Iterator[UsageError]:
    per_chunk, pipeline = c.num_layers_per_virtual_pipeline_stage, c.pipeline_model_parallel_size
    if per_chunk is None:
        return
    name = "--num-layers-per-virtual-pipeline-stage"
    if pipeline == 1:
        yield UsageError(name, "needs --pipeline-model-parallel-size above 1", "remove it or add stages")
    per_stage = c.num_layers // pipeline
    if per_stage % per_chunk:
        yield UsageError(name, f"{per_chunk} does not divide the {per_stage} layers of a stage", "choose a divisor")
    if per_stage == per_chunk:
        yield UsageError(
            name, f"{per_chunk} leaves one chunk per stage, which is not interleaved", "remove it or lower it"
        )


def _model(c: TrainingConfig) -> Iterator[UsageError]:
    if c.hidden_size % c.num_attention_heads:
        yield UsageError(
            "--hidden-size",
            f"{c.hidden_size} does not divide over {c.num_attention_heads} heads",
            f"use a multiple of {c.num_attention_heads}",
        )
    if c.num_attention_heads % c.tensor_model_parallel_size:
        yield UsageError(
            "--num-attention-heads",
            f"{c.num_attention_heads} does not divide over {c.tensor_model_parallel_size} tensor-parallel ranks",
            f"use a multiple of {c.tensor_model_parallel_size}",
        )
    if c.max_position_embeddings is not None and c.max_position_embeddings < c.seq_length:
        yield UsageError("--max-position-embeddings", f"is below --seq-length {c.seq_length}", "raise it or remove it")
    if c.position_embedding_type == "rope" and (c.hidden_size // c.num_attention_heads) % 2:
        yield UsageError("--position-embedding-type", "rope needs an even head size", "change --num-attention-heads")
    widths = [("--ffn-hidden-size", c.ffn_hidden_size), ("--moe-ffn-hidden-size", c.moe_ffn_hidden_size)]
    for name, width in widths:
        if width is not None and width % max(c.tensor_model_parallel_size, c.expert_tensor_size):
            yield UsageError(name, f"{width} does not divide over the tensor-parallel ranks", "use a multiple")


def _experts(c: TrainingConfig) -> Iterator[UsageError]:
    if c.num_experts % c.expert_model_parallel_size:
        yield UsageError(
            "--num-experts",
            f"{c.num_experts} does not divide over {c.expert_model_parallel_size} expert-parallel ranks",
            f"use a multiple of {c.expert_model_parallel_size}",
        )
    if c.moe_router_topk > c.num_experts:
        yield UsageError("--moe-router-topk", f"{c.moe_router_topk} is above --num-experts {c.num_experts}", "lower it")
    if c.moe_router_topk == 1 and c.moe_router_score_function == "softmax" and not c.moe_router_pre_softmax:
        yield UsageError("--moe-router-topk", "1 with softmax scores has no gradient", "add --moe-router-pre-softmax")
    if c.moe_router_enable_expert_bias and c.moe_router_score_function != "sigmoid":
        yield UsageError(
            "--moe-router-enable-expert-bias", "needs sigmoid scores", "add --moe-router-score-function sigmoid"
        )
    if _given(c, "moe_router_bias_update_rate") and not c.moe_router_enable_expert_bias:
        yield UsageError(
            "--moe-router-bias-update-rate",
            "has no effect without --moe-router-enable-expert-bias",
            "remove it or add that",
        )
    if c.moe_router_pre_softmax and c.moe_router_score_function != "softmax":
        yield UsageError("--moe-router-pre-softmax", "has no effect on sigmoid scores", "remove it")
    if c.moe_router_load_balancing_type == "none" and c.moe_aux_loss_coeff > 0:
        yield UsageError(
            "--moe-aux-loss-coeff", "has no effect with --moe-router-load-balancing-type none", "remove one of them"
        )


def _batches(c: TrainingConfig) -> Iterator[UsageError]:
    share = c.micro_batch_size * c.data_parallel_size
    if c.samples_per_iteration % share:
        yield UsageError(
            "--global-batch-size",
            f"{c.global_batch_size} does not divide by --micro-batch-size {c.micro_batch_size} x"
            f" {c.data_parallel_size} data-parallel ranks",
            f"use a multiple of {share}",
        )
    if c.num_layers_per_virtual_pipeline_stage is not None and c.num_micro_batches % c.pipeline_model_parallel_size:
        yield UsageError(
            "--global-batch-size",
            f"gives {c.num_micro_batches} micro-batches, which the interleaved schedule cannot divide over"
            f" {c.pipeline_model_parallel_size} stages",
            f"use a multiple of {share * c.pipeline_model_parallel_size}",
        )
    if not c.data_path:
        yield UsageError("--data-path", "is required", "prepare data with scripts/prepare_data.py")
    if c.tokenizer_type == "NullTokenizer" and c.vocab_size is None:
        yield UsageError("--vocab-size", "is required with --tokenizer-type NullTokenizer", "add it")
    if c.tokenizer_type == "HuggingFaceTokenizer" and c.tokenizer_model is None:
        yield UsageError("--tokenizer-model", "is required with --tokenizer-type HuggingFaceTokenizer", "add it")
    if c.tokenizer_type != "HuggingFaceTokenizer" and c.tokenizer_model is not None:
        yield UsageError("--tokenizer-model", f"has no effect with --tokenizer-type {c.tokenizer_type}", "remove it")
    try:
        shares = [float(part) for part in c.split.split(",")]
    except ValueError:
        shares = []
    usable = 1 <= len(shares) <= 3 and all(0 <= share < float("inf") for share in shares)
    if not usable or not shares[0]:
        yield UsageError("--split", f"{c.split!r} leaves no training documents", "use for instance 98,1,1")


def _schedule(c: TrainingConfig) -> Iterator[UsageError]:
    decay = c.lr_decay_iters or c.train_iters
    if c.lr_warmup_iters >= decay:
        yield UsageError(
            "--lr-warmup-iters", f"{c.lr_warmup_iters} is not below the {decay} iterations of decay", "lower it"
        )
    if c.min_lr > c.lr:
        yield UsageError("--min-lr", f"{c.min_lr} is above --lr {c.lr}", "lower it")
    if c.lr_decay_style == "WSD":
        if c.lr_wsd_decay_iters is None:
            yield UsageError("--lr-wsd-decay-iters", "is required with --lr-decay-style WSD", "add it")
        elif c.lr_wsd_decay_iters + c.lr_warmup_iters > decay:
            yield UsageError("--lr-wsd-decay-iters", f"and warm-up exceed {decay} iterations", "lower one of them")
    elif c.lr_wsd_decay_iters is not None:
        yield UsageError("--lr-wsd-decay-iters", "needs --lr-decay-style WSD", "remove it or change the style")
    if c.lr_decay_style != "WSD" and _given(c, "lr_wsd_decay_style"):
        yield UsageError("--lr-wsd-decay-style", "needs --lr-decay-style WSD", "remove it or change the style")
    for name, beta in (("--adam-beta1", c.adam_beta1), ("--adam-beta2", c.adam_beta2)):
        if beta >= 1.0:
            yield UsageError(name, "must be below 1", "lower it")


def _overlap_and_memory(c: TrainingConfig) -> Iterator[UsageError]:
    if c.overlap_param_gather and not c.use_distributed_optimizer:
        yield UsageError("--overlap-param-gather", "needs the distributed optimizer", "add --use-distributed-optimizer")
    if c.overlap_param_gather and not c.overlap_grad_reduce:
        yield UsageError("--overlap-param-gather", "needs overlapped gradients", "add --overlap-grad-reduce")
    if c.ddp_bucket_size is not None and not c.overlap_grad_reduce:
        yield UsageError("--ddp-bucket-size", "has no effect without --overlap-grad-reduce", "remove it or add that")
    granularity, method, layers = c.recompute_granularity, c.recompute_method, c.recompute_num_layers
    if granularity == "full" and method is None:
        yield UsageError("--recompute-granularity", "full needs a method", "add --recompute-method uniform")
    if granularity == "full" and layers is None:
        yield UsageError("--recompute-granularity", "full needs a unit", "add --recompute-num-layers 1")
    if granularity != "full" and (method is not None or layers is not None):
        name = "--recompute-method" if method is not None else "--recompute-num-layers"
        yield UsageError(name, "needs --recompute-granularity full", "add it or remove this flag")
    per_stage = c.num_layers // c.pipeline_model_parallel_size
    if layers is not None and layers > per_stage:
        yield UsageError("--recompute-num-layers", f"{layers} is above the {per_stage} layers of a stage", "lower it")


def _processes(c: TrainingConfig) -> Iterator[UsageError]:
    if c.use_cpu and c.backend == "nccl":
        yield UsageError("--distributed-backend", "nccl cannot run with --use-cpu", "use gloo")
    if c.save_interval is not None and c.save is None:
        yield UsageError("--save-interval", "needs a folder to save to", "add --save")


_RULES: tuple[Callable[[TrainingConfig], Iterator[UsageError]], ...] = (
    _precision,
    _layout,
    _gloo,
    _interleaving,
    _model,
    _experts,
    _batches,
    _schedule,
    _overlap_and_memory,
    _processes,
)
