"""Localized recovery of other jobs and from other failures: layouts, hangs, lost memory, wrong replays, by lot."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.conftest import Lab
from tests.distributed.test_local_recovery import UNTIED, Layout, assert_exact, local_job
from tests.support.recoveries import AgentJob, Campaign
from tests.support.scenario import Scenario

pytestmark = pytest.mark.distributed

PP2 = "--pipeline-model-parallel-size 2"
PP2_EP2 = PP2 + " --expert-model-parallel-size 2"
OVERLAPS = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
BIAS = "--moe-router-load-balancing-type none --moe-router-enable-expert-bias --moe-router-score-function sigmoid"
OVERFLOW = ({"point": "overflow", "iteration": 7, "generation": None},)
KILLS = (
    "kill@rank=3,point=forward:1,iteration=5; kill@rank=0,point=backward:1,iteration=6; "
    "kill@rank=1,point=decided,iteration=7; kill@rank=2,point=updated,iteration=8; "
    # Two at once in one stage, then one of them again.
    "kill@rank=2+3,point=begin,iteration=9; kill@rank=2,point=forward:2,iteration=10; "
    "kill@rank=1,point=optimizer,iteration=11; kill@rank=0,point=after_optimizer,iteration=12"
)


@dataclass(frozen=True)
class Kind:
    """A job and its faults; `sources` are those that a recovery of it may have."""

    scenario: Scenario
    plan: str = KILLS
    sources: tuple[str, ...] = ("local",)
    mode: str = "rolling"
    long: bool = True
    extra: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.scenario.name}-{self.mode}"


def scenario(name: str, flags: str, untied: bool = True, **more: object) -> Scenario:
    """Fifteen iterations of a pipeline of two stages."""
    flags += f" --train-iters 15 --disable-bias-linear {UNTIED if untied else ''}"
    return Scenario(name, flags, **more)  # type: ignore[arg-type]


KINDS = [
    Kind(scenario("dp2-overlaps", f"{PP2} {OVERLAPS}"), long=False, extra=("--sparse-ckpt-reorder", "on")),
    Kind(scenario("dp2-overlaps-interleaved", f"{PP2} {OVERLAPS} --num-layers-per-virtual-pipeline-stage 1", layers=4)),
    Kind(scenario("dp2-dropout", PP2, dropout=0.1), mode="fixed"),
    Kind(scenario("ep2-dropout", PP2_EP2, dropout=0.1), extra=("--sparse-ckpt-reorder", "on")),
    Kind(scenario("ep2-bias", PP2_EP2, balance=BIAS)),
    Kind(scenario("ep2-tied", PP2_EP2, untied=False), sources=("local", "global")),
    Kind(
        scenario(
            "ep2-fp16-overflow",
            PP2_EP2 + " --initial-loss-scale 4096 --loss-scale-window 3",
            precision="--fp16",
            faults=OVERFLOW,
        )
    ),
    Kind(scenario("tp2", PP2 + " --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1")),
    Kind(scenario("tied-pp4", "--pipeline-model-parallel-size 4", untied=False, layers=4)),
    # All roll back together, next to dense checkpoints that the survivors have just written.
    Kind(scenario("one-stage", "--expert-model-parallel-size 2", untied=False), sources=("global", "dense")),
]


@pytest.mark.parametrize(
    "kind", [pytest.param(k, id=str(k), marks=[pytest.mark.long] if k.long else []) for k in KINDS]
)
def test_other_jobs_are_as_exact(lab: Lab, tmp_path: Path, shared_memory: Path, kind: Kind) -> None:
    save = ["--save", str(tmp_path / "dense"), "--save-interval", "1"] if "dense" in kind.sources else []
    job = local_job(lab, kind.scenario, tmp_path, shared_memory, kind.mode, *kind.extra, *save)
    job.plan = kind.plan
    campaign = job.run()
    assert_exact(lab, kind.scenario, campaign)
    sources = [recovery.decision["source"] for recovery in campaign.completed()]
    told = "\n".join(json.dumps(recovery.decision) for recovery in campaign.recoveries())
    assert len(sources) >= 6 and set(sources) <= set(kind.sources), told


SIMPLE = Layout(3, False, "rolling").scenario(16)


def test_stopped_failing_and_starving_workers(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    job = local_job(lab, SIMPLE, tmp_path, shared_memory, "rolling")
    job.plan = (
        "stop@rank=0,point=optimizer,iteration=6; exception@rank=1,point=backward:1,iteration=8; "
        "oom@rank=2,point=forward:2,iteration=10; exception@rank=2,point=convert"
    )
    campaign = job.run()
    assert_exact(lab, SIMPLE, campaign)
    assert {recovery.decision["source"] for recovery in campaign.completed()} == {"local"}
    assert "rank 0: was stopped for 2 s" in campaign.output and "injected: " in campaign.output
    assert [len(lives) for lives in campaign.processes.values()] == [2, 2, 3]


@pytest.mark.long
def test_hung_workers(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    """Also between iterations, and in a recovery: who replays, and who serves."""
    job = local_job(lab, SIMPLE, tmp_path, shared_memory, "rolling")
    job.flags = ("--hang-timeout-seconds", "12")
    job.plan = (
        "hang@rank=0,point=forward:1,iteration=6; hang@rank=2,point=begin,iteration=8; "
        "kill@rank=1,point=forward,iteration=10; hang@rank=1,point=catch_up; hang@rank=2,point=serve,iteration=9; "
        "kill@rank=0,point=begin,iteration=12; hang@rank=1,point=join,iteration=12"
    )
    campaign = job.run()
    assert_exact(lab, SIMPLE, campaign)
    noticed = campaign.output.count("no progress for") + campaign.output.count("did not leave the failed generation")
    assert len(campaign.told("injected")) == 7 and noticed >= 5


EARLY_AND_LATE = (
    "kill@rank=1,point=start; kill@rank=2,point=begin,iteration=0; kill@rank=0,point=forward:1,iteration=1; "
    "kill@rank=1,point=updated,iteration=2; kill@rank=2,point=after_optimizer,iteration=15; "
    "kill@rank=0,point=dense_save,iteration=16"
)


@pytest.mark.long
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_very_beginning_and_the_very_end(lab: Lab, tmp_path: Path, shared_memory: Path, dropout: float) -> None:
    layout = Layout(3, False, "rolling")
    calm = layout.scenario(16)
    dropping = Scenario(calm.name, calm.flags, world_size=3, layers=3, dropout=dropout)
    job = local_job(lab, dropping, tmp_path, shared_memory, "rolling", "--save", str(tmp_path / "dense"))
    job.plan = EARLY_AND_LATE
    campaign = job.run()
    assert_exact(lab, dropping, campaign)
    assert len(campaign.told("injected")) == 6
    assert not (shared_memory / "job").exists(), "the last step is durable: nothing stays in shared memory"


@pytest.mark.long
def test_a_run_with_an_exit_interval_ends_where_it_would_have(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    """Although a rank dies after the last iteration of the interval, and another one in that recovery."""
    ending = Layout(3, False, "rolling").scenario(16, f"{UNTIED} --exit-interval 8")
    job = local_job(lab, ending, tmp_path, shared_memory, "rolling", "--save", str(tmp_path / "dense"))
    job.plan = "kill@rank=1,point=dense_save,iteration=8; kill@rank=0,point=meet"
    campaign = job.run()
    assert_exact(lab, ending, campaign)
    assert len(campaign.told("injected")) == 2
    assert max(event["iteration"] for event in campaign.told("iteration")) == 7


def test_who_has_not_updated_yet_rolls_forward(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    """Rank 1 is lost when its input of iteration 7 has come, so rank 0 has updated, and rank 2 has not."""
    job = local_job(lab, SIMPLE, tmp_path, shared_memory, "rolling")
    job.plan = "kill@rank=1,point=forward:0,iteration=7"
    job.faults.append({"point": "hold_before_update", "rank": 2, "iteration": 6})
    campaign = job.run()
    assert_exact(lab, SIMPLE, campaign)
    (recovery,) = campaign.completed()
    decision = recovery.decision
    assert (decision["source"], decision["target"], decision["roll_forward"]) == ("local", 7, [2])
    assert recovery.segments == [[1]]


def test_a_worker_that_is_lost_before_training(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    """The others wait for it in their first groups: they have nothing to keep, and all begin anew at once."""
    job = local_job(lab, SIMPLE, tmp_path, shared_memory, "rolling")
    # More patience than the test has.
    job.flags = ("--start-timeout-seconds", "1100")
    struck = list[int]()

    def strike(running: AgentJob) -> None:
        # Its first life, and the second one.
        lives = running.processes()[1]
        if len(lives) > len(struck) and len(struck) < 2:
            struck.append(lives[-1]["pid"])
            os.kill(struck[-1], signal.SIGSTOP)

    job.meanwhile = strike
    campaign = job.run()
    assert_exact(lab, SIMPLE, campaign)
    assert len(struck) == 2 and "Traceback" not in campaign.output, campaign.output[-4000:]


@pytest.mark.long
def test_lost_while_the_window_is_still_measured(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    """All go on from a dense checkpoint, and must choose the window in the same iteration: that is collective."""
    calm = Layout(3, False, "rolling").scenario(16)
    save = ("--save", str(tmp_path / "dense"), "--save-interval", "3")
    job = local_job(lab, calm, tmp_path, shared_memory, "rolling", *save, "--sparse-ckpt-window", "auto")
    job.plan = "kill@rank=1,point=backward,iteration=5"
    campaign = job.run()
    assert_exact(lab, calm, campaign)
    assert [recovery.decision["source"] for recovery in campaign.completed()] == ["dense"]
    assert {event["rank"] for event in campaign.told("slot")} == {0, 1, 2}, "slots are taken afterwards"
    assert not list(shared_memory.rglob(".bandwidth*"))


def lossy(lab: Lab, tmp_path: Path, memory: Path, suffixes: list[str], *extra: str) -> Campaign:
    """Rank 1 is killed twice and loses files the first time."""
    job = local_job(lab, SIMPLE, tmp_path, memory, "rolling", *extra)
    job.plan = "kill@rank=1,point=forward:1,iteration=7; kill@rank=2,point=forward:1,iteration=12"
    lost = {"point": "lose_files", "rank": 1, "generation": 1, "directory": str(memory / "job"), "suffixes": suffixes}
    job.faults.append(lost)
    campaign = job.run()
    assert_exact(lab, SIMPLE, campaign)
    return campaign


@pytest.mark.long
@pytest.mark.parametrize(
    ("suffixes", "save", "sources"),
    [
        ([".transcript"], False, ["local", "local"]),
        ([".slots", ".transcript"], True, ["dense", "local"]),
        ([".slots", ".transcript"], False, ["scratch", "local"]),
    ],
)
def test_what_a_lost_node_held(
    lab: Lab, tmp_path: Path, shared_memory: Path, suffixes: list[str], save: bool, sources: list[str]
) -> None:
    extra = ["--save", str(tmp_path / "dense"), "--save-interval", "4"] if save else []
    campaign = lossy(lab, tmp_path, shared_memory, suffixes, *extra)
    found = [recovery.decision["source"] for recovery in campaign.completed()]
    assert [found[0], found[-1]] == sources, found
    assert ("dense checkpoint of step 4 loaded" in campaign.output) == save


@pytest.mark.long
def test_a_transcript_above_its_limit(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    job = local_job(lab, SIMPLE, tmp_path, shared_memory, "rolling", "--sparse-ckpt-transcript-memory-gib", "1e-6")
    job.plan = "kill@rank=1,point=forward:1,iteration=7; kill@rank=2,point=forward:1,iteration=12"
    campaign = job.run()
    assert_exact(lab, SIMPLE, campaign)
    assert [recovery.decision["source"] for recovery in campaign.completed()] == ["global", "global"]
    assert campaign.told("transcript_off")


CONTROL = Layout(3, False, "rolling").scenario(10)


def controlled(lab: Lab, tmp_path: Path, memory: Path, point: str, rank: int, generation: int) -> Campaign:
    """Rank 1 is killed once; something is wrong in the recovery."""
    job: AgentJob = local_job(lab, CONTROL, tmp_path, memory, "rolling")
    job.plan = "kill@rank=1,point=forward:1,iteration=7"
    job.faults.append({"point": point, "rank": rank, "generation": generation, "bit": 20})
    return job.run()


@pytest.mark.parametrize(
    ("point", "rank", "generation", "says"),
    [
        pytest.param("shift_keys", 0, 0, "belongs", marks=pytest.mark.long),
        pytest.param("drop_record", 2, 0, "records of", marks=pytest.mark.long),
        ("flip_delivered_bit", 1, 1, "not exact"),
        pytest.param("flip_restored_bit", 1, 1, "not exact", marks=pytest.mark.long),
    ],
)
def test_a_wrong_replay_is_noticed(
    lab: Lab, tmp_path: Path, shared_memory: Path, point: str, rank: int, generation: int, says: str
) -> None:
    campaign = controlled(lab, tmp_path, shared_memory, point, rank, generation)
    assert not campaign.outcome.ok and says in campaign.output, campaign.output[-3000:]
    assert "Traceback" not in campaign.output and not campaign.left


@pytest.mark.long
@pytest.mark.parametrize("offset", [0, 3, 500])
def test_a_flipped_transcript_byte_costs_a_global_rollback(
    lab: Lab, tmp_path: Path, shared_memory: Path, offset: int
) -> None:
    job = local_job(lab, CONTROL, tmp_path, shared_memory, "rolling")
    job.plan = "kill@rank=1,point=forward:1,iteration=7"
    job.faults.append({"point": "flip_transcript_byte", "rank": 0, "generation": 0, "offset": offset})
    campaign = job.run()
    assert_exact(lab, CONTROL, campaign)
    assert [recovery.decision["source"] for recovery in campaign.completed()] == ["global"]


CAMPAIGNS = [
    (Layout(3, False, "rolling"), "kill"),
    (Layout(2, True, "fixed"), "kill"),
    (Layout(4, False, "fixed"), "kill+stop"),
    (Layout(4, True, "rolling"), "kill+exception+oom"),
]


@pytest.mark.long
@pytest.mark.parametrize(("layout", "kinds"), CAMPAIGNS, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_faults_by_lot(lab: Lab, tmp_path: Path, shared_memory: Path, layout: Layout, kinds: str, seed: int) -> None:
    """At any moment, also in recoveries, on any rank."""
    campaign_scenario = layout.scenario(240)
    job = local_job(lab, campaign_scenario, tmp_path, shared_memory, layout.mode, "--sparse-ckpt-reorder", "on")
    job.plan = f"random@seed={seed},mtbf=6s,kinds={kinds},until=235"
    # The slower the machine, the more faults come between two iterations.
    job.flags = ("--max-failures-without-progress", "500")
    campaign = job.run()
    assert_exact(lab, campaign_scenario, campaign)
    recoveries = campaign.recoveries()
    summary = {"completed": len(campaign.completed()), "begun": len(recoveries), "seconds": campaign.seconds}
    print(json.dumps({"campaign": str(layout), "seed": seed, **summary}))
    assert campaign.told("injected")
