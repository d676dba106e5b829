"""Small copies between host and device that hold up nobody else.

While a copy from or to pageable memory waits for its turn on the device, CUDA's driver keeps a lock, behind which the
copy engine's calls wait.
"""

import time

import torch

POLL_SECONDS = 0.001


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, detached, in host memory; waits for the device."""
    if not tensor.is_cuda:
        return tensor.detach()
    host = _coming(tensor)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def _coming(tensor: torch.Tensor) -> torch.Tensor:
    """Pinned memory that a tensor of the device is copied to, behind the work of the current stream."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor in host memory on `device`; the host goes on at once."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor to host memory behind the work of the current stream; who needs it waits, on any thread.

    On the CPU it is the tensor itself, which must not change before it is read.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host, self._event = tensor.detach(), None
        if tensor.is_cuda:
            self._host = _coming(tensor)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self, timeout_seconds: float) -> torch.Tensor:
        """The tensor in host memory, once it is there.

        Raises:
            TimeoutError: the device has not come to it in time; it may hang in a collective.
        """
        deadline = time.monotonic() + timeout_seconds
        # A thread that waits in the driver would take a core, and the driver, from training.
        while self._event is not None and not self._event.query():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the device took longer than {timeout_seconds:g} s")
            time.sleep(POLL_SECONDS)
        return self._host
