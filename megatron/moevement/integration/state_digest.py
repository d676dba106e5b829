"""Every byte of this rank's training state by name, and digests of it: how runs are compared bit for bit.

Names are those of parameters, not positions in optimizers, so that a difference says where it is.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy
import torch
import xxhash
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.optimizer_setup import inner_optimizers
from megatron.moevement.integration.train_loop import IterationOutcome


def training_state(job: TrainingJob) -> dict[str, torch.Tensor]:
    """The whole training state of this rank: name -> tensor (views of the live state, where it is a tensor).

    Weights whose gathering is pending (`--overlap-param-gather`) must have been gathered.
    """
    state: dict[str, torch.Tensor] = {}
    for name, tensor in _entries(job):
        if name in state:
            raise RuntimeError(f"two parts of the training state are named {name}")
        state[name] = tensor
    return state


def digest_tensor(tensor: torch.Tensor) -> str:
    """The xxh3-128 of shape, dtype and bytes, as 32 hexadecimal digits."""
    data = tensor.detach().cpu().contiguous().reshape(-1)
    digest = xxhash.xxh3_128(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(data.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_state(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The digest of every tensor, by name in sorted order."""
    return {name: digest_tensor(state[name]) for name in sorted(state)}


def digest_path(prefix: str, rank: int) -> str:
    """Where a rank's digests are: `FILE.rank00003.json`."""
    return f"{prefix}.rank{rank:05d}.json"


def write_state_digest(prefix: str, job: TrainingJob, history: Iterable[IterationOutcome]) -> str:
    """Write this rank's digests and history as JSON, complete or not at all.

    `history` is by iteration number; floats are written as `float.hex()`, which loses nothing.

    Returns:
        the path of the file.

    Raises:
        OSError: where the file cannot be written.
    """
    path = digest_path(prefix, job.topology.rank)
    content = {
        "step": job.step,
        "state": digest_state(training_state(job)),
        "history": {str(outcome.iteration): _exact(outcome) for outcome in history},
    }
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    with open(f"{path}.partial", "w") as file:
        json.dump(content, file, indent=1, sort_keys=True)
    os.replace(f"{path}.partial", path)
    return path


def _exact(outcome: IterationOutcome) -> dict[str, Any]:
    return {
        "loss": outcome.loss.hex(),
        "grad_norm": None if outcome.grad_norm is None else outcome.grad_norm.hex(),
        "skipped": outcome.skipped,
        "learning_rate": outcome.learning_rate.hex(),
        "loss_scale": outcome.loss_scale.hex(),
    }


def _entries(job: TrainingJob) -> Iterator[tuple[str, torch.Tensor]]:
    names: dict[torch.Tensor, str] = {}
    for number, chunk in enumerate(job.chunks):
        # DDP and the 16-bit wrapper hold the model one level down each.
        model = chunk.module.module
        for name, parameter in model.named_parameters():
            names[parameter] = f"chunk{number}.{name}"
            yield f"parameter/chunk{number}.{name}", parameter.data
        for name, buffer in model.named_buffers():
            yield f"buffer/chunk{number}.{name}", buffer
    for position, optimizer in enumerate(inner_optimizers(job.optimizer)):
        yield from _optimizer_entries(position, optimizer, names)
    yield from _rng_entries(job.topology.device)
    yield "scheduler/num_steps", torch.tensor(job.scheduler.num_steps)
    yield "data/consumed_samples", torch.tensor(job.consumed_samples)
    yield "step", torch.tensor(job.step)


def _optimizer_entries(
    position: int, optimizer: Any, names: Mapping[torch.Tensor, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Master weights, moments, steps, group hyper-parameters and loss scale of one inner optimizer."""
    for master, name in _masters(optimizer, names):
        yield f"optimizer/{name}/master", master.data
        for key, value in optimizer.optimizer.state.get(master, {}).items():
            yield f"optimizer/{name}/{key}", torch.as_tensor(value)
    for number, group in enumerate(optimizer.optimizer.param_groups):
        for key in ("lr", "weight_decay", "step"):
            if key in group:
                yield f"optimizer{position}/group{number}/{key}", torch.as_tensor(group[key], dtype=torch.float64)
    scaler = getattr(optimizer, "grad_scaler", None)
    if scaler is not None:
        for key, value in sorted(scaler.state_dict().items()):
            yield f"optimizer{position}/loss_scale/{key}", torch.as_tensor(value)


def _masters(optimizer: Any, names: Mapping[torch.Tensor, str]) -> Iterator[tuple[torch.Tensor, str]]:
    """The tensors that an inner optimizer updates, each with the name of its parameter (and its owned range)."""
    if hasattr(optimizer, "shard_fp32_from_float16_groups"):
        pairs = [
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        ]
    else:
        pairs = [
            (optimizer.float16_groups, optimizer.fp32_from_float16_groups),
            (optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups),
        ]
    for model_groups, master_groups in pairs:
        for parameters, masters in zip(model_groups, master_groups, strict=True):
            for parameter, master in zip(parameters, masters, strict=True):
                yield master, names[parameter] + _owned_range(optimizer, parameter)


def _owned_range(optimizer: Any, parameter: torch.Tensor) -> str:
    if not hasattr(optimizer, "shard_fp32_from_float16_groups"):
        return ""
    # Core has no public way to ask which range of a parameter this rank owns.
    owned = optimizer._get_model_param_range_map(parameter)["param"]
    return f"[{owned.start}:{owned.end}]"


def _rng_entries(device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    yield "rng/torch", torch.get_rng_state()
    if device.type == "cuda":
        yield "rng/cuda", torch.cuda.get_rng_state(device)
    for name, state in sorted(get_cuda_rng_tracker().get_states().items()):
        yield f"rng/tracker/{name}", state
    yield "rng/python", _bytes_tensor(repr(random.getstate()))
    generator, keys, *rest = numpy.random.get_state()
    yield "rng/numpy", _bytes_tensor(repr((generator, numpy.asarray(keys).tolist(), rest)))


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
