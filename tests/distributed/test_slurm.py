"""The agent and its batch script under a real Slurm on virtual hosts: workers, hosts and links fail."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.distributed.conftest import Lab
from tests.distributed.test_local_recovery import UNTIED, assert_exact
from tests.support.hosts import Hosts, alive, remedy
from tests.support.launcher import ROOT
from tests.support.recoveries import AgentJob, Campaign
from tests.support.scenario import Scenario, sparse_flags
from tests.support.slurm import Slurm, wait

pytestmark = [pytest.mark.distributed, pytest.mark.long]

FLAGS = f"--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --train-iters 40 {UNTIED}"
SCENARIO = Scenario("slurm", FLAGS, world_size=4)
FAULT = 12
"""Iteration that the job has begun when something is done to it."""
SAVE_INTERVAL = 5
NODES = 4
BATCH_SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"


@dataclass
class Cluster:
    """A job of four ranks on two nodes and its cluster of four."""

    hosts: Hosts
    slurm: Slurm
    job: AgentJob
    folder: Path
    number: int = 0
    began: float = field(default_factory=time.monotonic)

    def submit(self, spares: int, *flags: str) -> None:
        """Hands the job to Slurm, with these flags of `sbatch`."""
        output = self.folder / "output.txt"
        words = [f"--nodes={2 + spares}", f"--output={output}", f"--chdir={ROOT}", *flags, str(BATCH_SCRIPT)]
        words += ["--spares", str(spares), "--nproc-per-node", "2", *self.job.words()]
        environment = {**self.job.environment(), "PYTHON": sys.executable, "TMPDIR": str(self.folder)}
        self.number = self.slurm.submit(words, environment)

    def tell(self, what: str) -> None:
        """A line with the time, for people."""
        print(f"{time.monotonic() - self.began:6.1f} s: {what}", flush=True)

    def wait_for_iteration(self, iteration: int) -> None:
        """Until every rank has told of it."""

        def reached() -> bool:
            told = self.job.events()
            return all(any(e["kind"] == "iteration" and e["iteration"] >= iteration for e in told[r]) for r in told)

        wait(reached, self.complain)
        self.tell(f"iteration {iteration}")

    def wait_for_output(self, text: str) -> None:
        """Until somebody has printed it."""
        wait(lambda: text in self.output(), lambda: f"{text!r}\n{self.complain()}")
        self.tell(text)

    def output(self) -> str:
        """What the job has printed so far."""
        path = self.folder / "output.txt"
        return path.read_text() if path.exists() else ""

    def complain(self) -> str:
        """What is known when something doesn't come."""
        return f"{self.slurm.nodes()}\n{self.slurm.job(self.number)}\n{self.output()[-6000:]}"

    def wait_for_end(self) -> Campaign:
        """Until Slurm says that the job is over; how it ended."""
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        state = wait(lambda: (s := self.slurm.job(self.number)["JobState"]) in states and s, self.complain)
        said = self.slurm.job(self.number)
        self.tell(f"Slurm: { ({name: said[name] for name in ('JobState', 'ExitCode', 'Restarts', 'NodeList')}) }")
        wait(lambda: not self.job.left(), lambda: "\n".join(self.job.left()))
        code = int(said["ExitCode"].partition(":")[0])
        assert (state == "COMPLETED") == (code == 0)
        return self.job.campaign(code, self.job.left(), time.monotonic() - self.began)

    def pids(self, rank: int) -> list[tuple[str, int]]:
        """Host and pid of every process that a rank has had."""
        return [(life["host"], life["pid"]) for life in self.job.processes()[rank]]

    def workers(self, lives: dict[int, list[tuple[str, int]]], ranks: tuple[int, ...]) -> list[int]:
        """The pids on this machine of the ranks' newest processes."""
        return [self.hosts.find(*lives[rank][-1]) for rank in ranks]

    def wait_for_deaths(self, pids: list[int]) -> None:
        """Until the processes are gone."""
        wait(lambda: not any(alive(pid) for pid in pids), self.complain, seconds=60)
        self.tell(f"processes {pids} have ended")


