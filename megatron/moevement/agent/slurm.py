"""What Slurm's environment says of a node's place in the job; one agent a node, started by one `srun`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Below the ports that Linux gives to clients, and above most services'.
_FIRST_PORT, _PORTS = 20000, 12000
_RUN = "start the agents with srun --ntasks-per-node=1"


class NotUnderSlurm(Exception):
    """The environment is not that of one task of a step with one task a node; the message says what to do."""


@dataclass(frozen=True)
class Place:
    """A node's place in the job.

    Attributes:
        nnodes: nodes of the job, spares not counted.
        node_rank: None: a spare.
        head: the first node, and a port that goes by the job's number.
        gpus: on this node; 0 where Slurm gave none.
    """

    nnodes: int
    node_rank: int | None
    head: tuple[str, int]
    gpus: int


def place(environment: Mapping[str, str], spares: int) -> Place:
    """The place of this task's node; the last `spares` nodes of the step are spares.

    Raises:
        NotUnderSlurm: variables are missing, this is not the only task of its node, or all nodes would be spares.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST", "SLURM_NODEID", "SLURM_LOCALID")
    missing = [name for name in names if name not in environment]
    if missing:
        raise NotUnderSlurm(f"{missing[0]} is not set; {_RUN}")
    if environment["SLURM_LOCALID"] != "0":
        raise NotUnderSlurm(f"SLURM_LOCALID is {environment['SLURM_LOCALID']}: this node has several tasks; {_RUN}")
    nodes = int(environment["SLURM_STEP_NUM_NODES"])
    if spares >= nodes:
        raise NotUnderSlurm(f"the step has {nodes} nodes and {spares} of them would be spares; give --spares less")
    node = int(environment["SLURM_NODEID"])
    port = _FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _PORTS
    return Place(
        nnodes=nodes - spares,
        node_rank=node if node < nodes - spares else None,
        head=(first_host(environment["SLURM_STEP_NODELIST"]), port),
        gpus=int(environment.get("SLURM_GPUS_ON_NODE") or 0),
    )


def first_host(nodes: str) -> str:
    """The first name of a list as Slurm writes it: `rack[1-2]n[07-12,20],login` is `rack1n07` and others."""
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", entry[0] if entry else "")
