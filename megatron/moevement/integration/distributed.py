"""Processes, devices, process groups and seeds.

`start` turns the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) into a
ready `Topology`.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import random

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.distributed_c10d import Store

from megatron.moevement.agent.link import WorkerLink
from megatron.moevement.argument_checks import UsageError
from megatron.moevement.integration import cpu_backend, gloo_on_gpu, groups
from megatron.moevement.training_config import TrainingConfig

# Stages get seeds this far apart, as in Megatron, so that their layers do not start alike.
SEED_DISTANCE_OF_STAGES = 100

# Survivors abort NCCL's communicators themselves and go on.
_NCCL_UNDER_THE_AGENT = {
    # Its watchdogs would end the process.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    # A watchdog that finds an error waits five times the time for a dump, 75 s by default, and whoever leaves the group
    # waits for the watchdog.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Where this process stands.

    Attributes:
        device: where model and optimizer live.
        rank: of this process in the world.
        groups: megatron.core's process groups.
        control: the whole world over gloo, for control values in CPU tensors.
    """

    device: torch.device
    rank: int
    world_size: int
    pipeline_rank: int
    data_parallel_rank: int
    groups: ProcessGroupCollection
    control: dist.ProcessGroup


def choose_device(config: TrainingConfig) -> torch.device:
    """The CPU under `--use-cpu`, else this process's GPU (shared with others under gloo if it must be).

    Raises:
        UsageError: where there is no GPU and the CPU was not asked for, or NCCL has too few GPUs.
    """
    if config.use_cpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("--use-cpu", "was not given and no GPU was found", "add --use-cpu to train on the CPU")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    # All ranks of the node find it: a refusal by one rank alone is not printed.
    if config.backend == "nccl" and max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > gpus:
        raise UsageError(
            "--distributed-backend",
            f"nccl needs a GPU per process, and this node has {gpus}",
            "start fewer processes or use gloo, under which processes share GPUs",
        )
    return torch.device("cuda", local_rank % gpus)


def start(config: TrainingConfig, link: WorkerLink | None = None) -> Topology:
    """Initialise torch.distributed, megatron.core's groups and all random number generators.

    Args:
        config: the training configuration.
        link: to the agent that started this process; None where the launcher is torchrun. A process that takes over a
            rank gets groups that don't communicate: it joins the others when its job is built.

    Raises:
        UsageError: see `choose_device`.
    """
    device = choose_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif not cpu_backend.is_installed():
        raise RuntimeError("install the CPU backend before importing megatron.core")
    if device.type == "cuda" and config.backend == "gloo":
        if config.overlap_grad_reduce:
            raise UsageError("--overlap-grad-reduce", "needs NCCL on GPUs", "leave it out under gloo")
        gloo_on_gpu.avoid_coalescing()
    if config.deterministic_mode:
        _require_determinism(device)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if link is not None:
        for name, value in _NCCL_UNDER_THE_AGENT.items():
            os.environ.setdefault(name, value)
    if link is not None and link.replacement:
        with groups.without_communication():
            dist.init_process_group(groups.FAKE, store=groups.nowhere(), rank=link.rank, world_size=link.world_size)
            control = initialize_groups(config)
    else:
        control = connect(config, None if link is None else link.store())
    seed_everything(config.seed)
    return topology_of(device, control)


def connect(config: TrainingConfig, store: Store | None) -> dist.ProcessGroup:
    """Makes all process groups, over `store` or where the launcher's environment says; returns the control group."""
    timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
    rank = int(os.environ.get("RANK", "0"))
    dist.init_process_group(config.backend, store=store, rank=rank, world_size=config.world_size, timeout=timeout)
    control = initialize_groups(config)
    if config.backend == "nccl":
        _make_pipeline_communicators()
    return control


def _make_pipeline_communicators() -> None:
    """NCCL makes a group's communicator in its first exchange, for which it needs all ranks of the group.

    In a recovery the first exchange may be that of two stages which replay together while the others wait.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if pipeline.size() > 1:
        dist.all_reduce(torch.zeros(1, device=torch.cuda.current_device()), group=pipeline)
        torch.cuda.synchronize()


def topology_of(device: torch.device, control: dist.ProcessGroup) -> Topology:
    """Where this process stands in the groups as they are now."""
    return Topology(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        control=control,
    )


def initialize_groups(config: TrainingConfig) -> dist.ProcessGroup:
    """Create megatron.core's process groups over the default group, and the control group, which is returned."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
    )
    timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
    return dist.new_group(backend="gloo", timeout=timeout)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and core's tracker: equal on data-parallel ranks, different between stages."""
    stage_seed = seed + SEED_DISTANCE_OF_STAGES * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    numpy.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def stop() -> None:
    """Leave the process groups; all ranks call it."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _require_determinism(device: torch.device) -> None:
    if device.type == "cuda":
        # cuBLAS is repeatable only with a fixed workspace, read when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