@pytest.fixture
def cluster(lab: Lab, tmp_path: Path) -> Iterator[Cluster]:
    installed = subprocess.run([ROOT / "scripts" / "slurm" / "install.sh"], capture_output=True, text=True, timeout=500)
    missing = remedy()
    if installed.returncode and not missing:
        missing = f"needs Slurm; scripts/slurm/install.sh says: {installed.stderr.strip().splitlines()[-1]}"
    if missing:
        pytest.skip(missing)
    sparse = sparse_flags(Path("/dev/shm/slots"), "job", 2, "rolling", "--sparse-ckpt-reorder", "off")
    dense = [
        "--save",
        str(tmp_path / "dense"),
        "--load",
        str(tmp_path / "dense"),
        "--save-interval",
        str(SAVE_INTERVAL),
    ]
    # A busy machine makes no node silent.
    flags = ("--heartbeat-timeout-seconds", "6")
    faults = [{"point": "slow", "seconds": 0.4, "generation": None}]
    arguments = [*SCENARIO.arguments(lab.corpus), *sparse, *dense]
    job = AgentJob(tmp_path, SCENARIO.world_size, arguments, faults=faults, flags=flags)
    cluster_folder = tmp_path / "cluster"
    cluster_folder.mkdir()
    hosts = Hosts(NODES, cluster_folder)
    try:
        yield Cluster(hosts, Slurm(hosts, cluster_folder), job, tmp_path)
    finally:
        hosts.close()
        job.kill_what_is_left()


def test_a_killed_worker_is_replaced_on_its_node(cluster: Cluster, lab: Lab) -> None:
    cluster.submit(spares=1)
    cluster.wait_for_iteration(FAULT)
    before = {rank: cluster.pids(rank) for rank in range(4)}
    os.kill(cluster.hosts.find(*before[3][-1]), signal.SIGKILL)
    cluster.tell("rank 3 killed")
    cluster.wait_for_output("generation 1 opens")
    campaign = cluster.wait_for_end()
    assert_exact(lab, SCENARIO, campaign)
    assert [recovery.decision["source"] for recovery in campaign.completed()] == ["local"]
    assert [cluster.pids(rank) for rank in range(3)] == [before[rank] for rank in range(3)]
    assert [host for host, _ in cluster.pids(3)] == ["n2", "n2"]
    assert cluster.slurm.job(cluster.number)["Restarts"] == "0"


def test_a_crashed_host_is_replaced_by_the_spare(cluster: Cluster, lab: Lab) -> None:
    cluster.submit(spares=1)
    cluster.wait_for_iteration(FAULT)
    before = {rank: cluster.pids(rank) for rank in range(4)}
    cluster.hosts.crash("n2")
    cluster.tell("n2 crashed")
    cluster.wait_for_output("generation 1 opens")
    campaign = cluster.wait_for_end()
    assert_exact(lab, SCENARIO, campaign)
    assert_taken_over(cluster, campaign, before)


def assert_taken_over(cluster: Cluster, campaign: Campaign, before: dict[int, list[tuple[str, int]]]) -> None:
    """Ranks 2 and 3 went from n2 to the spare n3, in one life of the job; the others kept their processes."""
    assert [cluster.pids(rank) for rank in (0, 1)] == [before[0], before[1]]
    assert [[host for host, _ in cluster.pids(rank)] for rank in (2, 3)] == [["n2", "n3"]] * 2
    # The slots of the lost node are lost with its memory.
    assert [recovery.decision["source"] for recovery in campaign.completed()] == ["dense"]
    assert cluster.slurm.job(cluster.number)["Restarts"] == "0"


def test_a_host_that_is_cut_off_fences_itself(cluster: Cluster, lab: Lab) -> None:
    cluster.submit(spares=1)
    cluster.wait_for_iteration(FAULT)
    before = {rank: cluster.pids(rank) for rank in range(4)}
    workers = cluster.workers(before, (2, 3))
    cluster.hosts.cut("n2")
    cluster.tell("n2 cut off")
    cluster.wait_for_deaths(workers)
    assert "takes over" not in cluster.output(), "they end before anybody takes their ranks over"
    cluster.wait_for_output("generation 1 opens")
    cluster.hosts.mend("n2")
    cluster.tell("n2 is back")
    campaign = cluster.wait_for_end()
    assert_exact(lab, SCENARIO, campaign)
    assert_taken_over(cluster, campaign, before)
    assert "this node fences itself" in campaign.output


def test_a_lost_head_is_requeued_elsewhere(cluster: Cluster, lab: Lab) -> None:
    cluster.submit(spares=1)
    cluster.wait_for_iteration(FAULT)
    workers = cluster.workers({rank: cluster.pids(rank) for rank in range(4)}, (2, 3))
    cluster.hosts.crash("n1")
    cluster.tell("n1 crashed")
    # What they print is lost with srun, which was on n1.
    cluster.wait_for_deaths(workers)
    assert cluster.slurm.job(cluster.number)["Restarts"] == "0", "they have ended by themselves"
    campaign = cluster.wait_for_end()
    assert_exact(lab, SCENARIO, campaign)
    assert_requeued(cluster, campaign, "n1")


