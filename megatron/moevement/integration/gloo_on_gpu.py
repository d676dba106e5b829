"""Pipeline communication over gloo between processes that may share one GPU.

gloo takes CUDA tensors for collectives, but not for send and receive, and NCCL refuses two ranks on one GPU.
Here every boundary tensor goes device -> pinned host -> gloo -> pinned host -> device. It is for testing
parallelism on a single GPU, not for speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

ACTIVATION_TAG = 1
GRADIENT_TAG = 2


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` in host memory, contiguous; pinned where the tensor is on a GPU.

    The copy is complete when the call returns.
    """
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    staged.copy_(tensor.detach())
    return staged


def to_device(staged: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A leaf tensor on `device` with the staged bytes, which asks for a gradient as the schedules expect."""
    landed = torch.empty(staged.shape, dtype=staged.dtype, device=device)
    landed.copy_(staged)
    return landed.requires_grad_(True)


def avoid_coalescing() -> None:
    """Makes core's data-parallel collectives run one by one: gloo can't coalesce operations on CUDA tensors.

    Only for collectives that are waited for; overlapped ones are refused with this backend on GPUs.
    """
    param_and_grad_buffer._coalescing_manager = _one_by_one


@contextlib.contextmanager
def _one_by_one(_group: dist.ProcessGroup, async_ops: bool = False) -> Iterator[None]:
    if async_ops:
        raise RuntimeError("overlapped collectives over gloo on a GPU are not supported")
    yield


class HostStagedP2P(P2PCommunicator):  # type: ignore[misc]
    """Megatron's pipeline communicator with all traffic staged through host memory.

    Args:
        pp_group: the pipeline group, of backend gloo.
        config: the model's configuration; `pipeline_dtype` gives the dtype of boundary tensors.
        device: where received tensors are placed.
    """

    def __init__(self, pp_group: dist.ProcessGroup, config: Any, device: torch.device) -> None:
        super().__init__(pp_group, config)
        self.device = device

    def _communicate(
        self,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Sequence[int] | torch.Size,
        wait_on_reqs: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Exchange boundary tensors with both neighbours and wait for all of them.

        Overrides the one private method through which every public one of core's communicator goes.

        Returns:
            what came from the previous and the next stage (None where not asked for), and no open requests.

        Raises:
            RuntimeError: where overlapped exchange is asked for, which staging cannot give.
        """
        if not wait_on_reqs:
            raise RuntimeError("host-staged pipeline communication cannot be overlapped")
        from_prev = self._host_buffer(tensor_shape) if recv_prev else None
        from_next = self._host_buffer(tensor_shape) if recv_next else None
        # Tags tell activations from gradients where both neighbours are the same rank.
        requests = []
        if tensor_send_prev is not None:
            requests.append(self._send(tensor_send_prev, self.prev_rank, GRADIENT_TAG))
        if from_prev is not None:
            requests.append(dist.irecv(from_prev, self.prev_rank, self.pp_group, ACTIVATION_TAG))
        if tensor_send_next is not None:
            requests.append(self._send(tensor_send_next, self.next_rank, ACTIVATION_TAG))
        if from_next is not None:
            requests.append(dist.irecv(from_next, self.next_rank, self.pp_group, GRADIENT_TAG))
        for request in requests:
            request.wait()
        received = [None if buffer is None else to_device(buffer, self.device) for buffer in (from_prev, from_next)]
        return received[0], received[1], None

    def _send(self, tensor: torch.Tensor, peer: int, tag: int) -> Any:
        return dist.isend(to_host(tensor), peer, self.pp_group, tag)

    def _host_buffer(self, shape: Sequence[int] | torch.Size) -> torch.Tensor:
        pinned = self.device.type == "cuda"
        return torch.empty(tuple(shape), dtype=self.config.pipeline_dtype, device="cpu", pin_memory=pinned)
