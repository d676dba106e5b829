"""Tests of the layer specification and the normalisation that sequence parallelism accepts."""

import types
from collections.abc import Callable

import pytest
import torch

from megatron.moevement.integration import layer_spec, model
from megatron.moevement.training_config import TrainingConfig


@pytest.mark.parametrize(("name", "kind"), [("LayerNorm", torch.nn.LayerNorm), ("RMSNorm", torch.nn.RMSNorm)])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_normalisation_is_marked(name: str, kind: type, sequence_parallel: bool) -> None:
    settings = types.SimpleNamespace(normalization=name, sequence_parallel=sequence_parallel)
    norm = layer_spec.Norm(config=settings, hidden_size=8, eps=1e-4)
    assert isinstance(norm, kind)
    assert norm.eps == 1e-4
    assert all(parameter.sequence_parallel is sequence_parallel for parameter in norm.parameters())


def test_a_chunk_has_its_layers(make_config: Callable[..., TrainingConfig], topology: object) -> None:
    config = make_config(num_layers=6)
    spec = layer_spec.block_spec(config, model.transformer_config(config), None)
    assert len(spec.layer_specs) == 6
    assert spec.layer_norm is layer_spec.Norm
