"""Products of bfloat16 matrices on x86 processors without AVX-512.

There torch's own kernels take ten to forty times as long as those of float32, which a model on a laptop mostly waits
for. Here they are made by the float32 kernels and rounded once, which is what hardware with such instructions does.
"""

from __future__ import annotations

import platform
import warnings
from typing import Any

import torch

# What torch calls such CPUs.
_WITHOUT_AVX512 = ("AVX2", "DEFAULT")
# Overrides last as long as this.
_library: torch.library.Library | None = None


def install() -> None:
    """Overrides torch's products of matrices, for tensors on the CPU and the whole process, where that is faster."""
    global _library
    slow = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() in _WITHOUT_AVX512
    if _library is not None or not slow:
        return
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # That there is a kernel already.
        warnings.simplefilter("ignore")
        for product in (mm, bmm, addmm, baddbmm):
            _library.impl(product.__name__, product, "CPU")


def mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """torch.mm."""
    return _product(torch.ops.aten.mm.out, (left.shape[0], right.shape[1]), left, right)


def bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """torch.bmm."""
    return _product(torch.ops.aten.bmm.out, (left.shape[0], left.shape[1], right.shape[2]), left, right)


def addmm(added: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **factors: Any) -> torch.Tensor:
    """torch.addmm."""
    return _product(torch.ops.aten.addmm.out, (left.shape[0], right.shape[1]), added, left, right, **factors)


def baddbmm(added: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **factors: Any) -> torch.Tensor:
    """torch.baddbmm."""
    shape = (left.shape[0], left.shape[1], right.shape[2])
    return _product(torch.ops.aten.baddbmm.out, shape, added, left, right, **factors)


def _product(kernel: Any, shape: tuple[int, ...], *tensors: torch.Tensor, **factors: Any) -> torch.Tensor:
    """What a kernel that writes to `out`, which isn't overridden, makes of the tensors; of bfloat16 as float32."""
    dtype = tensors[-1].dtype
    if any(one.dtype != torch.bfloat16 for one in tensors):
        return kernel(*tensors, **factors, out=torch.empty(shape, dtype=dtype))  # type: ignore[no-any-return]
    out = kernel(*(one.float() for one in tensors), **factors, out=torch.empty(shape, dtype=torch.float32))
    return out.to(dtype)  # type: ignore[no-any-return]
