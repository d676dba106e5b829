"""A rank that trains, then replays some stages alone from their neighbours' transcripts, and compares every bit.

Run in place of `pretrain_gpt.py`. The environment variable BOUNDARY_LAB holds JSON: `scope`, the stages that replay,
`overlap`, whether the interleaved schedule overlaps its exchange, and `folder`, where each rank writes what it found.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from megatron.moevement import arguments
from megatron.moevement.errors import MoevementError
from megatron.moevement.events import EventLog
from megatron.moevement.integration import distributed, state_digest
from megatron.moevement.integration.boundary import (
    boundary_of,
    boundary_recorder,
    log_boundary,
    replay_boundary,
)
from megatron.moevement.integration.bundle_exchange import BundleExchange
from megatron.moevement.integration.forward import run_forward_backward
from megatron.moevement.integration.job import TrainingJob, build_job
from megatron.moevement.integration.log_copy import HostCopier
from megatron.moevement.integration.operator_state import OperatorState
from megatron.moevement.transcript.keys import Direction
from megatron.moevement.transcript.log import TranscriptLog, transcript_path
from megatron.moevement.transcript.packing import Bundle
from megatron.moevement.transcript.plan import plan_transcript
from moevement_ext import CopyEngine, DigestPool
from tests.unit.integration.saved import Saved, train_one

FIRST, LAST = 1, 3


class Lab:
    """This rank's job, its transcript, and what has been found so far."""

    def __init__(self, job: TrainingJob, folder: Path, scope: list[int]) -> None:
        self.job, self.scope, digests = job, frozenset(scope), DigestPool()
        self.state = OperatorState(job, CopyEngine())
        boundary = boundary_of(job)
        self.pipeline = boundary.pipeline
        self.inside = self.pipeline.stage in scope
        plan = plan_transcript(boundary, LAST, 0.0, 1 << 30)
        content = {"rank": dist.get_rank(), "run_id": "run"}
        self.log = TranscriptLog.create(transcript_path(folder, dist.get_rank()), content, plan.shape, digests)
        events, troubles = EventLog(None, dist.get_rank()), list[dict[str, Any]]()
        events.listen(troubles.append)
        self.recorder = boundary_recorder(job, self.log, HostCopier(), events)
        group = job.topology.groups.pp
        self.exchange = BundleExchange(self.pipeline, dist.get_process_group_ranks(group), group, digests)
        self.saved: dict[int, Saved] = {}
        self.gradients: dict[int, dict[str, str]] = {}
        self.found: dict[str, Any] = {"compared": 0, "different": [], "refused": {}, "troubles": troubles}

    def compare(self, what: str, one: dict[str, str], other: dict[str, str]) -> None:
        """Notes which values differ."""
        self.found["compared"] += len(one)
        self.found["different"] += [f"{what}: {name}" for name in differing(one, other)]

    def passes(self, iteration: int) -> dict[str, str]:
        """Forward and backward passes of an iteration; digests of all gradients and of the loss."""
        self.job.reset_temporary_state()
        loss = run_forward_backward(self.job, iteration)
        tensors = {} if loss is None else {"loss": loss}
        for number, chunk in enumerate(self.job.chunks):
            tensors |= {f"{number}.{name}": p.main_grad for name, p in chunk.named_parameters()}
        return {n: xxhash.xxh3_128_hexdigest(t.detach().contiguous().view(-1).view(torch.uint8).numpy())
                for n, t in tensors.items()}  # fmt: skip

    def train(self) -> dict[str, str]:
        """Trains from FIRST to LAST; returns digests of the state and of what was reported."""
        self.saved[FIRST].restore(self.state)
        self.job.step = FIRST
        history = {}
        while self.job.step < LAST:
            self.job.reset_temporary_state()
            record = train_one(self.job)
            history[f"iteration {record.iteration}"] = repr(record)
        return {**state_digest.digest_state(state_digest.training_state(self.job)), **history}

    def originals(self) -> None:
        """States and gradients of the iterations, while everything is logged."""
        self.saved[FIRST].restore(self.state)
        self.job.step = FIRST
        for iteration in range(FIRST, LAST):
            self.saved[iteration] = Saved(self.state, iteration)
            self.gradients[iteration] = self.passes(iteration)
            self.saved[iteration].restore(self.state)
            self.job.reset_temporary_state()
            train_one(self.job)

    def replay(self, iteration: int, change: Callable[[list[Bundle]], list[Bundle]] = list) -> dict[str, str]:
        """Replays an iteration on the stages of the scope; the others only give their transcripts.

        Returns digests of the gradients, those of the original where the stage doesn't replay.
        """
        bundles = self.exchange.deliver(self.log, iteration, self.scope)
        gradients = self.gradients[iteration]
        if self.inside:
            communicator = replay_boundary(self.job, self.recorder, self.scope)
            for bundle in change(bundles):
                communicator.feed(bundle)
            self.saved[iteration].restore(self.state)
            self.job.step = iteration
            try:
                gradients = self.passes(iteration)
            finally:
                log_boundary(self.job, self.recorder)
        dist.barrier()
        return gradients

    def frozen(self) -> None:
        """A replay in which experts get no weight gradients; what is sent must be equal all the same."""
        experts = [p for c in self.job.chunks for name, p in c.named_parameters() if "experts" in name]
        for parameter in experts:
            parameter.requires_grad_(False)
        found = self.replay(FIRST)
        for parameter in experts:
            parameter.requires_grad_(True)
        others = {name: value for name, value in self.gradients[FIRST].items() if "experts" not in name}
        self.compare("with frozen experts", others, {name: found[name] for name in others})

    def refusal(self, name: str, change: Callable[[list[Bundle]], list[Bundle]]) -> None:
        """A replay with a changed transcript, which must be noticed."""
        try:
            different = differing(self.gradients[FIRST], self.replay(FIRST, change))
            self.found["refused"][name] = f"{len(different)} gradients differ" if different else ""
        except MoevementError as error:
            self.found["refused"][name] = f"{type(error).__name__}: {error}"
            dist.barrier()


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names whose values differ."""
    return [name for name in {*one, *other} if one.get(name) != other.get(name)]


def shifted(bundles: list[Bundle]) -> list[Bundle]:
    """Every record under the key of the one after it."""
    changed = []
    for bundle in bundles:
        keys = [record.key for record in bundle.records]
        records = [dataclasses.replace(r, key=k) for r, k in zip(bundle.records, keys[1:] + keys[:1], strict=True)]
        changed.append(dataclasses.replace(bundle, records=tuple(records)))
    return changed


def dropped(bundles: list[Bundle]) -> list[Bundle]:
    """Without the last record."""
    return [dataclasses.replace(bundle, records=bundle.records[:-1]) for bundle in bundles]


def exchanged(bundles: list[Bundle]) -> list[Bundle]:
    """The bytes of two records exchanged under the right keys, as a shifted log would have it."""
    for bundle in bundles:
        first, second = bundle.records[0].data, bundle.records[1].data
        kept = bytes(first)
        first[:] = second
        second[:] = kept
    return bundles


def flipped(bundles: list[Bundle]) -> list[Bundle]:
    """One bit of a verified record, of a number's exponent."""
    for bundle in bundles:
        bundle.records[0].data[1] ^= 2
    return bundles


