"""Localized recovery under a real agent: whatever fails whenever, the run ends bit-identical to an undisturbed one.

A job takes many faults one after another, so that each of them also finds what the recovery before has left.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.conftest import Lab
from tests.support.recoveries import AgentJob, Campaign
from tests.support.scenario import Scenario, differences, sparse_flags

pytestmark = pytest.mark.distributed

WINDOW = 2
FIRST = 5
"""Iteration of the first fault: the first windows are complete everywhere by then."""
POINTS = (
    "begin",
    "capture",
    "forward:0",
    "forward:5",
    "backward:0",
    "backward:5",
    "before_optimizer",
    "decided",
    "optimizer",
    "updated",
    "after_optimizer",
    "commit",
)
UNTIED = "--disable-bias-linear --untie-embeddings-and-output-weights"


@dataclass(frozen=True)
class Layout:
    """A pipeline of one rank a stage."""

    stages: int
    interleaved: bool
    mode: str

    def __str__(self) -> str:
        return f"PP{self.stages}-{'interleaved' if self.interleaved else '1F1B'}-{self.mode}"

    @property
    def ranks(self) -> list[int]:
        """First, middle and last."""
        return sorted({0, self.stages // 2, self.stages - 1})

    def scenario(self, iterations: int, flags: str = UNTIED) -> Scenario:
        """Its training run."""
        chunks = " --num-layers-per-virtual-pipeline-stage 1" if self.interleaved else ""
        words = f"--pipeline-model-parallel-size {self.stages}{chunks} --train-iters {iterations} {flags}"
        layers = self.stages * (2 if self.interleaved else 1)
        # The interleaved schedule wants a multiple of the stages.
        samples = 9 if self.stages == 3 else 8
        return Scenario(str(self), words, world_size=self.stages, layers=layers, samples=samples)


def local_job(lab: Lab, scenario: Scenario, tmp_path: Path, memory: Path, mode: str, *extra: str) -> AgentJob:
    """A job of the scenario under an agent."""
    flags = sparse_flags(memory, "job", WINDOW, mode, "--sparse-ckpt-reorder", "off", *extra)
    arguments = [*scenario.arguments(lab.corpus), *flags]
    return AgentJob(tmp_path, scenario.world_size, arguments, faults=list(scenario.faults))


def assert_exact(lab: Lab, scenario: Scenario, campaign: Campaign) -> None:
    """The job ended well, equals the undisturbed run in every bit, and left nothing behind."""
    assert campaign.outcome.ok, campaign.output[-6000:]
    compared, differing = differences(lab.reference(scenario), campaign.outcome)
    assert compared > 50 and not differing, differing[:10]
    assert not campaign.left


def assert_local(campaign: Campaign, deaths: int, mode: str) -> None:
    """Every death was made good by a localized recovery; only the dead were replaced, only who failed replayed."""
    recoveries = campaign.completed()
    assert [r.decision["source"] for r in recoveries] == ["local"] * len(recoveries), [r.decision for r in recoveries]
    # Two ranks that stand in neighbouring iterations can die within one recovery.
    assert sum(len(r.decision["replaced"]) for r in recoveries) == deaths, campaign.output[-3000:]
    assert sum(len(lives) - 1 for lives in campaign.processes.values()) == len(campaign.told("injected"))
    bound = WINDOW + 1 if mode == "rolling" else 2 * WINDOW + 1
    for recovery in recoveries:
        replaced = {r for r, lives in campaign.processes.items() if recovery.generation in generations(lives)}
        # One rank a stage: ranks are stages. What is replayed is the stages that were lost, and nothing else.
        scope = set(recovery.decision["scope"])
        assert set(recovery.replays) <= scope and replaced <= scope
        assert all(len(steps) <= bound for steps in recovery.replays.values()), recovery


def generations(lives: list[dict[str, int]]) -> set[int]:
    """Which generations a rank's processes have joined first."""
    return {life["generation"] for life in lives}


