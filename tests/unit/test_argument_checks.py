"""Tests of refusals: the table of unsupported flags, and combinations checked on a configuration."""

import dataclasses
from pathlib import Path

import pytest

from megatron.moevement import argument_checks, training_config
from megatron.moevement.argument_checks import UsageError
from megatron.moevement.training_config import TrainingConfig

GOOD = TrainingConfig(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    seq_length=32,
    num_experts=4,
    micro_batch_size=1,
    train_iters=10,
    lr=1e-3,
    bf16=True,
    disable_bias_linear=True,
    data_path=("corpus",),
)


def test_a_good_configuration_passes() -> None:
    argument_checks.check(GOOD)


def test_no_unsupported_flag_is_also_supported() -> None:
    flags = {training_config.flag_name(field.name) for field, _ in training_config.field_specs()}
    assert not flags.intersection(argument_checks.UNSUPPORTED)


def test_every_remedy_that_names_a_flag_names_a_known_one() -> None:
    flags = {training_config.flag_name(field.name) for field, _ in training_config.field_specs()}
    for remedy in argument_checks.UNSUPPORTED.values():
        for word in remedy.replace(";", " ").split():
            if word.startswith("--") and word not in ("--sparse-ckpt", "--python-stdlib"):
                assert word in flags, remedy


@pytest.mark.parametrize("flag", sorted(argument_checks.UNSUPPORTED))
def test_an_unsupported_flag_is_refused_by_name(flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag} is not supported: ") as caught:
        argument_checks.check_supported(flag)
    assert caught.value.flag == flag


