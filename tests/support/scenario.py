"""What is trained in a test: model, parallel layout and what else must be exact; and how two runs are compared."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.launcher import Outcome

ITERATIONS = 9
CLIP_GRAD = 0.3

_MODEL = (
    "--use-cpu --distributed-backend gloo --hidden-size 32 --num-attention-heads 2 --seq-length 32 "
    f"--micro-batch-size 1 --lr 3e-3 --lr-decay-style cosine --lr-warmup-iters 3 --clip-grad {CLIP_GRAD} "
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --split 100,0,0 "
    "--tokenizer-type ByteLevelTokenizer --log-interval 1"
).split()


@dataclass(frozen=True)
class Scenario:
    """A training run.

    Attributes:
        name: for the test's id.
        flags: model and layout flags besides the common ones, as one text.
        world_size: processes.
        precision: `--bf16` or `--fp16`.
        faults: part of training itself, such as an overflow; in every run, the reference too.
    """

    name: str
    flags: str
    world_size: int = 4
    precision: str = "--bf16"
    layers: int = 2
    samples: int = 8
    balance: str = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"
    dropout: float = 0.0
    faults: tuple[dict[str, Any], ...] = field(default=())

    def arguments(self, corpus: Path) -> list[str]:
        """The command line of the run."""
        words = [*_MODEL, "--num-layers", str(self.layers), "--global-batch-size", str(self.samples), self.precision]
        words += [
            "--train-iters",
            str(ITERATIONS),
            "--data-path",
            str(corpus),
            *self.flags.split(),
            *self.balance.split(),
        ]
        words += ["--hidden-dropout", str(self.dropout), "--attention-dropout", str(self.dropout)]
        return words


def sparse_flags(directory: Path, name: str, window: int | str, mode: str, *extra: str) -> list[str]:
    """The flags of sparse checkpointing for a test."""
    flags = ["--sparse-ckpt", "--sparse-ckpt-dir", str(directory), "--sparse-ckpt-name", name]
    return [*flags, "--sparse-ckpt-window", str(window), "--sparse-ckpt-window-mode", mode, *extra]


def differences(reference: Outcome, other: Outcome) -> tuple[int, list[str]]:
    """How many values were compared, and which differ: every digest of the state, and the losses and norms of all
    iterations that the last generation of `other` ran."""
    compared, differing = 0, []
    assert set(reference.digests) == set(other.digests), "a rank has not written its digests"
    for rank, wanted in reference.digests.items():
        found = other.digests[rank]
        for name in sorted({*wanted["state"], *found["state"]}):
            compared += 1
            if wanted["state"].get(name) != found["state"].get(name):
                differing.append(f"rank {rank}: {name}")
        for iteration, values in found["history"].items():
            compared += 1
            if wanted["history"][iteration] != values:
                differing.append(f"rank {rank}: iteration {iteration}")
    return compared, differing
