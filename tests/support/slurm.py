"""A real Slurm on virtual hosts: slurmctld on `ctl`, a slurmd as the first process of each other host."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support import agents
from tests.support.hosts import Hosts

PATIENCE_SECONDS = 240.0
# A look starts a client of Slurm's.
wait = functools.partial(agents.wait, seconds=PATIENCE_SECONDS, pause=0.1)

_CONF = """\
ClusterName=lab
SlurmctldHost=ctl({controller})
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
# A requeued job waits as long as a credential lives: two minutes otherwise.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=0
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
TCPTimeout=2
KillWait=5
UnkillableStepTimeout=15
JobRequeue=1
MinJobAge=300
NodeName=n[1-{count}] NodeAddr={network}.[1-{count}] Port=17000 CPUs=4 RealMemory=4000
PartitionName=lab Nodes=n[1-{count}] Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The cluster.

    Args:
        hosts: all their numbered ones become nodes.
        folder: for configuration, state and logs.
    """

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self._hosts, self._conf = hosts, folder / "slurm.conf"
        nodes = [name for name in hosts.names if name != "ctl"]
        controller = hosts.address("ctl")
        values = {"controller": controller, "network": controller.rpartition(".")[0], "count": len(nodes)}
        self._conf.write_text(_CONF.format(folder=folder, **values))
        # slurmd wants some cgroup plugin even where no other plugin uses cgroups.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "state").mkdir()
        self._environment = {**os.environ, "SLURM_CONF": str(self._conf)}
        hosts.boot("ctl", ["slurmctld", "-D", "-f", str(self._conf)], self._environment)
        for name in nodes:
            (folder / "spool" / name).mkdir(parents=True)
            self.start_node(name)
        wanted = dict.fromkeys(nodes, "idle")
        wait(lambda: self.nodes() == wanted, lambda: f"{self.nodes()}\n{hosts.said('ctl')}\n{hosts.said('n1')}")

    def start_node(self, name: str) -> None:
        """Boots a host with its slurmd."""
        self._hosts.boot(name, ["slurmd", "-D", "-N", name, "-f", str(self._conf)], self._environment)

    def client(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        """Runs one of Slurm's commands beside the controller; what it printed."""
        command = self._hosts.inside("ctl", words)
        values = {**self._environment, **(environment or {})}
        done = subprocess.run(command, env=values, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def nodes(self) -> dict[str, str]:
        """Each node's state."""
        try:
            lines = self.client("sinfo", "-N", "-h", "-o", "%N %T").splitlines()
        except AssertionError:
            return {}  # the controller isn't up yet
        return {name: state for line in lines for name, state in [line.split()]}

    def submit(self, words: Sequence[str], environment: Mapping[str, str]) -> int:
        """`sbatch` with these words; the job's number."""
        return int(self.client("sbatch", "--parsable", *words, environment=environment))

    def job(self, number: int) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.client("scontrol", "show", "job", "-o", str(number)).split()
        said = dict(word.split("=", 1) for word in words if "=" in word)
        return {name: said[name] for name in ("JobState", "ExitCode", "Restarts", "NodeList")}

    def cancel(self, number: int) -> None:
        """Ends a job."""
        self.client("scancel", str(number))
