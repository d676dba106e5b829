"""Finds every operator of every model chunk and the range of each parameter that this rank owns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron.moevement.errors import UnsupportedError
from megatron.moevement.integration.optimizer_setup import inner_optimizers
from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.types import Operator, OperatorKind, ParameterSlice

_LAYER = re.compile(r"(?:.*\.)?decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class OwnedParameter:
    """A model parameter with its optimizer state, as this rank holds it.

    Attributes:
        name: chunk and parameter name, unique on the rank.
        parameter: the compute weight (16 bits, or FP32 for parameters that are kept so).
        inner: the torch optimizer that updates it, None if this rank owns nothing of it.
        master: FP32 master weights, flat: the whole parameter, or this rank's shard of it.
        start, end: element range of the flattened parameter that this rank owns.
        replicas: ranks that hold the same whole parameter and share its snapshot; None under the distributed optimizer.
    """

    name: str
    parameter: torch.nn.Parameter
    inner: torch.optim.Optimizer | None
    master: torch.Tensor | None
    start: int
    end: int
    replicas: dist.ProcessGroup | None

    @property
    def sharded(self) -> bool:
        """Whether `master` is a shard that begins at `start` (distributed optimizer)."""
        return self.replicas is None

    @property
    def master_offset(self) -> int:
        """Element of `master` at which the owned range begins."""
        return 0 if self.sharded else self.start


def named_parameters(chunks: list[DistributedDataParallel]) -> dict[str, torch.nn.Parameter]:
    """All parameters of all chunks under rank-wide unique names."""
    return {f"chunk{i}.{name}": p for i, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}


def find_owned(chunks: list[DistributedDataParallel], optimizer: Any) -> dict[str, OwnedParameter]:
    """Every parameter with the range that this rank owns.

    Raises:
        UnsupportedError: an optimizer class, or an inner optimizer, that can't be captured exactly.
    """
    names = {parameter: name for name, parameter in named_parameters(chunks).items()}
    owned: dict[str, OwnedParameter] = {}
    sharded = False
    for member in inner_optimizers(optimizer):
        if type(member.optimizer) not in (torch.optim.AdamW, torch.optim.Adam):
            raise UnsupportedError(
                f"--optimizer: {type(member.optimizer).__module__}.{type(member.optimizer).__name__} is not supported "
                "by --sparse-ckpt; run without Apex and TransformerEngine, so that torch's AdamW is used"
            )
        if isinstance(member, DistributedOptimizer):
            sharded = True
            found = _of_distributed(member, names)
        elif isinstance(member, Float16OptimizerWithFloat16Params):
            found = _of_float16(member, names)
        else:
            raise UnsupportedError(
                f"--sparse-ckpt needs --bf16 or --fp16: {type(member).__name__} has no master weights apart"
            )
        owned.update({item.name: item for item in found})
    for parameter, name in names.items():
        if name not in owned:
            if not sharded:
                raise UnsupportedError(f"{name}: no optimizer updates it; frozen parameters are not supported")
            owned[name] = OwnedParameter(name, parameter, None, None, 0, 0, None)
    return owned


def _of_distributed(member: DistributedOptimizer, names: dict[torch.nn.Parameter, str]) -> list[OwnedParameter]:
    found = []
    for model_groups, shard_groups in (
        (member.model_float16_groups, member.shard_fp32_from_float16_groups),
        (member.model_fp32_groups, member.shard_fp32_groups),
    ):
        for parameters, shards in zip(model_groups, shard_groups, strict=True):
            for parameter, shard in zip(parameters, shards, strict=True):
                # core has no public way from a parameter to its range.
                where = member._get_model_param_range_map(parameter)["param"]
                if shard is None or shard.dtype != torch.float32:
                    raise UnsupportedError("--use-precision-aware-optimizer is not supported by --sparse-ckpt")
                found.append(
                    OwnedParameter(names[parameter], parameter, member.optimizer, shard, where.start, where.end, None)
                )
    return found


def _of_float16(
    member: Float16OptimizerWithFloat16Params, names: dict[torch.nn.Parameter, str]
) -> list[OwnedParameter]:
    found = []
    pairs = [
        pair
        for low, high in zip(member.float16_groups, member.fp32_from_float16_groups, strict=True)
        for pair in zip(low, high, strict=True)
    ]
    pairs += [(parameter, parameter) for group in member.fp32_from_fp32_groups for parameter in group]
    for parameter, master in pairs:
        group = (
            parallel_state.get_data_parallel_group(with_context_parallel=True)
            if getattr(parameter, "allreduce", True)
            else parallel_state.get_expert_data_parallel_group()
        )
        start, end = replica_range(parameter.numel(), dist.get_rank(group), dist.get_world_size(group))
        found.append(OwnedParameter(names[parameter], parameter, member.optimizer, master, start, end, group))
    return found


def replica_range(elements: int, replica: int, replicas: int) -> tuple[int, int]:
    """The element range of a replicated parameter that replica number `replica` snapshots."""
    return elements * replica // replicas, elements * (replica + 1) // replicas


def operator_table(chunks: list[DistributedDataParallel], owned: dict[str, OwnedParameter]) -> OperatorTable:
    """The operators of this rank, with every owned element in exactly one of them.

    Raises:
        UnsupportedError: an expert class or parameter that is no operator's.
    """
    slices: dict[tuple[str, OperatorKind, int | None, int | None], list[ParameterSlice]] = {}
    for index, chunk in enumerate(chunks):
        _check_experts(chunk)
        layers = _layer_numbers(chunk)
        for name, parameter in chunk.named_parameters():
            key = _operator_of(name, layers, chunk)
            item = owned[f"chunk{index}.{name}"]
            part = ParameterSlice(item.name, item.start, item.end, parameter.numel(), parameter.element_size())
            slices.setdefault(key, []).append(part)
    table = OperatorTable(
        Operator(name, kind, layer, expert, tuple(parts)) for (name, kind, layer, expert), parts in slices.items()
    )
    table.check_owned({item.name: (item.start, item.end) for item in owned.values()})
    return table


def _check_experts(chunk: DistributedDataParallel) -> None:
    for module in chunk.modules():
        if isinstance(module, MoELayer) and not isinstance(module.experts, SequentialMLP):
            raise UnsupportedError(
                f"--moe-grouped-gemm: {type(module.experts).__name__} is not supported by --sparse-ckpt; run without it"
            )


def _layer_numbers(chunk: DistributedDataParallel) -> dict[int, int]:
    """Index in the chunk -> number in the whole model, from 0."""
    decoder = next(module.decoder for module in chunk.modules() if hasattr(module, "decoder"))
    return {index: layer.layer_number - 1 for index, layer in enumerate(decoder.layers)}


def _operator_of(
    name: str, layers: dict[int, int], chunk: DistributedDataParallel
) -> tuple[str, OperatorKind, int | None, int | None]:
    match = _LAYER.match(name)
    if match:
        layer = layers[int(match.group(1))]
        rest, prefix = match.group(2), f"layer{layers[int(match.group(1))]:03d}"
        expert = _EXPERT.match(rest)
        if expert:
            local = len(chunk_layer(chunk, int(match.group(1))).mlp.experts.local_experts)
            number = local * parallel_state.get_expert_model_parallel_rank() + int(expert.group(1))
            return f"{prefix}.expert{number:03d}", OperatorKind.EXPERT, layer, number
        if rest.startswith("mlp.router."):
            return f"{prefix}.router", OperatorKind.ROUTER, layer, None
        if rest.startswith("mlp.experts."):
            raise UnsupportedError(f"{name}: expert parameters outside of local_experts are not supported")
        return f"{prefix}.non_expert", OperatorKind.NON_EXPERT, layer, None
    if ".embedding." in f".{name}":
        return "embedding", OperatorKind.EMBEDDING, None, None
    if ".output_layer." in f".{name}" or ".decoder.final_layernorm." in f".{name}":
        return "output", OperatorKind.OUTPUT, None, None
    raise UnsupportedError(
        f"{name}: belongs to no known operator (multi-token prediction and vision are not supported)"
    )


def chunk_layer(chunk: DistributedDataParallel, index: int) -> Any:
    """Transformer layer `index` of the chunk."""
    return next(module.decoder for module in chunk.modules() if hasattr(module, "decoder")).layers[index]
