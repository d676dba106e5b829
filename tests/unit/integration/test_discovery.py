"""Discovery: names, kinds and ranges; every element of the training state is exactly one operator's."""

import itertools
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.moevement.errors import UnsupportedError
from megatron.moevement.integration.discovery import find_owned, named_parameters, operator_table, replica_range
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.optimizer_setup import inner_optimizers
from megatron.moevement.types import OperatorKind

Build = Callable[..., TrainingJob]


@given(st.integers(0, 10**9), st.integers(1, 64))
def test_replicas_share_out_every_element_once(elements: int, replicas: int) -> None:
    ranges = [replica_range(elements, replica, replicas) for replica in range(replicas)]
    assert ranges[0][0] == 0 and ranges[-1][1] == elements
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(ranges))
    sizes = [end - start for start, end in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("distributed", [False, True])
def test_operators_are_named_after_the_model(build: Build, distributed: bool) -> None:
    job = build(use_distributed_optimizer=distributed)
    table = operator_table(job.chunks, find_owned(job.chunks, job.optimizer))
    experts = {f"layer{layer:03d}.expert{expert:03d}" for layer in range(2) for expert in range(4)}
    others = {f"layer{layer:03d}.{kind}" for layer in range(2) for kind in ("router", "non_expert")}
    assert table.names == experts | others | {"embedding", "output"}
    assert Counter(o.kind for o in table) == {
        OperatorKind.EXPERT: 8,
        OperatorKind.ROUTER: 2,
        OperatorKind.NON_EXPERT: 2,
        OperatorKind.EMBEDDING: 1,
        OperatorKind.OUTPUT: 1,
    }
    expert = table["layer001.expert002"]
    assert (expert.layer, expert.expert) == (1, 2)
    assert all("layers.1.mlp.experts.local_experts.2." in part.parameter for part in expert.slices)
    assert all(".mlp.router." in part.parameter for part in table["layer000.router"].slices)
    assert not any(".mlp.experts." in part.parameter for part in table["layer000.non_expert"].slices)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_lone_rank_owns_every_element(build: Build, distributed: bool, tied: bool) -> None:
    job = build(use_distributed_optimizer=distributed, untie_embeddings_and_output_weights=not tied)
    owned = find_owned(job.chunks, job.optimizer)
    table = operator_table(job.chunks, owned)
    parameters = named_parameters(job.chunks)
    assert owned.keys() == parameters.keys()
    slices = {part.parameter: part for operator in table for part in operator.slices}
    assert slices.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert (slices[name].start, slices[name].end) == (0, parameter.numel())
        assert slices[name].weight_bytes == parameter.element_size()
        master = owned[name].master
        assert master is not None and master.dtype == torch.float32 and owned[name].sharded == distributed
        weight = parameter.detach().float().view(-1)
        assert torch.equal(master.detach().to(parameter.dtype).float().view(-1), weight), "it is that parameter's"
    untied = any("output_layer" in part.parameter for part in table["output"].slices)
    assert untied != tied


def test_a_frozen_parameter_is_refused_by_name(build: Build) -> None:
    job = build()
    lost = inner_optimizers(job.optimizer)[0]
    lost.float16_groups[0].pop()
    lost.fp32_from_float16_groups[0].pop()
    with pytest.raises(UnsupportedError, match="no optimizer updates it"):
        find_owned(job.chunks, job.optimizer)


def test_another_optimizer_is_refused_by_flag(build: Build) -> None:
    job = build()
    member = inner_optimizers(job.optimizer)[0]
    member.optimizer = torch.optim.SGD(member.optimizer.param_groups[0]["params"], lr=0.1)
    with pytest.raises(UnsupportedError, match=r"--optimizer: .*SGD"):
        find_owned(job.chunks, job.optimizer)


def test_an_optimizer_without_master_weights_is_refused_by_flag(build: Build) -> None:
    job = build()
    member = SimpleNamespace(optimizer=inner_optimizers(job.optimizer)[0].optimizer)
    with pytest.raises(UnsupportedError, match="--bf16 or --fp16"):
        find_owned(job.chunks, SimpleNamespace(chained_optimizers=[member]))


def test_other_experts_are_refused_by_flag(build: Build) -> None:
    job = build()
    owned = find_owned(job.chunks, job.optimizer)
    layer = next(module for module in job.chunks[0].modules() if hasattr(module, "experts"))
    layer.experts = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match="--moe-grouped-gemm: Linear"):
        operator_table(job.chunks, owned)
