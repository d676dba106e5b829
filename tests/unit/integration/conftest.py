"""Fixtures of the integration tests: the CPU backend, one process with its groups, a corpus, a training job."""

import os
import socket
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from megatron.moevement.integration import cpu_backend, quiet
from megatron.moevement.training_config import TrainingConfig

quiet.quiet_core_warnings()
cpu_backend.hide_cuda()
cpu_backend.install()

from megatron.core import parallel_state  # noqa: E402

from megatron.moevement.integration import corpus, distributed, groups, job  # noqa: E402

MakeConfig = Callable[..., TrainingConfig]


@pytest.fixture(scope="session")
def data_prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared corpus of a few thousand different bytes."""
    prefix = str(tmp_path_factory.mktemp("corpus") / "text")
    texts = ["".join(f"{number * step} " for number in range(300)) for step in range(1, 6)]
    corpus.write_corpus(texts, prefix, "ByteLevelTokenizer")
    return prefix


@pytest.fixture(scope="session")
def make_config(data_prefix: str) -> MakeConfig:
    """Builds the configuration of a very small model, with changes."""

    def make(**changes: object) -> TrainingConfig:
        values: dict[str, object] = {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "seq_length": 16,
            "num_experts": 4,
            "moe_ffn_hidden_size": 16,
            "moe_token_dispatcher_type": "alltoall",
            "moe_aux_loss_coeff": 1e-2,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "train_iters": 4,
            "lr": 1e-2,
            "bf16": True,
            "disable_bias_linear": True,
            "use_cpu": True,
            "data_path": (data_prefix,),
        }
        return TrainingConfig(**{**values, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def topology(make_config: MakeConfig) -> Iterator[distributed.Topology]:
    """This process as a world of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    yield distributed.start(make_config())
    distributed.stop()


def follow(topology: distributed.Topology) -> None:
    """Tests of generations leave other groups behind: the topology of the session goes over to them."""
    if topology.groups.pp is parallel_state.get_pipeline_model_parallel_group():
        return
    held = {name: group for name, group in vars(topology.groups).items() if isinstance(group, dist.ProcessGroup)}
    now = distributed.topology_of(topology.device, dist.new_group(backend="gloo"))
    new = {name: getattr(now.groups, name) for name in held}
    old = {**held, "control": topology.control}
    groups.rebind(groups.holders([topology], old), old, {**new, "control": now.control})


@pytest.fixture
def build(make_config: MakeConfig, topology: distributed.Topology) -> Callable[..., job.TrainingJob]:
    """Builds a training job at Step 0 from a fresh seed, with changes to its configuration."""

    def build_one(**changes: object) -> job.TrainingJob:
        config = make_config(**changes)
        follow(topology)
        distributed.seed_everything(config.seed)
        return job.build_job(config, topology)

    return build_one
