"""Host memory that outlives a process, a paced copy engine, digests: the Python face of the native core in csrc/.

The core knows addresses, sizes and stream handles only, never tensors. Addresses come from HostRegion.address and from
torch.Tensor.data_ptr(); who passes one keeps the memory alive until the copy is finished. Its signatures are in _C.pyi,
its docstrings (units, errors) on the objects themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from moevement_ext import _C
from moevement_ext._C import (
    DIGEST_LEAF_BYTES,
    CopyEngine,
    CopyStats,
    DeviceDigests,
    DigestPool,
    EngineError,
    HostRegion,
    add_fingerprint,
    fingerprint,
)

__all__ = [
    "DIGEST_LEAF_BYTES",
    "BuildInfo",
    "CopyEngine",
    "CopyStats",
    "DeviceDigests",
    "DigestPool",
    "EngineError",
    "HostRegion",
    "add_fingerprint",
    "build_info",
    "fingerprint",
]


@dataclass(frozen=True)
class BuildInfo:
    """What the native core was built with."""

    cuda: bool
    """Whether CopyEngine("cuda") exists in this build; a GPU and its driver are still needed to make one."""
    cuda_version: str | None
    """Version of the CUDA runtime, such as "13.0"; None without CUDA."""
    compiler: str
    """Name and version of the C++ compiler."""
    gather: bool
    """Whether the CUDA engine copies small pieces together, by way of a kernel; DeviceDigests("cuda") needs one too."""


def build_info() -> BuildInfo:
    """What the native core was built with; needs no GPU."""
    cuda, cuda_version, compiler, gather = _C.build_info()
    return BuildInfo(cuda=cuda, cuda_version=cuda_version, compiler=compiler, gather=gather)
