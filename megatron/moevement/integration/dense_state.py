"""The parts of a training state that megatron.core's sharded state doesn't hold, or doesn't restore exactly.

Core shares one Adam step between all parameters, replaces optimizer state when it loads, and leaves random number
generators, non-persistent buffers and the learning-rate schedule to the training script.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron.moevement.errors import RecoveryError
from megatron.moevement.integration import rng_state
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.optimizer_setup import inner_optimizers
from megatron.moevement.training_config import TrainingConfig

_MODEL_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "moe_ffn_hidden_size",
    "num_experts",
    "seq_length",
    "max_position_embeddings",
    "position_embedding_type",
    "normalization",
    "swiglu",
    "disable_bias_linear",
    "untie_embeddings_and_output_weights",
    "moe_router_enable_expert_bias",
    "vocab_size",
    "tokenizer_type",
    "make_vocab_size_divisible_by",
    "bf16",
    "fp16",
)
_LAYOUT_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "expert_model_parallel_size",
    "use_distributed_optimizer",
)
# The distributed optimizer's parts follow the gradient buckets.
_BUCKET_FIELDS = ("overlap_grad_reduce", "ddp_bucket_size", "accumulate_allreduce_grads_in_fp32")


def identity(config: TrainingConfig) -> dict[str, Any]:
    """By flag, what must be the same when a checkpoint is loaded."""
    names = _MODEL_FIELDS + _LAYOUT_FIELDS + (_BUCKET_FIELDS if config.use_distributed_optimizer else ())
    by_flag = {f"--{name.replace('_', '-')}": getattr(config, name) for name in names}
    by_flag["--nproc-per-node times --nnodes"] = config.world_size
    by_flag["--expert-tensor-parallel-size"] = config.expert_tensor_size
    # The position in the data is a number of iterations of this many samples.
    by_flag["--global-batch-size"] = config.samples_per_iteration
    return by_flag


def bare_chunks(job: TrainingJob) -> list[Any]:
    """The model chunks without their wrappers."""
    return list(unwrap_model(job.chunks))


def create_moments(job: TrainingJob) -> None:
    """Gives AdamW the state that its first step would create, with the same values, where it has none yet."""
    for member in inner_optimizers(job.optimizer):
        if not isinstance(member.optimizer, torch.optim.Adam | torch.optim.AdamW):
            continue
        for parameter in _parameters(member):
            if not member.optimizer.state[parameter]:
                member.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0, dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }


def complete_steps(optimizer_state: dict[Any, Any]) -> None:
    """Gives a loaded state of a non-distributed optimizer the common Adam step that core leaves out where it is 0."""
    parts = [optimizer_state] if "optimizer" in optimizer_state else list(optimizer_state.values())
    for part in parts:
        states = part["optimizer"].get("state") if isinstance(part, dict) and "optimizer" in part else None
        if isinstance(states, dict):
            states.setdefault("common_step", torch.tensor(0.0))


def smallest_ownership(job: TrainingJob) -> tuple[int, int]:
    """Fewest parameters that this rank owns a part of, in any inner distributed optimizer and in any bucket."""
    whole, buckets = [], []
    for member in inner_optimizers(job.optimizer):
        whole.append(sum(1 for _ in _parameters(member)))
        for by_dtype in member.gbuf_ranges:
            buckets += [len(bucket["param_map"]) for ranges in by_dtype.values() for bucket in ranges]
    return min(whole, default=1), min(buckets, default=1)


class Kept:
    """Storages of a job's parameters and optimizer state, so that a load can be undone to them but for the values."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._weights = [(name, parameter, parameter.data) for name, parameter in _named_parameters(job)]
        self._members = [
            (
                member,
                [{key: value for key, value in group.items() if key != "params"} for group in member.param_groups],
                [(p, p.data, dict(member.optimizer.state[p])) for p in _parameters(member)],
            )
            for member in inner_optimizers(job.optimizer)
        ]

    def put_back(self) -> None:
        """Copies loaded values into the former tensors where core has replaced these, and puts these back.

        Options of parameter groups become what they were: flags decide on them, not the checkpoint.

        Raises:
            RecoveryError: a tensor has lost its state or changed its shape.
        """
        with torch.no_grad():
            for name, parameter, data in self._weights:
                if not _same(parameter.data, data, name):
                    data.copy_(parameter.data)
                    parameter.data = data
            for member, options, entries in self._members:
                for group, former in zip(member.param_groups, options, strict=True):
                    for key in [key for key in group if key != "params"]:
                        del group[key]
                    group.update(former)
                for number, (parameter, data, state) in enumerate(entries):
                    self._put_back_one(f"optimizer state {number}", member.optimizer, parameter, data, state)

    def _put_back_one(
        self, name: str, optimizer: Any, parameter: torch.Tensor, data: torch.Tensor, state: dict[str, Any]
    ) -> None:
        if not _same(parameter.data, data, name):
            data.copy_(parameter.data)
            parameter.data = data
        loaded = optimizer.state[parameter]
        for key, former in state.items():
            # Core gives all parameters one step tensor, which every one of them would then count up.
            if key != "step" and not _same(loaded[key], former, f"{name} {key}"):
                former.copy_(loaded[key])
        optimizer.state[parameter] = state


