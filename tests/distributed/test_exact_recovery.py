"""Exact or broken: after a SIGKILL every tensor, RNG state, loss and norm is bitwise that of an undisturbed run.

Each case also has its negative control: the same recovery with one wrong bit in one master weight must be noticed.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.conftest import Lab
from tests.support.launcher import Outcome, copy_slots
from tests.support.scenario import CLIP_GRAD, Scenario, differences, sparse_flags

pytestmark = pytest.mark.distributed

PP2_EP2 = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
BIAS = "--moe-router-load-balancing-type none --moe-router-enable-expert-bias --moe-router-score-function sigmoid"


@dataclass(frozen=True)
class Case:
    """A scenario, its window, and where which rank is killed."""

    scenario: Scenario
    window: int
    mode: str
    point: str
    rank: int
    iteration: int
    long: bool = False

    def __str__(self) -> str:
        return f"{self.scenario.name}-W{self.window}-{self.mode}-{self.point}"


CASES = [
    Case(Scenario("pp2-ep2", PP2_EP2, dropout=0.1), 3, "rolling", "forward", 3, 6),
    Case(Scenario("pp2-ep2", PP2_EP2, dropout=0.1), 3, "fixed", "before_optimizer", 0, 7),
    Case(Scenario("pp2-ep2", PP2_EP2, dropout=0.1), 1, "rolling", "optimizer", 1, 5, long=True),
    Case(Scenario("pp2-ep2", PP2_EP2, dropout=0.1), 2, "fixed", "commit", 2, 5, long=True),
    Case(Scenario("pp2-ep2", PP2_EP2, dropout=0.1), 5, "rolling", "after_optimizer", 2, 7, long=True),
    Case(Scenario("pp2-ep2-bias", PP2_EP2, balance=BIAS), 2, "rolling", "forward", 1, 6),
    Case(
        Scenario("dp4-distopt-overlap", "--use-distributed-optimizer --overlap-grad-reduce "
                 "--overlap-param-gather --disable-bias-linear"),
        3, "rolling", "optimizer", 2, 6,
    ),
    Case(
        Scenario("ep2-dp2-distopt", "--expert-model-parallel-size 2 --use-distributed-optimizer", dropout=0.1),
        2, "fixed", "forward", 0, 6,
    ),
    Case(
        Scenario("ep2-edp2", "--expert-model-parallel-size 2 --untie-embeddings-and-output-weights"),
        3, "rolling", "commit", 1, 6,
    ),
    Case(
        Scenario(
            "pp2-interleaved-untied",
            PP2_EP2 + " --num-layers-per-virtual-pipeline-stage 1 --untie-embeddings-and-output-weights",
            layers=4,
        ),
        3, "rolling", "forward", 2, 6,
    ),
    Case(
        Scenario(
            "pp2-interleaved-distopt-overlap",
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --use-distributed-optimizer "
            "--overlap-grad-reduce --overlap-param-gather --disable-bias-linear",
            layers=4,
        ),
        2, "fixed", "forward", 1, 6, long=True,
    ),
    Case(
        Scenario("pp4", "--pipeline-model-parallel-size 4 --disable-bias-linear", layers=4),
        3, "rolling", "before_forward", 3, 6,
    ),
    Case(
        Scenario("tp2-pp2", "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
                 "--pipeline-model-parallel-size 2 --disable-bias-linear"),
        2, "rolling", "optimizer", 3, 6,
    ),
    Case(
        Scenario("pp2-ep2-accumulation8", PP2_EP2, samples=16), 3, "fixed", "forward", 3, 7, long=True,
    ),
    Case(
        Scenario(
            "pp2-ep2-fp16-overflow",
            PP2_EP2 + " --initial-loss-scale 4096 --loss-scale-window 3",
            precision="--fp16",
            faults=({"point": "overflow", "iteration": 4, "generation": None},),
        ),
        3, "rolling", "forward", 0, 6,
    ),
    Case(
        Scenario("ep2-recompute", "--expert-model-parallel-size 2 --recompute-granularity full --recompute-method "
                 "uniform --recompute-num-layers 1", dropout=0.1),
        3, "rolling", "forward", 2, 6, long=True,
    ),
    Case(
        Scenario("ep2-allgather-global-aux", "--expert-model-parallel-size 2 --position-embedding-type rope",
                 balance="--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-2"),
        2, "rolling", "before_optimizer", 3, 6, long=True,
    ),
    Case(
        Scenario("8-pp2-ep2-edp2-distopt", PP2_EP2 + " --use-distributed-optimizer", world_size=8, samples=16),
        3, "rolling", "forward", 5, 6, long=True,
    ),
    Case(
        Scenario("8-pp4-ep2-bias", "--pipeline-model-parallel-size 4 --expert-model-parallel-size 2", world_size=8,
                 layers=4, samples=16, balance=BIAS),
        3, "fixed", "optimizer", 6, 7, long=True,
    ),
]  # fmt: skip


def _parameters() -> list[object]:
    return [pytest.param(c, id=str(c), marks=[pytest.mark.long] if c.long else []) for c in CASES]


def assert_demanding(reference: Outcome, overflow: bool) -> None:
    """Other data, a clipped gradient and another rate in every iteration, so that a wrong replay shows."""
    history = list(reference.digests[0]["history"].values())
    assert len({values["loss"] for values in history}) == len(history)
    norms = [float.fromhex(values["grad_norm"]) for values in history if not values["skipped"]]
    assert min(norms) > CLIP_GRAD, norms
    rates = [float.fromhex(values["learning_rate"]) for values in history]
    assert rates[0] < max(rates) > rates[-1], "warm-up and decay"
    assert any(values["skipped"] for values in history) == overflow


@pytest.mark.parametrize("case", _parameters())
def test_a_killed_run_ends_bit_identical(case: Case, lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    reference = lab.reference(case.scenario)
    assert_demanding(reference, overflow=bool(case.scenario.faults))
    flags = sparse_flags(shared_memory, "job", case.window, case.mode, "--sparse-ckpt-keep")
    job = lab.job(case.scenario, tmp_path / "killed", flags)
    job.faults.append({"point": case.point, "rank": case.rank, "iteration": case.iteration})
    job.between = lambda generation: copy_slots(shared_memory / "job", shared_memory / "copy")
    outcome = job.run()
    assert outcome.ok and outcome.statuses == [-9, 0], outcome.output
    compared, differing = differences(reference, outcome)
    assert compared > 100
    assert not differing, differing[:10]
    first = min(int(iteration) for iteration in outcome.digests[0]["history"])
    assert case.iteration - first <= case.window + 2, "recovered from slots, and recent ones"

    control = lab.job(case.scenario, tmp_path / "control", sparse_flags(shared_memory, "copy", case.window, case.mode))
    control.first_generation, control.restarts = 1, 0
    control.faults.append({"point": "flip_restored_bit", "rank": case.rank, "generation": 1, "bit": 20})
    flipped = control.run()
    noticed = not flipped.ok and "not exact" in flipped.output
    assert noticed or differences(reference, flipped)[1], "a flipped bit went unnoticed"
