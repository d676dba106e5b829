"""Tests of device choice, process groups and seeds."""

import random
from collections.abc import Callable

import numpy
import pytest
import torch
from megatron.core import tensor_parallel

from megatron.moevement.argument_checks import UsageError
from megatron.moevement.integration import distributed
from megatron.moevement.training_config import TrainingConfig


def test_the_cpu_must_be_asked_for(make_config: Callable[..., TrainingConfig]) -> None:
    assert distributed.choose_device(make_config()).type == "cpu"
    with pytest.raises(UsageError, match="--use-cpu was not given and no GPU was found: add --use-cpu"):
        distributed.choose_device(make_config(use_cpu=False, distributed_backend="gloo"))


def test_gpus_are_shared_under_gloo_only(
    make_config: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    device = distributed.choose_device(make_config(use_cpu=False, distributed_backend="gloo"))
    assert device == torch.device("cuda", 1)
    for local_rank in ("3", "0"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        with pytest.raises(UsageError, match="--distributed-backend"):
            distributed.choose_device(make_config(use_cpu=False, distributed_backend="nccl"))


def test_a_world_of_one(topology: distributed.Topology) -> None:
    assert (topology.rank, topology.world_size, topology.pipeline_rank, topology.data_parallel_rank) == (0, 1, 0, 0)
    assert topology.groups.pp.size() == 1


def test_a_seed_sets_every_generator(topology: distributed.Topology) -> None:
    def draw() -> tuple[object, ...]:
        distributed.seed_everything(7)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            tracked = torch.rand(1).item()
        return random.random(), numpy.random.rand(), torch.rand(1).item(), tracked

    assert draw() == draw()
