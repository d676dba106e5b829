"""One rank of a pipeline that logs an iteration and replays a stage of it alone.

torchrun --nproc-per-node N tests/gpu/boundary_rank.py FOLDER FLAGS...

Without an optimizer step the state stays that of Step 0, so that the iteration can be run as often as needed. Rank r
writes what it found to FOLDER/found.rank<r>.json.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.moevement import arguments
from megatron.moevement.integration import cpu_backend, quiet

quiet.quiet_core_warnings()
if "--use-cpu" in sys.argv:
    cpu_backend.hide_cuda()
    cpu_backend.install()

import torch
import torch.distributed as dist

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.events import EventLog
from megatron.moevement.integration import distributed
from megatron.moevement.integration.attach import copy_engine
from megatron.moevement.integration.boundary import (
    boundary_of,
    boundary_recorder,
    log_boundary,
    replay_boundary,
)
from megatron.moevement.integration.bundle_exchange import BundleExchange
from megatron.moevement.integration.forward import run_forward_backward
from megatron.moevement.integration.job import TrainingJob, build_job
from megatron.moevement.integration.log_copy import log_copier
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.transcript_memory import TranscriptMemory
from moevement_ext import DigestPool

SCOPE = frozenset({1})


def passes(job: TrainingJob) -> list[torch.Tensor]:
    """Iteration 0; its gradients, on the host."""
    job.reset_temporary_state()
    run_forward_backward(job, 0)
    return [p.main_grad.cpu().clone() for chunk in job.chunks for p in chunk.parameters()]


def study(job: TrainingJob, folder: Path) -> dict[str, Any]:
    """What this rank finds; `folder`, in shared memory, is for the transcript."""
    config = SparseCheckpointConfig(enabled=True, directory=folder, keep=True)
    events, told, digests = EventLog(None, dist.get_rank()), list[dict[str, Any]](), DigestPool(2)
    events.listen(told.append)
    engine, boundary = copy_engine(job.topology.device, config), boundary_of(job)
    memory = TranscriptMemory(config, dist.get_rank(), engine, digests, events)
    control = dist.new_group(backend="gloo")
    log = memory.create(boundary, 2, "run", Agreement(control), dist.get_world_size())
    assert log is not None
    memory.wait_until_pinned()
    recorder = boundary_recorder(job, log, log_copier(engine, job.topology.device), events)
    plain = passes(job)
    log_boundary(job, recorder)
    logged = passes(job)
    recorder.settle()
    members = dist.get_process_group_ranks(job.topology.groups.pp)
    bundles = BundleExchange(boundary.pipeline, members, control, digests).deliver(log, 0, SCOPE)
    replayed = logged
    if boundary.pipeline.stage in SCOPE:
        communicator = replay_boundary(job, recorder, SCOPE)
        for bundle in bundles:
            communicator.feed(bundle)
        replayed = passes(job)
    recorder.close()
    found = {
        "log_is_invisible": all(torch.equal(a, b) for a, b in zip(plain, logged, strict=True)),
        "replay_is_exact": all(torch.equal(a, b) for a, b in zip(logged, replayed, strict=True)),
        "gradients": sum(int(gradient.count_nonzero()) > 0 for gradient in replayed),
        "bundles": len(bundles),
        "troubles": [event for event in told if event["kind"] != "transcript"],
    }
    dist.barrier()
    memory.give_back(log, keep=False)
    engine.close()
    return found


def main() -> int:
    """The rank's program."""
    folder, sys.argv[1:] = Path(sys.argv[1]), sys.argv[2:]
    config, _ = arguments.parse(sys.argv[1:])
    job = build_job(config, distributed.start(config))
    for chunk in job.chunks:
        chunk.train()
    # As in a job: the kernel pins no pages of a file on a disk, and copies to them would be slow.
    shared = Path(f"/dev/shm/moevement-boundary-{os.getppid()}")
    try:
        found = study(job, shared)
    finally:
        shutil.rmtree(shared, ignore_errors=True)
    (folder / f"found.rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
