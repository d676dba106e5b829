"""A fingerprint of a tensor's bytes, computed where the tensor is: exact, 64 bits, the same on every device.

A multilinear hash in arithmetic modulo 2^64: the sum of every 32-bit word times an odd key of its place. Such sums are
exact in any order, so it doesn't matter how a device adds; a change of one word always changes the result, and one of
several words with all but a chance of about 2^-32.
"""

from __future__ import annotations

import torch

from megatron.moevement.integration.host_copies import to_host
from moevement_ext import add_fingerprint, build_info
from moevement_ext import fingerprint as of_memory

_HAVE_KERNELS = build_info().gather
_SIGN = 1 << 63


def fingerprint(tensor: torch.Tensor, result: torch.Tensor) -> None:
    """Writes the fingerprint of `tensor` to `result`, int64 of no dimension on the same device; nobody waits for it.

    Without kernels in the extension a tensor on a GPU is waited for, and copied to the host.
    """
    flat = tensor.detach().contiguous()
    nbytes = flat.numel() * flat.element_size()
    if flat.is_cuda and _HAVE_KERNELS:
        result.zero_()
        stream = torch.cuda.current_stream(flat.device).cuda_stream
        add_fingerprint(flat.device.index, flat.data_ptr(), nbytes, result.data_ptr(), stream)
        return
    host = to_host(flat)
    found = of_memory(host.data_ptr(), nbytes)
    result.fill_(found if found < _SIGN else found - 2 * _SIGN)
