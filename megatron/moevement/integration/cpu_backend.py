"""The CPU backend: megatron.core trains on CPU tensors over gloo.

megatron.core 0.16.1 names the CUDA device directly in many places. This file holds every substitution that
training a GPT with experts needs on a machine without CUDA; all else uses megatron.core unchanged. It is
explicit: `install` refuses where CUDA is available, and `hide_cuda` is called only for `--use-cpu`.

| substitution                    | reason                                                                        |
|---------------------------------|-------------------------------------------------------------------------------|
| TORCH_COMPILE_DISABLE=1         | core fuses pointwise functions with torch.compile, which needs a C++ compiler |
|                                 | at run time and costs minutes at start                                         |
| current_device, synchronize ... | buffers of routers, pipelines and gradients are placed on the current device   |
| Stream, Event, current_stream   | the token dispatcher copies token counts on a side stream; CPU tensors need no |
|                                 | ordering beyond program order                                                  |
| factories with device="cuda"    | token totals, found-inf flags, gradient norms and causal masks                 |
| Tensor.cuda                     | tied embeddings between the first and last stage, loss-scale state             |
| Tensor.type in core.optimizer   | parameters are sorted by the names torch.cuda.*Tensor                          |
| CUDA RNG state functions        | the CPU generator plays the part of the device's generator                     |
| RNG tracker                     | its fork() warns when the CPU generator moves, which here it must              |
| maybe_move_tensor_to_cpu        | all_to_all wants split sizes as numpy; core converts only CUDA tensors         |
| products of bfloat16 matrices   | many times slower than those of float32 on most CPUs (cpu_matmul.py)           |
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from megatron.moevement.argument_checks import UsageError
from megatron.moevement.integration import cpu_matmul

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")
_installed = False


class _ProgramOrder:
    """Stands in for a CUDA stream or event: work on CPU tensors is finished when its call returns."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def wait_stream(self, _stream: object) -> None:
        pass

    def wait_event(self, _event: object) -> None:
        pass

    def wait(self, _stream: object = None) -> None:
        pass

    def record(self, _stream: object = None) -> None:
        pass

    def record_event(self, event: _ProgramOrder | None = None) -> _ProgramOrder:
        return event or _ProgramOrder()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ProgramOrder)

    def __hash__(self) -> int:
        return hash(_ProgramOrder)


def hide_cuda() -> None:
    """Make CUDA devices invisible to this process; works only before torch has initialised CUDA.

    Raises:
        UsageError: where CUDA is initialised already.
    """
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        raise UsageError("--use-cpu", "was asked for after CUDA was initialised", "start a fresh process")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def is_installed() -> bool:
    """Whether this process trains on the CPU."""
    return _installed


def install() -> None:
    """Put every substitution in place; call it before anything of megatron.core is imported.

    Raises:
        UsageError: where CUDA is available.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise UsageError("--use-cpu", "was not given and CUDA is available", "train on the GPU or add --use-cpu")
    _installed = True
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    torch.set_num_threads(1)  # processes share the cores, and one thread keeps reductions in one order
    _replace_device_functions()
    _replace_factories()
    _replace_tensor_methods()
    _replace_rng()
    _replace_moe_helpers()
    cpu_matmul.install()


def _replace_device_functions() -> None:
    cuda: Any = torch.cuda
    order = _ProgramOrder()
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *_args, **_kwargs: None
    cuda.empty_cache = lambda: None
    cuda.Stream = _ProgramOrder
    cuda.Event = _ProgramOrder
    cuda.current_stream = lambda *_args, **_kwargs: order
    cuda.default_stream = lambda *_args, **_kwargs: order
    cuda.stream = lambda _stream: contextlib.nullcontext()


def _replace_factories() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Any) -> Any:
    """The factory, with a CUDA device argument turned into the CPU."""

    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)  # type: ignore[no-any-return]

    on_cpu.__name__ = factory.__name__
    return on_cpu


def _replace_tensor_methods() -> None:
    tensor_class: Any = torch.Tensor
    original_type = tensor_class.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        asked_for_name = not args and not kwargs
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if asked_for_name and caller.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    tensor_class.type = type_name
    tensor_class.cuda = lambda self, *_args, **_kwargs: self


def _replace_rng() -> None:
    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.manual_seed(seed)

    import megatron.core.tensor_parallel.random as core_random

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    core_random._set_cuda_rng_state = set_state
    core_random.CudaRNGStatesTracker = _cpu_tracker_class(core_random)


def _cpu_tracker_class(core_random: Any) -> type:
    """Core's RNG tracker with the same named states, its fork() on the CPU generator."""

    class CpuRNGStatesTracker(core_random.CudaRNGStatesTracker):  # type: ignore[misc]
        _current_state_name: str

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            if name not in self.states_:
                raise KeyError(f"no RNG state is named {name}")
            outer_name = self._current_state_name
            outer_state = torch.get_rng_state()
            if outer_name in self.states_:
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_.get(outer_name, outer_state))
                self._current_state_name = outer_name

    return CpuRNGStatesTracker


def _replace_moe_helpers() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = move
