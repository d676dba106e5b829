"""How soon a failure is agreed on, with the agent's own limits: the times are printed, not asserted."""

import re
from pathlib import Path

import pytest

from megatron.moevement.agent.head import Limits
from tests.distributed.conftest import Lab
from tests.distributed.test_local_recovery import Layout, assert_exact, local_job

pytestmark = [pytest.mark.distributed, pytest.mark.long]
SCENARIO = Layout(3, False, "rolling").scenario(14)


@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_from_the_failure_to_the_agreement(lab: Lab, tmp_path: Path, shared_memory: Path, kind: str) -> None:
    job = local_job(lab, SCENARIO, tmp_path, shared_memory, "rolling")
    limit = Limits().hang_seconds
    job.flags = ("--hang-timeout-seconds", str(limit), "--replacement", "warm")
    job.plan = f"{kind}@rank=1,point=forward:2,iteration=9"
    campaign = job.run()
    assert_exact(lab, SCENARIO, campaign)
    struck = campaign.told("injected")[0]["time"]
    agreed = min(event["time"] for event in campaign.told("decision") if event["time"] > struck)
    print(f"{kind}: {agreed - struck:.2f} s from the failure to the agreement")
    if kind == "hang":
        # It was the limit that ended the wait, not a time-out of the collectives.
        words = r"rank 1: no progress for (\d+) s in 'forward and backward' while others wait"
        silent = re.search(words, campaign.output)
        assert silent is not None and int(silent.group(1)) >= int(limit)
