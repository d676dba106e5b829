"""The agent's command line."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.moevement.agent.head import Limits
from megatron.moevement.agent.slurm import NotUnderSlurm, place
from megatron.moevement.agent.spawn import KINDS
from megatron.moevement.arguments import OneLineParser

PROGRAM = "python -m megatron.moevement.agent"
PRELOAD = "megatron.moevement.integration.preload"
LOCALHOST = "127.0.0.1"


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        node_rank: None for a spare.
        head: host and port of the head's store; port 0: any.
        script: the training script and its arguments.
    """

    nproc_per_node: int
    nnodes: int
    node_rank: int | None
    head: tuple[str, int]
    replacement: str
    preload: tuple[str, ...]
    limits: Limits
    grace_seconds: float
    script: tuple[str, ...]


def parse(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> Options:
    """The options; a bad one is one line on standard error and exit status 2."""
    parser = _parser()
    given = parser.parse_args(argv)
    for flag in ("nproc_per_node", "nnodes"):
        if getattr(given, flag) is not None and getattr(given, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} {getattr(given, flag)}: give 1 or more")
    _place(parser, given, environment)
    for flag in ("max_failures", "max_failures_without_progress"):
        if getattr(given, flag) < 0:
            parser.error(f"--{flag.replace('_', '-')} {getattr(given, flag)}: give 0 or more")
    for flag in ("heartbeat_timeout", "hang_timeout", "start_timeout", "stop_timeout", "grace"):
        seconds = getattr(given, f"{flag}_seconds")
        if not (math.isfinite(seconds) and (seconds > 0 or (seconds == 0 and flag == "stop_timeout"))):
            least = "0 or more" if flag == "stop_timeout" else "a number of seconds above 0"
            parser.error(f"--{flag.replace('_', '-')}-seconds {seconds}: give {least}")
    if given.heartbeat_timeout_seconds < 1:
        parser.error(f"--heartbeat-timeout-seconds {given.heartbeat_timeout_seconds}: give 1 or more")
    if not Path(given.script).is_file():
        parser.error(f"SCRIPT {given.script}: no such file; give the path of the training script")
    preload = tuple(name for name in given.preload.split(",") if name)
    for name in preload if given.replacement != "cold" else ():
        if not _importable(name):
            parser.error(f"--preload {name}: no such module; give names that Python can import")
    return Options(
        nproc_per_node=given.nproc_per_node,
        nnodes=given.nnodes,
        node_rank=_node_rank(parser, given),
        head=_head(parser, given),
        replacement=given.replacement,
        preload=preload,
        limits=Limits(
            failures=given.max_failures,
            idle_failures=given.max_failures_without_progress,
            hang_seconds=given.hang_timeout_seconds,
            start_seconds=given.start_timeout_seconds,
            heartbeat_seconds=given.heartbeat_timeout_seconds,
            stop_seconds=given.stop_timeout_seconds,
        ),
        grace_seconds=given.grace_seconds,
        script=(given.script, *given.arguments),
    )


def _place(parser: OneLineParser, given: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Fills in what isn't given: by Slurm's environment, or for one node."""
    if given.slurm:
        for flag, value in (("--nnodes", given.nnodes), ("--node-rank", given.node_rank)):
            if value is not None:
                parser.error(f"{flag} {value}: Slurm says it; leave it out, or --slurm")
        if given.spare:
            parser.error("--spare: Slurm says which nodes are spares; give their number as --spares")
        spares = given.spares or 0
        if spares < 0:
            parser.error(f"--spares {spares}: give 0 or more")
        try:
            found = place(environment, spares)
        except NotUnderSlurm as error:
            parser.error(f"--slurm: {error}")
        given.nnodes, given.node_rank, given.spare = found.nnodes, found.node_rank, found.node_rank is None
        given.head = given.head or "{}:{}".format(*found.head)
        given.nproc_per_node = given.nproc_per_node or found.gpus
    elif given.spares is not None:
        parser.error(f"--spares {given.spares}: only with --slurm; start each spare's agent with --spare")
    given.nproc_per_node, given.nnodes = given.nproc_per_node or 1, given.nnodes or 1


def _node_rank(parser: OneLineParser, given: argparse.Namespace) -> int | None:
    rank: int | None = given.node_rank
    if given.spare:
        if rank is not None:
            parser.error(f"--node-rank {rank}: a --spare has none until it takes over; leave one of the two out")
        return None
    if rank is None:
        if given.nnodes > 1:
            parser.error(f"--node-rank is missing: give 0 to {given.nnodes - 1}, or --spare")
        return 0
    if not 0 <= rank < given.nnodes:
        parser.error(f"--node-rank {rank}: give 0 to {given.nnodes - 1}")
    return rank


def _head(parser: OneLineParser, given: argparse.Namespace) -> tuple[str, int]:
    if given.head is None:
        if given.nnodes > 1 or given.spare:
            parser.error("--head is missing: give HOST:PORT of the agent with --node-rank 0")
        return LOCALHOST, 0
    host, _, port = given.head.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        parser.error(f"--head {given.head}: give HOST:PORT")
    return host.strip("[]"), int(port)


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _parser() -> OneLineParser:
    defaults = Limits()
    parser = OneLineParser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="Starts, watches and replaces the workers of one node. Exit status: 0 finished, 2 bad input, "
        "75 stopped cleanly (start it again to go on).",
    )
    add = parser.add_argument
    text = "workers on this node (default: 1, with --slurm the node's GPUs in the job)"
    add("--nproc-per-node", type=int, metavar="N", help=text)
    add("--nnodes", type=int, metavar="M", help="nodes of the job without spares (default: 1)")
    add("--node-rank", type=int, metavar="I", help="which of the nodes this is; 0 is the head")
    add("--head", metavar="HOST:PORT", help="where the head listens; needed with several nodes")
    add("--spare", action="store_true", help="this node waits until it takes over a lost node's ranks")
    text = "take --nnodes, --node-rank or --spare, and --head from Slurm's environment; one agent a node under srun"
    add("--slurm", action="store_true", help=text)
    add("--spares", type=int, metavar="K", help="with --slurm: the last K nodes are spares (default: 0)")
    kinds = "cold: new process; warm: an idle one with everything imported; fork: a fork of such a one"
    add("--replacement", choices=KINDS, default="warm", help=f"{kinds} (default: warm)")
    text = f"modules that warm and forked workers have imported, by commas (default: {PRELOAD})"
    add("--preload", default=PRELOAD, metavar="MODULES", help=text)
    text = f"deaths of workers after which the job is stopped (default: {defaults.failures})"
    add("--max-failures", type=int, default=defaults.failures, metavar="K", help=text)
    text = f"the same without a new iteration between them (default: {defaults.idle_failures})"
    add("--max-failures-without-progress", type=int, default=defaults.idle_failures, metavar="K", help=text)
    for flag, default, text in (
        ("heartbeat-timeout", defaults.heartbeat_seconds, "silence after which a node is lost"),
        (
            "hang-timeout",
            defaults.hang_seconds,
            "silence of a worker, while others wait, after which it is killed; at least three times the longest before",
        ),
        ("start-timeout", defaults.start_seconds, "for all agents to come, and for a replacement to be ready"),
        (
            "stop-timeout",
            defaults.stop_seconds,
            "to end an iteration and save when the agent is told to stop; 0: at once",
        ),
        ("grace", 20.0, "for workers to end by themselves when the job is stopped; then SIGTERM, then SIGKILL"),
    ):
        add(f"--{flag}-seconds", type=float, default=default, metavar="S", help=f"{text} (default: {default:g})")
    add("script", metavar="SCRIPT", help="the training script")
    add("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    return parser
