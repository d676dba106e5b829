"""The agent is told to stop: all ranks end after the same iteration, save, and a later start goes on bit-identical."""

import re
import signal
from collections.abc import Callable
from os import kill
from pathlib import Path

import pytest

from tests.distributed.conftest import Lab
from tests.distributed.test_local_recovery import UNTIED, assert_exact
from tests.support.recoveries import AgentJob
from tests.support.scenario import Scenario, sparse_flags

pytestmark = pytest.mark.distributed

SCENARIO = Scenario("stop", f"--pipeline-model-parallel-size 2 --train-iters 16 {UNTIED}", world_size=2)
STOP_AT = 5


def tells(number: signal.Signals, times: int = 1) -> Callable[[AgentJob], None]:
    """Sends the signal to the agent once every rank has come to iteration `STOP_AT`."""
    sent = {"n": 0}

    def look(job: AgentJob) -> None:
        reached = [
            any(e["kind"] == "iteration" and e["iteration"] >= STOP_AT for e in es) for es in job.events().values()
        ]
        if all(reached) and sent["n"] < times:
            (agent,) = [int(line.split()[0]) for line in job.left() if "moevement.agent --nproc" in line]
            kill(agent, number)
            sent["n"] += 1

    return look


def job_of(lab: Lab, folder: Path, *flags: str) -> AgentJob:
    """Slowed down, so that it is still training when it is told."""
    sparse = sparse_flags(folder / "slots", "job", 2, "rolling", "--sparse-ckpt-reorder", "off")
    faults = [{"point": "slow", "seconds": 0.2, "generation": None}]
    return AgentJob(folder, SCENARIO.world_size, [*SCENARIO.arguments(lab.corpus), *sparse, *flags], faults=faults)


def undisturbed(job: AgentJob) -> AgentJob:
    """The same job, started again."""
    job.meanwhile, job.faults = None, []
    return job


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_it_saves_and_goes_on_from_the_checkpoint(lab: Lab, tmp_path: Path, number: signal.Signals) -> None:
    dense = str(tmp_path / "dense")
    job = job_of(lab, tmp_path, "--save", dense, "--load", dense)
    job.meanwhile = tells(number)
    stopped = job.run()
    assert stopped.outcome.statuses == [75], stopped.output
    assert f"stopping after this iteration: agent 0 was told to ({number.name})" in stopped.output
    (said,) = re.findall(r"the job stops: .* after iteration (\d+), a dense checkpoint is in", stopped.output)
    assert int(said) > STOP_AT and not stopped.left and not stopped.recoveries()
    assert not list((tmp_path / "slots").glob("*/*")), "nothing is left in the host's memory"
    campaign = undisturbed(job).run()
    assert f"dense checkpoint of step {said} loaded" in campaign.output
    assert_exact(lab, SCENARIO, campaign)


@pytest.mark.long
def test_without_a_place_to_save_it_goes_on_from_slots(lab: Lab, tmp_path: Path) -> None:
    job = job_of(lab, tmp_path)
    job.meanwhile = tells(signal.SIGTERM)
    stopped = job.run()
    assert stopped.outcome.statuses == [75] and "slots are kept in" in stopped.output, stopped.output
    campaign = undisturbed(job).run()
    (start,) = [line for line in campaign.output.splitlines() if line.startswith("start: ")]
    assert "slots" in start, start
    assert_exact(lab, SCENARIO, campaign)


@pytest.mark.long
def test_told_twice_it_stops_at_once_and_goes_on_from_slots(lab: Lab, tmp_path: Path) -> None:
    dense = str(tmp_path / "dense")
    job = job_of(lab, tmp_path, "--save", dense, "--load", dense)
    job.meanwhile = tells(signal.SIGTERM, times=2)
    stopped = job.run()
    assert stopped.outcome.statuses == [75] and "the job ends: agent 0 was told to (SIGTERM)" in stopped.output
    assert_exact(lab, SCENARIO, undisturbed(job).run())