def main() -> int:
    """The rank's program."""
    request = json.loads(os.environ["BOUNDARY_LAB"])
    config, _ = arguments.parse(sys.argv[1:])
    job = build_job(config, distributed.start(config))
    # Core's own choice for overlap; the product's configuration has it off.
    job.model_config.overlap_p2p_comm = request["overlap"]
    lab = Lab(job, Path(request["folder"]), request["scope"])
    train_one(job)
    lab.saved[FIRST] = Saved(lab.state, FIRST)
    without = lab.train()
    log_boundary(job, lab.recorder)
    lab.compare("logging on and off", without, lab.train())
    lab.originals()
    lab.recorder.settle()
    lab.found["iterations"] = sorted(lab.log.iterations)
    sent = {i: [r.digest for d in Direction for r in lab.log.records(i, d)] for i in range(FIRST, LAST)}
    for iteration in range(FIRST, LAST):
        lab.compare(f"replay of {iteration}", lab.gradients[iteration], lab.replay(iteration))
    lab.frozen()
    lab.recorder.settle()
    again = {i: [r.digest for d in Direction for r in lab.log.records(i, d)] for i in range(FIRST, LAST)}
    lab.compare("sends", {str(i): str(v) for i, v in sent.items()}, {str(i): str(v) for i, v in again.items()})
    lab.found["sent"] = len(sent[FIRST])
    for change in (shifted, dropped, exchanged, flipped):
        lab.refusal(change.__name__, change)
    Path(request["folder"], f"found.rank{dist.get_rank()}.json").write_text(json.dumps(lab.found))
    dist.barrier()
    distributed.stop()
    return 0
