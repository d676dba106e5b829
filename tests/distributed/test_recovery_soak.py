"""Fifty recoveries in one job: what the survivor holds doesn't grow with them."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.conftest import Lab
from tests.distributed.test_local_recovery import Layout, assert_exact, local_job
from tests.support.recoveries import AgentJob

pytestmark = [pytest.mark.distributed, pytest.mark.long]

RECOVERIES = 50
SETTLED = 10
"""Recoveries after which everything has been allocated once."""
GROWTH_MIB = 16
"""Less than a hundredth of what one leaked model, slot file or import a recovery would add up to."""


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    resident_mib: float
    descriptors: int
    threads: int
    mappings: int

    @classmethod
    def of(cls, pid: int) -> "Held":
        """Of a process that runs."""
        place = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
        mapped = [line for line in (place / "maps").read_text().splitlines() if "/dev/shm" in line]
        resident = int(status["VmRSS"].split()[0]) / 1024
        return cls(resident, len(os.listdir(place / "fd")), int(status["Threads"]), len(mapped))


class Watch:
    """Looks at rank 0 and at the files after every recovery, while it trains."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self.held: dict[int, Held] = {}
        self.files: dict[int, list[str]] = {}

    def look(self, job: AgentJob) -> None:
        """Notes what there is, unless a failure came between."""
        before = self._quiet(job)
        if not before or before in self.held:
            return
        held = Held.of(job.processes()[0][-1]["pid"])
        files = sorted(str(path.relative_to(self._memory)) for path in self._memory.rglob("*"))
        if self._quiet(job) == before:
            self.held[before], self.files[before] = held, [name for name in files if "injected" not in name]

    def _quiet(self, job: AgentJob) -> int:
        """Recoveries so far if training goes on and a further iteration is through, else 0."""
        kinds = [event["kind"] for event in job.events()[0]]
        resumed, failed = kinds.count("resumed"), kinds.count("failure_noticed")
        return resumed if resumed == failed and "resumed" in kinds and kinds[-1] in ("iteration", "slot") else 0


def test_fifty_recoveries_leave_nothing_behind(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    iterations = 5 + 4 * RECOVERIES + 4
    scenario = Layout(2, False, "rolling").scenario(iterations)
    points = ("forward:1", "backward:2", "updated", "begin", "decided", "commit")
    faults = [
        f"kill@rank=1,point={points[number % len(points)]},iteration={5 + 4 * number}" for number in range(RECOVERIES)
    ]
    job = local_job(lab, scenario, tmp_path, shared_memory, "rolling", "--sparse-ckpt-reorder", "on")
    job.plan = "; ".join(faults)
    watch = Watch(shared_memory)
    job.meanwhile = watch.look
    campaign = job.run()
    assert_exact(lab, scenario, campaign)
    assert len(campaign.completed()) == RECOVERIES and len(campaign.processes[0]) == 1
    seen = sorted(number for number in watch.held if number >= SETTLED)
    first, last = watch.held[seen[0]], watch.held[seen[-1]]
    assert seen[-1] - seen[0] >= RECOVERIES // 2, f"too few looks: {seen}"
    print({number: watch.held[number] for number in (seen[0], seen[len(seen) // 2], seen[-1])})
    assert (first.threads, first.mappings) == (last.threads, last.mappings)
    assert last.resident_mib - first.resident_mib < GROWTH_MIB
    assert watch.files[seen[0]] == watch.files[seen[-1]]
    # Sockets of the present generation come and go; one that a recovery leaves behind would be one for each.
    assert last.descriptors - first.descriptors < (seen[-1] - seen[0]) // 2