def test_a_head_that_is_cut_off_meets_no_later_life(cluster: Cluster, lab: Lab) -> None:
    """Neither side can go on: both stop, Slurm's side requeues, the other one must leave the second life alone."""
    cluster.submit(spares=1)
    cluster.wait_for_iteration(FAULT)
    lives = {rank: cluster.pids(rank) for rank in range(4)}
    workers = [*cluster.workers(lives, (0, 1)), *cluster.workers(lives, (2, 3))]
    cluster.hosts.cut("n1")
    cluster.tell("n1 cut off")
    cluster.wait_for_deaths(workers)
    wait(lambda: all(len(cluster.pids(rank)) == 2 for rank in range(4)), cluster.complain)
    cluster.hosts.mend("n1")
    cluster.tell(f"n1 is back in the second life, with {len(cluster.hosts.processes('n1'))} processes")
    campaign = cluster.wait_for_end()
    assert_exact(lab, SCENARIO, campaign)
    assert_requeued(cluster, campaign, "n1")


def test_no_spare_left_is_requeued(cluster: Cluster, lab: Lab) -> None:
    cluster.submit(spares=0)
    cluster.wait_for_iteration(FAULT)
    cluster.hosts.crash("n2")
    cluster.tell("n2 crashed")
    cluster.wait_for_output("is lost and no spare with 2 slots is left")
    cluster.wait_for_output("status 75; requeueing")
    campaign = cluster.wait_for_end()
    assert_exact(lab, SCENARIO, campaign)
    assert_requeued(cluster, campaign, "n2")


def assert_requeued(cluster: Cluster, campaign: Campaign, lost: str) -> None:
    """The job has had two lives, the second one without the lost host and from a dense checkpoint."""
    assert cluster.slurm.job(cluster.number)["Restarts"] == "1"
    lives = [[host for host, _ in cluster.pids(rank)] for rank in range(4)]
    assert [life[0] for life in lives] == ["n1", "n1", "n2", "n2"]
    assert all(len(life) == 2 and life[1] != lost for life in lives), lives
    loaded = [line for line in campaign.output.splitlines() if "dense checkpoint of step" in line and "loaded" in line]
    assert len(loaded) == 1, campaign.output[-4000:]


def test_a_stopped_job_goes_on_from_slots_on_the_same_nodes(cluster: Cluster, lab: Lab) -> None:
    cluster.job.flags += ("--max-failures", "0")
    cluster.submit(0, "--nodelist=n1,n2")
    cluster.wait_for_iteration(FAULT)
    (worker,) = cluster.workers({1: cluster.pids(1)}, (1,))
    os.kill(worker, signal.SIGKILL)
    cluster.wait_for_output("more than 0 failures")
    campaign = cluster.wait_for_end()
    assert_exact(lab, SCENARIO, campaign)
    assert cluster.slurm.job(cluster.number)["Restarts"] == "1"
    starts = [line for line in campaign.output.splitlines() if line.startswith("start: ")]
    assert len(starts) == 2 and "slots" in starts[1], starts


def test_a_job_whose_time_is_up_stops_and_goes_on_in_its_next_life(cluster: Cluster, lab: Lab) -> None:
    cluster.submit(0, "--nodelist=n1,n2", "--time=5")
    cluster.wait_for_iteration(FAULT)
    # What Slurm does two minutes before the limit.
    cluster.slurm.client("scancel", "--batch", "--signal=USR1", str(cluster.number))
    cluster.wait_for_output("the time limit is near")
    campaign = cluster.wait_for_end()
    assert_exact(lab, SCENARIO, campaign)
    assert cluster.slurm.job(cluster.number)["Restarts"] == "1"
    (stopped,) = re.findall(r"the job stops: .* after iteration (\d+), a dense checkpoint is in", campaign.output)
    assert f"dense checkpoint of step {stopped} loaded" in campaign.output, campaign.output[-4000:]


def test_a_cancelled_job_leaves_nothing_behind(cluster: Cluster) -> None:
    cluster.submit(spares=1)
    cluster.wait_for_iteration(1)
    cluster.slurm.cancel(cluster.number)
    wait(lambda: cluster.slurm.job(cluster.number)["JobState"] == "CANCELLED", cluster.complain)
    wait(lambda: not cluster.job.left(), lambda: "\n".join(cluster.job.left()))
    assert cluster.slurm.job(cluster.number)["Restarts"] == "0"


def test_bad_input_is_not_requeued(cluster: Cluster) -> None:
    cluster.job.arguments += ["--no-such-flag"]
    cluster.submit(spares=1)
    campaign = cluster.wait_for_end()
    assert campaign.outcome.statuses == [2] and "--no-such-flag" in campaign.output
    assert cluster.slurm.job(cluster.number)["Restarts"] == "0"
