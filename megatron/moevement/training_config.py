"""Every training knob once: its Megatron flag name, unit, default and meaning.

`TrainingConfig` is the frozen value that the whole training base is built from. The command line is
generated from its fields (see `arguments.py`), so a field and its flag cannot drift apart: the field
`num_layers` is the flag `--num-layers`. This module imports neither torch nor megatron.core.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

FLAG = "flag"


@dataclasses.dataclass(frozen=True)
class FlagSpec:
    """How one field of `TrainingConfig` is read from the command line.

    `parse` turns one word into a value; None marks a switch without a value.
    """

    help: str
    parse: Callable[[str], Any] | None
    choices: tuple[str, ...] | None
    many: bool


def whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """A parser of integers not below `minimum` and not above `maximum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is below the minimum of {minimum}")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"{value} is above the maximum of {maximum}")
        return value

    return parse


def real_number(minimum: float = 0.0, maximum: float = float("inf"), above: bool = False) -> Callable[[str], float]:
    """A parser of finite floats in [minimum, maximum], or (minimum, maximum] where `above`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        in_range = minimum < value <= maximum if above else minimum <= value <= maximum
        if not in_range or value in (float("inf"), float("-inf")):
            left = "(" if above else "["
            raise argparse.ArgumentTypeError(f"{text} is outside {left}{minimum}, {maximum}]")
        return value

    return parse


count = whole_number(1)
size = whole_number(0)
# numpy's generators take 32 bits; stages and ranks add to the seed.
seed_number = whole_number(0, 2**31 - 1)
fraction = real_number(0.0, 1.0)


def flag(
    parse: Callable[[str], Any],
    help: str,
    default: Any = dataclasses.MISSING,
    choices: Sequence[str] | None = None,
    many: bool = False,
) -> Any:
    """A field that a flag with a value sets; without `default` the flag is required."""
    spec = FlagSpec(help=help, parse=parse, choices=tuple(choices) if choices else None, many=many)
    return dataclasses.field(default=default, metadata={FLAG: spec})


def switch(help: str) -> Any:
    """A boolean field, off by default, that a flag without a value turns on."""
    return dataclasses.field(default=False, metadata={FLAG: FlagSpec(help, None, None, False)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The whole training set-up, checked by `argument_checks.check` before anything is built.

    Sizes are in elements, batch sizes in samples (sequences), durations in iterations unless the name says
    otherwise. `world_size` is the number of processes and comes from the launcher, not from a flag.
    """

    world_size: int = 1

    # The model.
    num_layers: int = flag(count, "transformer layers")
    hidden_size: int = flag(count, "width of the residual stream")
    num_attention_heads: int = flag(count, "attention heads")
    ffn_hidden_size: int | None = flag(count, "width of a dense MLP; default 4 x hidden size", None)
    seq_length: int = flag(count, "tokens in a sample")
    max_position_embeddings: int | None = flag(count, "longest position; default the sequence length", None)
    position_embedding_type: str = flag(
        str, "how positions enter the model", "learned_absolute", choices=("learned_absolute", "rope")
    )
    untie_embeddings_and_output_weights: bool = switch("give the output layer its own weights")
    swiglu: bool = switch("gated linear units with SiLU instead of GELU")
    disable_bias_linear: bool = switch("no bias in linear layers")
    normalization: str = flag(str, "kind of layer normalisation", "LayerNorm", choices=("LayerNorm", "RMSNorm"))
    init_method_std: float = flag(real_number(above=True), "standard deviation of initial weights", 0.02)
    hidden_dropout: float = flag(fraction, "dropout after attention and MLP", 0.1)
    attention_dropout: float = flag(fraction, "dropout of attention weights", 0.1)
    transformer_impl: str = flag(
        str, "layer implementation; only local", "local", choices=("local", "transformer_engine")
    )

    # Mixture of experts.
    num_experts: int = flag(count, "experts in each layer")
    moe_ffn_hidden_size: int | None = flag(count, "width of one expert; default the FFN hidden size", None)
    moe_router_topk: int = flag(count, "experts that each token goes to", 2)
    moe_router_pre_softmax: bool = switch("softmax before the top-k selection")
    moe_router_load_balancing_type: str = flag(
        str,
        "how tokens are spread over experts",
        "aux_loss",
        choices=("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    )
    moe_aux_loss_coeff: float = flag(real_number(), "weight of the load-balancing loss", 0.0)
    moe_z_loss_coeff: float | None = flag(real_number(), "weight of the router z-loss; default off", None)
    moe_router_score_function: str = flag(str, "router score of an expert", "softmax", choices=("softmax", "sigmoid"))
    moe_router_enable_expert_bias: bool = switch("balance experts with a bias instead of a loss")
    moe_router_bias_update_rate: float = flag(real_number(), "change of the expert bias per iteration", 1e-3)
    moe_router_dtype: str | None = flag(str, "precision of the router", None, choices=("fp32", "fp64"))
    moe_token_dispatcher_type: str = flag(
        str, "how tokens travel to experts", "allgather", choices=("alltoall", "allgather")
    )

    # Parallelism.
    tensor_model_parallel_size: int = flag(count, "processes that share each layer's matrices", 1)
    sequence_parallel: bool = switch("split activations outside matrices along the sequence")
    pipeline_model_parallel_size: int = flag(count, "pipeline stages", 1)
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        count, "layers of a model chunk in the interleaved schedule; default not interleaved", None
    )
    expert_model_parallel_size: int = flag(count, "processes that share a layer's experts", 1)
    expert_tensor_parallel_size: int | None = flag(
        count, "processes that share one expert's matrices; default the tensor parallel size", None
    )
    context_parallel_size: int = flag(count, "only 1 is supported", 1)
    use_distributed_optimizer: bool = switch("each data-parallel rank owns a part of the optimizer state")
    overlap_grad_reduce: bool = switch("reduce gradients during the backward pass")
    overlap_param_gather: bool = switch("gather parameters during the next forward pass")
    ddp_bucket_size: int | None = flag(count, "parameters in a gradient bucket; default Megatron's", None)
    accumulate_allreduce_grads_in_fp32: bool = switch("FP32 gradients under --fp16 (always on under --bf16)")

    # Batches, iterations, learning rate.
    micro_batch_size: int = flag(count, "samples in a micro-batch")
    global_batch_size: int | None = flag(count, "samples in an iteration; default one micro-batch per rank", None)
    train_iters: int = flag(count, "iterations to train")
    exit_interval: int | None = flag(count, "stop after an iteration divisible by this", None)
    lr: float = flag(real_number(above=True), "peak learning rate")
    min_lr: float = flag(real_number(), "lowest learning rate after decay", 0.0)
    lr_decay_style: str = flag(
        str,
        "shape of the learning rate after warm-up",
        "linear",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int | None = flag(count, "iterations until the lowest rate; default all", None)
    lr_warmup_iters: int = flag(size, "iterations of linear warm-up", 0)
    lr_wsd_decay_iters: int | None = flag(count, "iterations of the final decay of WSD", None)
    lr_wsd_decay_style: str = flag(
        str, "shape of the final decay of WSD", "exponential", choices=("exponential", "linear", "cosine", "minus_sqrt")
    )
    weight_decay: float = flag(real_number(), "decoupled weight decay", 0.01)
    adam_beta1: float = flag(fraction, "decay of Adam's first moment", 0.9)
    adam_beta2: float = flag(fraction, "decay of Adam's second moment", 0.999)
    adam_eps: float = flag(real_number(above=True), "Adam's epsilon", 1e-8)
    clip_grad: float = flag(real_number(), "gradient norm to clip to; 0 turns clipping off", 1.0)

    # Precision.
    bf16: bool = switch("BF16 weights and activations, FP32 master weights")
    fp16: bool = switch("FP16 weights and activations, FP32 master weights, loss scaling")
    loss_scale: float | None = flag(real_number(above=True), "fixed FP16 loss scale; default dynamic", None)
    initial_loss_scale: float = flag(real_number(above=True), "first dynamic loss scale", 2.0**32)
    min_loss_scale: float = flag(real_number(above=True), "lowest dynamic loss scale", 1.0)
    loss_scale_window: int = flag(count, "clean iterations before the loss scale doubles", 1000)
    hysteresis: int = flag(count, "overflows before the loss scale halves", 2)

    # Memory.
    recompute_granularity: str | None = flag(
        str, "recompute activations in the backward pass", None, choices=("full", "selective")
    )
    recompute_method: str | None = flag(
        str, "which layers full recomputation takes", None, choices=("uniform", "block")
    )
    recompute_num_layers: int | None = flag(count, "layers of a recomputed unit", None)

    # Data.
    data_path: tuple[str, ...] = flag(
        str, "prefixes of .bin/.idx files, optionally each after its weight", (), many=True
    )
    split: str = flag(str, "shares of training, validation and test documents", "100,0,0")
    data_cache_path: str | None = flag(str, "folder of the index caches; default beside the data", None)
    tokenizer_type: str = flag(
        str,
        "tokenizer that the data was prepared with",
        "ByteLevelTokenizer",
        choices=("ByteLevelTokenizer", "NullTokenizer", "HuggingFaceTokenizer"),
    )
    tokenizer_model: str | None = flag(str, "name or folder of a Hugging Face tokenizer", None)
    vocab_size: int | None = flag(count, "tokens without padding; default the tokenizer's", None)
    make_vocab_size_divisible_by: int = flag(count, "pad the vocabulary to a multiple of this", 128)

    # Checkpoints, output.
    save: str | None = flag(str, "folder that dense checkpoints are written to", None)
    load: str | None = flag(str, "folder that a dense checkpoint is read from", None)
    save_interval: int | None = flag(count, "iterations between dense checkpoints", None)
    tensorboard_dir: str | None = flag(str, "folder of TensorBoard scalars", None)
    log_interval: int = flag(count, "iterations between log lines", 1)
    state_digest: str | None = flag(
        str,
        "at the end, write digests of the whole training state, losses and norms to FILE.rank00000.json and so on; a "
        "process that took over has those of the iterations that it ran or was told of",
        None,
    )

    # Processes.
    seed: int = flag(seed_number, "seed of weights, dropout and data order", 1234)
    distributed_backend: str | None = flag(
        str, "collectives; default nccl, with --use-cpu gloo", None, choices=("nccl", "gloo")
    )
    distributed_timeout_minutes: int = flag(count, "longest wait of a collective, minutes", 10)
    deterministic_mode: bool = switch("bitwise repeatable kernels only")
    use_cpu: bool = switch("train on the CPU (the CPU backend is never chosen silently)")

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the non-expert parameters."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Copies of the non-expert parameters."""
        return self.world_size // self.model_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Processes that share one expert's matrices, default resolved."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def samples_per_iteration(self) -> int:
        """Samples in one iteration over all ranks, default resolved."""
        return self.global_batch_size or self.micro_batch_size * self.data_parallel_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each rank runs in one iteration."""
        return self.samples_per_iteration // (self.micro_batch_size * self.data_parallel_size)

    @property
    def virtual_pipeline_size(self) -> int | None:
        """Model chunks of each pipeline stage in the interleaved schedule, None where it is not used."""
        per_chunk = self.num_layers_per_virtual_pipeline_stage
        if per_chunk is None:
            return None
        return self.num_layers // self.pipeline_model_parallel_size // per_chunk

    @property
    def backend(self) -> str:
        """The collective backend, default resolved."""
        return self.distributed_backend or ("gloo" if self.use_cpu else "nccl")


def field_specs() -> list[tuple[dataclasses.Field[Any], FlagSpec]]:
    """The fields of `TrainingConfig` that a flag sets, with their specs, in declaration order."""
    return [(field, field.metadata[FLAG]) for field in dataclasses.fields(TrainingConfig) if FLAG in field.metadata]


def flag_name(field_name: str) -> str:
    """The flag of a field: `num_layers` -> `--num-layers`."""
    return "--" + field_name.replace("_", "-")