def capture_rank_state(job: TrainingJob) -> dict[str, Any]:
    """What this rank alone gets back: RNG, Adam steps, scalers, every module buffer, the schedule's position."""
    return {
        "rng": rng_state.capture(),
        "scheduler_samples": int(job.scheduler.num_steps),
        "consumed_samples": job.consumed_samples,
        "optimizers": [_member_state(member) for member in inner_optimizers(job.optimizer)],
        "buffers": {name: buffer.detach().cpu().clone() for name, buffer in _named_buffers(job)},
    }


def restore_rank_state(job: TrainingJob, state: dict[str, Any]) -> None:
    """Restores in place what `capture_rank_state` returned; call it last, it restores the RNG.

    Raises:
        RecoveryError: the state is of another model.
    """
    buffers = dict(_named_buffers(job))
    if set(buffers) != set(state["buffers"]):
        raise RecoveryError("the checkpoint's module buffers are not those of the model")
    for name, saved in state["buffers"].items():
        buffer = buffers[name]
        if buffer.dtype != saved.dtype or buffer.shape != saved.shape:
            raise RecoveryError(f"{name}: {saved.dtype}{list(saved.shape)} in the checkpoint, not the model's")
        buffer.copy_(saved)
    members = inner_optimizers(job.optimizer)
    for member, saved in zip(members, state["optimizers"], strict=True):
        _restore_member(job, member, saved)
    job.scheduler.num_steps = state["scheduler_samples"]
    job.scheduler.step(increment=0)
    rng_state.restore(state["rng"])


def _member_state(member: Any) -> dict[str, Any]:
    optimizer = member.optimizer
    scaler = getattr(member, "grad_scaler", None)
    return {
        "adam_steps": [float(optimizer.state[p].get("step", 0.0)) for p in _parameters(member)],
        # Optimizers other than torch's count steps in the group.
        "group_steps": [None if "step" not in g else int(g["step"]) for g in member.param_groups],
        "scaler": {} if scaler is None else {key: _plain(value) for key, value in scaler.state_dict().items()},
    }


def _restore_member(job: TrainingJob, member: Any, saved: dict[str, Any]) -> None:
    for parameter, step in zip(_parameters(member), saved["adam_steps"], strict=True):
        counter = member.optimizer.state[parameter].get("step")
        if counter is not None:
            counter.fill_(step)
    for group, step in zip(member.param_groups, saved["group_steps"], strict=True):
        group.pop("step", None)
        if step is not None:
            group["step"] = step
    if saved["scaler"]:
        device = job.topology.device
        values = {k: v.to(device) if torch.is_tensor(v) else v for k, v in saved["scaler"].items()}
        member.grad_scaler.load_state_dict(values)


def _plain(value: Any) -> Any:
    return value.detach().cpu().clone() if torch.is_tensor(value) else value


def _same(now: torch.Tensor, former: torch.Tensor, name: str) -> bool:
    """Whether both have one storage; their shapes and types must agree."""
    if now.shape != former.shape or now.dtype != former.dtype:
        raise RecoveryError(f"{name}: {now.dtype}{list(now.shape)} was loaded, {former.dtype}{list(former.shape)} held")
    return now.data_ptr() == former.data_ptr()


def _parameters(member: Any) -> Iterator[torch.Tensor]:
    return (parameter for group in member.param_groups for parameter in group["params"])


def _named_parameters(job: TrainingJob) -> Iterator[tuple[str, torch.Tensor]]:
    for number, chunk in enumerate(job.chunks):
        for name, parameter in chunk.named_parameters():
            yield f"chunk{number}.{name}", parameter


def _named_buffers(job: TrainingJob) -> Iterator[tuple[str, torch.Tensor]]:
    for number, chunk in enumerate(job.chunks):
        for name, buffer in chunk.named_buffers():
            yield f"chunk{number}.{name}", buffer
