"""Tests of the CPU backend: refusals, and each substitution."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.tensor_parallel import random as core_random
from megatron.core.transformer.moe import token_dispatcher

from megatron.moevement.argument_checks import UsageError
from megatron.moevement.integration import cpu_backend

ROOT = Path(__file__).resolve().parents[3]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_is_refused_where_cuda_is_available() -> None:
    done = run(
        "import torch; torch.cuda.is_available = lambda: True\n"
        "from megatron.moevement.integration import cpu_backend\n"
        "cpu_backend.install()"
    )
    assert done.returncode == 1
    assert "--use-cpu was not given and CUDA is available: train on the GPU or add --use-cpu" in done.stderr


def test_hiding_cuda_comes_too_late_once_it_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UsageError, match="--use-cpu"):
        cpu_backend.hide_cuda()


def test_installing_twice_changes_nothing() -> None:
    before = torch.zeros
    cpu_backend.install()
    assert cpu_backend.is_installed()
    assert torch.zeros is before


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), None, "cpu"])
def test_factories_place_on_the_cpu(device: object) -> None:
    assert torch.zeros(2, device=device).device.type == "cpu"  # type: ignore[arg-type]
    assert torch.tensor([1], device=device).device.type == "cpu"  # type: ignore[arg-type]


def test_cuda_moves_nothing() -> None:
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor


def test_type_names_are_spelled_for_core_alone() -> None:
    tensor = torch.ones(2, dtype=torch.bfloat16)
    assert tensor.type() == "torch.BFloat16Tensor"
    scope = {"__name__": "megatron.core.optimizer.optimizer", "tensor": tensor}
    assert eval("tensor.type()", scope) == "torch.cuda.BFloat16Tensor"
    assert eval("tensor.type('torch.FloatTensor')", scope).dtype == torch.float32


def test_streams_keep_program_order() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        event = stream.record_event()
    event.synchronize()
    assert torch.cuda.current_stream() == stream
    assert event.query()


def test_split_sizes_become_numpy() -> None:
    moved = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    assert isinstance(moved, numpy.ndarray)
    assert token_dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def test_the_tracker_keeps_states_apart() -> None:
    tracker = core_random.CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("a", 5)
    tracker.add("b", 6)
    outside = torch.get_rng_state()
    with tracker.fork("a"):
        first = torch.rand(3)
        with tracker.fork("b"):
            nested = torch.rand(3)
        second = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), outside)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(first, torch.rand(3, generator=generator))
    assert torch.equal(second, torch.rand(3, generator=generator))
    assert torch.equal(nested, torch.rand(3, generator=torch.Generator().manual_seed(6)))


def test_an_unknown_tracker_state_is_refused() -> None:
    with pytest.raises(KeyError, match="nobody"), core_random.CudaRNGStatesTracker().fork("nobody"):
        pass
