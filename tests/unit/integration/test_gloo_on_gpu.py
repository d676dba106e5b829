"""Tests of host-staged pipeline communication, on CPU tensors over gloo between two processes."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig

from megatron.moevement.integration import gloo_on_gpu
from megatron.moevement.integration.gloo_on_gpu import HostStagedP2P

CPU = torch.device("cpu")
SHAPE = (3, 2)


def settings() -> ModelParallelConfig:
    return ModelParallelConfig(pipeline_model_parallel_size=2, pipeline_dtype=torch.bfloat16)


def exchange(rank: int, store: str) -> None:
    """Both directions at once between two ranks that are each other's only neighbour."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    link = HostStagedP2P(dist.group.WORLD, settings(), CPU)
    activation = torch.full(SHAPE, 10.0 + rank, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.full(SHAPE, 20.0 + rank, dtype=torch.bfloat16)
    from_prev, from_next = link.send_forward_backward_recv_forward_backward(
        activation, gradient, recv_prev=True, recv_next=True, tensor_shape=SHAPE
    )
    assert torch.equal(from_prev, torch.full(SHAPE, 10.0 + 1 - rank, dtype=torch.bfloat16))
    assert torch.equal(from_next, torch.full(SHAPE, 20.0 + 1 - rank, dtype=torch.bfloat16))
    assert from_prev.is_leaf
    assert from_prev.requires_grad
    if rank == 0:
        link.send_forward(activation, is_last_stage=False)
        assert link.recv_forward(SHAPE, is_first_stage=True) is None
    else:
        assert torch.equal(link.recv_forward(SHAPE, is_first_stage=False), activation - 1)
    dist.destroy_process_group()


def test_activations_and_gradients_are_told_apart(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=exchange, args=(rank, str(tmp_path / "store"))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0, 0]


def test_overlapped_exchange_is_refused(topology: object) -> None:
    link = HostStagedP2P(dist.group.WORLD, settings(), CPU)
    with pytest.raises(RuntimeError, match="overlapped"):
        link._communicate(
            tensor_send_next=None,
            tensor_send_prev=None,
            recv_prev=False,
            recv_next=False,
            tensor_shape=SHAPE,
            wait_on_reqs=False,
        )


def test_staging_copies_bytes_and_makes_them_contiguous() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3).t().requires_grad_(True)
    staged = gloo_on_gpu.to_host(tensor)
    assert staged.is_contiguous()
    assert not staged.requires_grad
    assert torch.equal(staged, tensor)
    landed = gloo_on_gpu.to_device(staged, CPU)
    assert torch.equal(landed, tensor)
    assert landed.data_ptr() != staged.data_ptr()
