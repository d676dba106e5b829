"""Operator state of a real model: what is read and put back is everything that training depends on."""

import ctypes
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.moevement.errors import RecoveryError
from megatron.moevement.integration.discovery import OwnedParameter, replica_range
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.operator_state import OperatorState, _complete_replicas
from megatron.moevement.integration.state_digest import digest_state, training_state
from megatron.moevement.types import Presence
from moevement_ext import CopyEngine
from tests.unit.integration.saved import Saved, train_one

Build = Callable[..., TrainingJob]
REPLICAS = 3


def digests(job: TrainingJob) -> dict[str, str]:
    """A digest of every tensor and value of the training state."""
    return dict(digest_state(training_state(job)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_distributed_optimizer": True},
        {"bf16": False, "fp16": True, "initial_loss_scale": 1024.0},
        {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid", "hidden_dropout": 0.1},
    ],
    ids=["float16", "distributed", "scaler", "bias"],
)
def test_everything_is_put_back(build: Build, changes: dict[str, object]) -> None:
    job = build(**changes)
    state = OperatorState(job, CopyEngine())
    train_one(job)
    saved, wanted = Saved(state, 1), digests(job)
    records = [train_one(job), train_one(job)]
    end = digests(job)
    assert end != wanted
    saved.restore(state)
    assert digests(job) == wanted and job.step == 1
    assert [train_one(job), train_one(job)] == records
    assert digests(job) == end


def test_slots_can_be_taken_from_step_0(build: Build) -> None:
    job = build()
    state = OperatorState(job, CopyEngine())
    saved = Saved(state, 0)
    record = train_one(job)
    saved.restore(state)
    assert train_one(job) == record


def test_a_flipped_bit_makes_a_difference(build: Build) -> None:
    job = build()
    state = OperatorState(job, CopyEngine())
    train_one(job)
    saved, wanted = Saved(state, 1), digests(job)
    piece = saved.operators["layer001.expert002", Presence.FULL].pieces[1]
    memory = (ctypes.c_ubyte * piece.nbytes).from_address(piece.address)
    memory[0] ^= 1
    saved.restore(state)
    found = digests(job)
    changed = [name for name in wanted if wanted[name] != found[name]]
    assert len(changed) == 1 and "local_experts.2" in changed[0] and changed[0].endswith("exp_avg")


@pytest.mark.parametrize("distributed", [False, True])
def test_weights_only_are_the_compute_weights(build: Build, distributed: bool) -> None:
    job = build(use_distributed_optimizer=distributed)
    state = OperatorState(job, CopyEngine())
    saved = Saved(state, 0)
    light = [operator for (_, presence), operator in saved.operators.items() if presence is Presence.WEIGHTS_ONLY]
    assert state.differing_weights(light) == ()
    train_one(job)
    assert set(state.differing_weights(light)) == state.table.names
    state.load(light[:3])
    assert set(state.differing_weights(light)) == state.table.names - {operator.name for operator in light[:3]}


def test_another_state_is_refused(build: Build) -> None:
    job = build(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
    state = OperatorState(job, CopyEngine())
    saved = Saved(state, 0)
    assert saved.start.buffers, "the routers' biases"
    with pytest.raises(RecoveryError, match="module buffers"):
        state.load_start_state(replace(saved.start, buffers=saved.start.buffers[1:]), saved.buffers[1:])
    wrong = (replace(saved.start.buffers[0], dtype="torch.int32"), *saved.start.buffers[1:])
    with pytest.raises(RecoveryError, match=r"torch\.int32"):
        state.load_start_state(replace(saved.start, buffers=wrong), saved.buffers)
    with pytest.raises(RecoveryError, match="--global-batch-size"):
        state.load_start_state(replace(saved.start, consumed_samples=3), saved.buffers)
    short = replace(saved.operators["output", Presence.FULL], pieces=saved.operators["embedding", Presence.FULL].pieces)
    with pytest.raises(RecoveryError, match="don't have the sizes"):
        state.load([short])


def test_all_buffers_are_there_under_their_names(build: Build) -> None:
    job = build(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
    # One that is made later, where there was none.
    job.chunks[0].register_buffer("late", None)
    state = OperatorState(job, CopyEngine())
    job.chunks[0].late = torch.zeros(3)
    wanted = {f"chunk{i}.{name}" for i, chunk in enumerate(job.chunks) for name, _ in chunk.named_buffers()}
    assert {info.name for info in state.start_state(0)[0].buffers} == wanted and "chunk0.late" in wanted


def complete(rank: int, store: str) -> None:
    """Every replica has only its own part of each tensor, and gets the others'."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=REPLICAS)
    group = dist.new_group(backend="gloo")
    whole = [torch.arange(n, dtype=torch.float32) + 1000 * n for n in (1, 2, 10, 64)]
    whole += [t.to(torch.bfloat16) for t in whole]
    tensors = []
    for number, tensor in enumerate(whole):
        start, end = replica_range(tensor.numel(), rank, REPLICAS)
        mine = torch.full_like(tensor, -1.0)
        mine[start:end] = tensor[start:end]
        parameter = torch.nn.Parameter(torch.zeros(tensor.numel()))
        parameter.allreduce = number % 2 == 0
        tensors.append((mine, OwnedParameter(str(number), parameter, None, mine, start, end, group)))
    sharded = torch.full((4,), float(rank))
    owned = OwnedParameter("sharded", torch.nn.Parameter(sharded.clone()), None, sharded, 0, 4, None)
    _complete_replicas([*tensors, (sharded, owned), (None, tensors[0][1])])
    assert all(torch.equal(found, wanted) for (found, _), wanted in zip(tensors, whole, strict=True))
    assert torch.equal(sharded, torch.full((4,), float(rank))), "shards are nobody else's"
    dist.destroy_process_group()


def test_replicas_complete_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron.moevement.integration.operator_state"])
    processes = [context.Process(target=complete, args=(rank, str(tmp_path / "store"))) for rank in range(REPLICAS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * REPLICAS