def one_after_another(faults: list[str], first: int = FIRST, apart: int = 2) -> tuple[str, int]:
    """A plan that has one fault every few iterations, and how many iterations it needs; `{i}` is the iteration."""
    plan = [fault.replace("{i}", str(first + apart * number)) for number, fault in enumerate(faults)]
    return "; ".join(plan), first + apart * len(faults) + 2


LAYOUTS = [
    Layout(stages, interleaved, mode)
    for stages, interleaved, mode in itertools.product((2, 3, 4), (False, True), ("rolling", "fixed"))
]


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_kill_at_every_point_on_every_stage(lab: Lab, tmp_path: Path, shared_memory: Path, layout: Layout) -> None:
    faults = [f"kill@rank={rank},point={point},iteration={{i}}" for point in POINTS for rank in layout.ranks]
    run_plan(lab, tmp_path, shared_memory, layout, faults)


@pytest.mark.parametrize(
    "layout",
    [Layout(2, True, "fixed"), pytest.param(Layout(3, False, "rolling"), marks=pytest.mark.long)],
    ids=str,
)
def test_kills_of_every_stage(lab: Lab, tmp_path: Path, shared_memory: Path, layout: Layout) -> None:
    """The representative part: different points, all stages, the same stage twice in a row."""
    points = ("forward:5", "backward:0", "updated", "optimizer", "capture")
    ranks = [*layout.ranks, layout.ranks[-1], 0]
    faults = [f"kill@rank={r},point={p},iteration={{i}}" for r, p in zip(ranks, points, strict=False)]
    run_plan(lab, tmp_path, shared_memory, layout, faults)


def run_plan(lab: Lab, tmp_path: Path, memory: Path, layout: Layout, faults: list[str], apart: int = 1) -> Campaign:
    """Runs a plan of single faults and checks everything that holds for such a plan."""
    plan, iterations = one_after_another(faults, apart=apart)
    scenario = layout.scenario(iterations)
    job = local_job(lab, scenario, tmp_path, memory, layout.mode)
    job.plan = plan
    campaign = job.run()
    assert_exact(lab, scenario, campaign)
    assert len(campaign.told("injected")) == len(faults)
    assert_local(campaign, len(faults), layout.mode)
    return campaign


PHASES = (
    # The replacement dies in every phase of its recovery, again and again.
    "kill@rank=1,point=forward,iteration=5",
    *(f"kill@rank=1,point={point}" for point in ("join", "agree", "convert", "catch_up", "meet")),
    # One after another a survivor dies in every phase.
    "kill@rank=1,point=backward:3,iteration=9; kill@rank=0,point=join,iteration=9",
    "kill@rank=1,point=forward:3,iteration=12; kill@rank=2,point=agree,iteration=12",
    "kill@rank=1,point=forward:3,iteration=15; kill@rank=0,point=wait,iteration=15",
    "kill@rank=1,point=backward:1,iteration=18; kill@rank=2,point=serve,iteration=17",
    "kill@rank=1,point=capture,iteration=21; kill@rank=2,point=meet,iteration=21",
    "kill@rank=2,point=forward:1,iteration=24; kill@rank=2,point=catch_up,iteration=23",
    # Two at once: in adjacent stages, in stages apart.
    "kill@rank=0+1,point=begin,iteration=27",
    "kill@rank=0+2,point=begin,iteration=30",
)


@pytest.mark.parametrize("mode", ["rolling", pytest.param("fixed", marks=pytest.mark.long)])
def test_failures_in_every_phase_of_a_recovery(lab: Lab, tmp_path: Path, shared_memory: Path, mode: str) -> None:
    scenario = Layout(3, False, mode).scenario(33)
    job = local_job(lab, scenario, tmp_path, shared_memory, mode)
    job.plan = "; ".join(PHASES)
    campaign = job.run()
    assert_exact(lab, scenario, campaign)
    completed = campaign.completed()
    assert [recovery.decision["source"] for recovery in completed] == ["local"] * len(completed), campaign.output
    assert [[0], [2]] in [recovery.segments for recovery in completed], "stages apart recover apart"
