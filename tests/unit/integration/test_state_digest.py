"""Tests of state digests: complete, named, and sensitive to one bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.moevement.integration import state_digest, train_loop
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.train_loop import NoHooks


@pytest.mark.parametrize("distributed", [False, True])
def test_every_parameter_has_its_optimizer_state(build: Callable[..., TrainingJob], distributed: bool) -> None:
    job = build(use_distributed_optimizer=distributed, train_iters=1)
    train_loop.train(job, NoHooks())
    state = state_digest.training_state(job)
    parameters = {name.removeprefix("parameter/"): t for name, t in state.items() if name.startswith("parameter/")}
    for part in ("master", "exp_avg", "exp_avg_sq", "step"):
        owned = {
            name.split("/")[1].split("[")[0]: t
            for name, t in state.items()
            if name.endswith(f"/{part}") and name.startswith("optimizer/")
        }
        assert owned.keys() == parameters.keys()
        if part != "step":
            assert all(owned[name].numel() == parameters[name].numel() for name in parameters)
    assert {"rng/torch", "rng/python", "rng/numpy", "rng/tracker/model-parallel-rng"} <= state.keys()
    assert state["scheduler/num_steps"] == state["data/consumed_samples"] == 4


def test_equal_runs_have_equal_digests_and_one_bit_makes_a_difference(build: Callable[..., TrainingJob]) -> None:
    def run() -> TrainingJob:
        job = build(train_iters=2)
        train_loop.train(job, NoHooks())
        return job

    digests = state_digest.digest_state(state_digest.training_state(run()))
    job = run()
    state = state_digest.training_state(job)
    assert state_digest.digest_state(state) == digests
    name = next(name for name in state if name.endswith("exp_avg_sq"))
    state[name].view(torch.uint8).view(-1)[0] ^= 1
    changed = state_digest.digest_state(state_digest.training_state(job))
    assert [key for key in digests if digests[key] != changed[key]] == [name]


def test_a_digest_covers_shape_and_dtype() -> None:
    zeros = torch.zeros(4, dtype=torch.float32)
    variants = [zeros, zeros.view(2, 2), zeros.view(torch.int32), torch.zeros(3), torch.tensor(0.0)]
    assert len({state_digest.digest_tensor(tensor) for tensor in variants}) == len(variants)


def test_the_scaler_is_part_of_the_state(build: Callable[..., TrainingJob]) -> None:
    state = state_digest.training_state(build(bf16=False, fp16=True))
    assert "optimizer0/loss_scale/scale" in state
    assert "optimizer0/loss_scale/hysteresis_tracker" in state
    assert "parameter/chunk0.embedding.word_embeddings.weight" in state


def test_the_file_holds_digests_and_exact_history(build: Callable[..., TrainingJob], tmp_path: Path) -> None:
    job = build(train_iters=2)
    history = train_loop.train(job, NoHooks())
    path = state_digest.write_state_digest(str(tmp_path / "runs" / "a"), job, history)
    assert path == state_digest.digest_path(str(tmp_path / "runs" / "a"), 0)
    content = json.loads(Path(path).read_text())
    assert content["step"] == 2
    assert content["state"] == state_digest.digest_state(state_digest.training_state(job))
    assert float.fromhex(content["history"]["1"]["loss"]) == history[1].loss
    assert float.fromhex(content["history"]["1"]["grad_norm"]) == history[1].grad_norm