CASES: list[tuple[str, dict[str, object]]] = [
    ("--bf16", {"fp16": True}),
    ("--bf16", {"bf16": False}),
    ("--loss-scale", {"loss_scale": 8.0}),
    ("--initial-loss-scale", {"initial_loss_scale": 8.0}),
    ("--loss-scale-window", {"loss_scale_window": 8}),
    ("--hysteresis", {"hysteresis": 8}),
    ("--moe-router-bias-update-rate", {"moe_router_bias_update_rate": 0.5}),
    ("--moe-router-pre-softmax", {"moe_router_pre_softmax": True, "moe_router_score_function": "sigmoid"}),
    ("--tokenizer-model", {"tokenizer_model": "gpt2"}),
    ("--lr-wsd-decay-style", {"lr_wsd_decay_style": "cosine"}),
    ("--ddp-bucket-size", {"ddp_bucket_size": 100}),
    ("--split", {"split": "nan"}),
    ("--min-loss-scale", {"fp16": True, "bf16": False, "min_loss_scale": 4.0, "initial_loss_scale": 2.0}),
    ("--transformer-impl", {"transformer_impl": "transformer_engine"}),
    ("--context-parallel-size", {"context_parallel_size": 2}),
    ("--pipeline-model-parallel-size", {"world_size": 3, "pipeline_model_parallel_size": 2}),
    ("--expert-model-parallel-size", {"world_size": 3, "expert_model_parallel_size": 2}),
    ("--num-layers", {"world_size": 3, "pipeline_model_parallel_size": 3}),
    ("--tensor-model-parallel-size", {"world_size": 2, "tensor_model_parallel_size": 2}),
    ("--sequence-parallel", {"sequence_parallel": True}),
    (
        "--seq-length",
        {"world_size": 4, "tensor_model_parallel_size": 4, "sequence_parallel": True, "seq_length": 34},
    ),
    ("--disable-bias-linear", {"disable_bias_linear": False}),
    (
        "--disable-bias-linear",
        {"world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True, "disable_bias_linear": False},
    ),
    (
        "--expert-tensor-parallel-size",
        {
            "world_size": 2,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "moe_token_dispatcher_type": "alltoall",
            "use_cpu": True,
        },
    ),
    ("--num-layers-per-virtual-pipeline-stage", {"num_layers_per_virtual_pipeline_stage": 1}),
    (
        "--num-layers-per-virtual-pipeline-stage",
        {
            "world_size": 2,
            "pipeline_model_parallel_size": 2,
            "num_layers": 8,
            "num_layers_per_virtual_pipeline_stage": 3,
        },
    ),
    (
        "--num-layers-per-virtual-pipeline-stage",
        {"world_size": 2, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2},
    ),
    ("--hidden-size", {"hidden_size": 66}),
    (
        "--num-attention-heads",
        {
            "world_size": 4,
            "tensor_model_parallel_size": 4,
            "sequence_parallel": True,
            "num_attention_heads": 2,
        },
    ),
    ("--max-position-embeddings", {"max_position_embeddings": 16}),
    ("--position-embedding-type", {"position_embedding_type": "rope", "hidden_size": 36}),
    (
        "--moe-ffn-hidden-size",
        {"world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True, "moe_ffn_hidden_size": 7},
    ),
    ("--num-experts", {"world_size": 8, "expert_model_parallel_size": 8}),
    ("--moe-router-topk", {"moe_router_topk": 5}),
    ("--moe-router-topk", {"moe_router_topk": 1}),
    ("--moe-router-enable-expert-bias", {"moe_router_enable_expert_bias": True}),
    ("--moe-aux-loss-coeff", {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.1}),
    ("--global-batch-size", {"world_size": 2, "global_batch_size": 3}),
    (
        "--global-batch-size",
        {
            "world_size": 2,
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "global_batch_size": 3,
        },
    ),
    ("--data-path", {"data_path": ()}),
    ("--vocab-size", {"tokenizer_type": "NullTokenizer"}),
    ("--tokenizer-model", {"tokenizer_type": "HuggingFaceTokenizer"}),
    ("--split", {"split": "0,1,1"}),
    ("--split", {"split": "most"}),
    ("--lr-warmup-iters", {"lr_warmup_iters": 10}),
    ("--min-lr", {"min_lr": 1.0}),
    ("--lr-wsd-decay-iters", {"lr_decay_style": "WSD"}),
    ("--lr-wsd-decay-iters", {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 11}),
    ("--lr-wsd-decay-iters", {"lr_wsd_decay_iters": 5}),
    ("--adam-beta1", {"adam_beta1": 1.0}),
    ("--overlap-param-gather", {"overlap_param_gather": True, "overlap_grad_reduce": True}),
    ("--overlap-param-gather", {"overlap_param_gather": True, "use_distributed_optimizer": True}),
    ("--recompute-granularity", {"recompute_granularity": "full"}),
    ("--recompute-granularity", {"recompute_granularity": "full", "recompute_method": "uniform"}),
    ("--recompute-method", {"recompute_method": "uniform"}),
    ("--recompute-num-layers", {"recompute_granularity": "selective", "recompute_num_layers": 1}),
    (
        "--recompute-num-layers",
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 5},
    ),
    ("--distributed-backend", {"use_cpu": True, "distributed_backend": "nccl"}),
    ("--save-interval", {"save_interval": 2}),
]


@pytest.mark.parametrize(("flag", "changes"), CASES, ids=[f"{i}{flag}" for i, (flag, _) in enumerate(CASES)])
def test_a_combination_is_refused_by_its_flag(flag: str, changes: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        argument_checks.check(dataclasses.replace(GOOD, **changes))  # type: ignore[arg-type]
    assert caught.value.flag == flag
    assert str(caught.value).count(": ") >= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"world_size": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
        {"world_size": 4, "expert_model_parallel_size": 2, "disable_bias_linear": False},
        {"moe_router_topk": 1, "moe_router_pre_softmax": True},
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "lr_warmup_iters": 2},
        {"bf16": False, "fp16": True, "loss_scale": 8.0},
        {
            "world_size": 4,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
    ],
)
def test_a_combination_is_accepted(changes: dict[str, object]) -> None:
    argument_checks.check(dataclasses.replace(GOOD, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["save", "tensorboard_dir", "state_digest"])
def test_an_output_folder_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    good = {name: str(tmp_path / "made" / "digest")}
    argument_checks.check_outputs(dataclasses.replace(GOOD, **good))  # type: ignore[arg-type]
    bad = {name: str(tmp_path / "file" / "below" / "digest")}
    with pytest.raises(UsageError, match=f"{training_config.flag_name(name)} .*file/below.*: Not a directory: name a"):
        argument_checks.check_outputs(dataclasses.replace(GOOD, **bad))  # type: ignore[arg-type]
