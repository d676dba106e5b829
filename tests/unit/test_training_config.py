"""Tests of the training configuration: parsers of values, derived sizes."""

import argparse
import dataclasses

import pytest

from megatron.moevement import training_config
from megatron.moevement.training_config import TrainingConfig

REQUIRED = {
    "num_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "num_experts": 4,
    "micro_batch_size": 2,
    "train_iters": 10,
    "lr": 1e-3,
}


def config(**values: object) -> TrainingConfig:
    return TrainingConfig(**{**REQUIRED, **values})  # type: ignore[arg-type]


def test_sizes_follow_from_the_layout() -> None:
    built = config(world_size=16, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, global_batch_size=48)
    assert built.model_parallel_size == 4
    assert built.data_parallel_size == 4
    assert built.samples_per_iteration == 48
    assert built.num_micro_batches == 6
    assert built.expert_tensor_size == 2


def test_defaults_are_resolved() -> None:
    built = config(world_size=4)
    assert built.samples_per_iteration == 8
    assert built.num_micro_batches == 1
    assert built.virtual_pipeline_size is None
    assert built.backend == "nccl"
    assert config(use_cpu=True).backend == "gloo"
    assert config(expert_tensor_parallel_size=1, tensor_model_parallel_size=2).expert_tensor_size == 1


def test_chunks_of_a_stage() -> None:
    built = config(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
    assert built.virtual_pipeline_size == 2


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().lr = 1.0  # type: ignore[misc]


def test_every_field_but_the_world_size_is_a_flag() -> None:
    flags = {field.name for field, _ in training_config.field_specs()}
    assert {field.name for field in dataclasses.fields(TrainingConfig)} - flags == {"world_size"}
    assert training_config.flag_name("num_layers") == "--num-layers"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_a_count_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        training_config.count(text)


@pytest.mark.parametrize("text", ["-0.1", "1.1", "nan", "inf", "x"])
def test_a_fraction_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        training_config.fraction(text)


def test_an_open_range_leaves_out_its_minimum() -> None:
    positive = training_config.real_number(above=True)
    assert positive("1e-9") == 1e-9
    with pytest.raises(argparse.ArgumentTypeError):
        positive("0")
