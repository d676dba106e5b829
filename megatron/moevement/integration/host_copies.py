"""Small copies between host and device that hold up nobody else.

While a copy from or to pageable memory waits for its turn on the device, CUDA's driver keeps a lock, behind which the
copy engine's calls wait.
"""

import torch


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, detached, in host memory; waits for the device."""
    if not tensor.is_cuda:
        return tensor.detach()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor.detach(), non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor in host memory on `device`; the host goes on at once."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
