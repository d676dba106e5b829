"""Ranks for the tests of dense checkpoints.

Reads a JSON line `{"scenario", "folder", "ranks", "flags", "port"}`, forks that many ranks, each a process of its own
that shares only the imports, and answers with their exit codes. A scenario writes what it found to
`<folder>/<scenario>.rank<r>.json`, and what it prints to `<scenario>.rank<r>.log`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.moevement import arguments
from megatron.moevement.errors import MoevementError
from megatron.moevement.integration import cpu_backend, quiet

quiet.quiet_core_warnings()
if os.environ.get("MOEVEMENT_TEST_DEVICE") != "cuda":
    cpu_backend.hide_cuda()
    cpu_backend.install()

import torch
import torch.distributed as dist

from megatron.moevement.dense import directory as layout
from megatron.moevement.integration import corpus as corpora
from megatron.moevement.integration import distributed, state_digest, train_loop
from megatron.moevement.integration.dense_checkpoint import find_dense, load_dense, save_dense
from megatron.moevement.integration.job import TrainingJob, build_job
from megatron.moevement.integration.optimizer_setup import inner_optimizers

SAVED, LAST = 3, 5


def train_to(job: TrainingJob, step: int) -> list[str]:
    """Trains up to `step`; returns exact losses and gradient norms."""
    for chunk in job.chunks:
        chunk.train()
    outcomes = [train_loop.train_iteration(job, train_loop.NoHooks()) for _ in range(step - job.step)]
    job.gather_parameters()
    return [f"{o.loss.hex()} {o.grad_norm} {o.skipped} {o.loss_scale}" for o in outcomes]


def digest(job: TrainingJob) -> dict[str, str]:
    """Digests of the whole state of this rank."""
    return state_digest.digest_state(state_digest.training_state(job))


def addresses(job: TrainingJob) -> dict[str, int]:
    """Where weights, master weights and moments lie."""
    kinds = ("parameter/", "optimizer/")
    state = state_digest.training_state(job)
    return {n: t.data_ptr() for n, t in state.items() if n.startswith(kinds) and not n.endswith("/step")}


def save(job: TrainingJob, folder: Path) -> dict[str, Any]:
    """Train, save, train on."""
    first = train_to(job, SAVED)
    before = digest(job)
    result = save_dense(job, folder / "save")
    at_saved = digest(job)
    history = train_to(job, LAST)
    return {
        "ok": result.ok,
        "error": result.error,
        "nbytes": result.nbytes,
        "disturbed": [name for name, value in before.items() if at_saved.get(name) != value],
        "saved": at_saved,
        "first": first,
        "final": digest(job),
        "history": history,
    }


def load(job: TrainingJob, folder: Path) -> dict[str, Any]:
    """Load over another state, train on; then again with one bit of a moment flipped."""
    distributed.seed_everything(99)
    train_to(job, 1)
    held = addresses(job)
    newest = find_dense(folder / "save")
    load_dense(job, folder / "save", SAVED)
    found = {
        "newest": newest.step,
        "step": job.step,
        "loaded": digest(job),
        "same_addresses": held.items() <= addresses(job).items(),
        "history": train_to(job, LAST),
        "final": digest(job),
    }
    load_dense(job, folder / "save", SAVED)
    if dist.get_rank() == 0:
        member = inner_optimizers(job.optimizer)[0]
        moment = member.optimizer.state[member.param_groups[0]["params"][0]]["exp_avg"]
        moment.view(torch.int32).reshape(-1)[0] ^= 1 << 23
    found["flipped_history"] = train_to(job, LAST)
    found["flipped_final"] = digest(job)
    return found


def fail(job: TrainingJob, folder: Path) -> dict[str, Any]:
    """Saves that can't succeed, each followed by proof that training and the former checkpoint are unharmed."""
    save, small, rank = folder / "save", folder / "small", dist.get_rank()
    train_to(job, 1)
    found: dict[str, Any] = {"first": save_dense(job, save).ok}
    train_to(job, 2)
    found["too_small"] = save_dense(job, small).error
    # The free space shrinks after it was looked at.
    layout.free_bytes = lambda path: 1 << 40
    found["disk_full"] = save_dense(job, small).error
    found["left_on_full_disk"] = sorted(os.listdir(small))
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    found["one_rank"] = save_dense(job, save).error
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if rank == 0:
        (folder / "a_file").write_text("")
    found["not_a_directory"] = save_dense(job, folder / "a_file").error
    found["newest_after_failures"] = find_dense(save).step
    train_to(job, 3)
    found["retry"] = save_dense(job, save).ok
    found["again"] = save_dense(job, save).ok
    found["names"] = sorted(os.listdir(save))
    found["refused"] = damage(job, save, folder)
    return found


def damage(job: TrainingJob, save: Path, folder: Path) -> dict[str, Any]:
    """What loading says to a flipped bit, to a foreign checkpoint, and after both, to the older one."""
    path = layout.checkpoint_path(save, 3)
    answers: dict[str, Any] = {}
    before = digest(job)
    if dist.get_rank() == 0:
        victim = next(path.glob("__1_*"))
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    dist.barrier()
    for name, step in (("flipped", 3), ("absent", 77)):
        try:
            load_dense(job, save, step)
        except MoevementError as error:
            answers[name] = f"{type(error).__name__}: {error}"
    dist.barrier()
    if dist.get_rank() == 0:
        (path / "moevement.json").unlink()
    dist.barrier()
    try:
        load_dense(job, save, 3)
    except MoevementError as error:
        answers["foreign"] = f"{type(error).__name__}: {error}"
    answers["unchanged"] = before == digest(job)
    load_dense(job, save, find_dense(save, before=3).step or 0)
    answers["older"] = job.step
    return answers


def crash(job: TrainingJob, folder: Path) -> dict[str, Any]:
    """Rank 1 dies in the middle of its second save."""
    train_to(job, SAVED)
    result = save_dense(job, folder / "save")
    final = digest(job)
    (folder / f"before_crash.rank{dist.get_rank()}.json").write_text(json.dumps({"ok": result.ok, "state": final}))
    train_to(job, SAVED + 1)
    if dist.get_rank() == 1:
        os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
    save_dense(job, folder / "save")
    raise AssertionError("a save went on without one of its ranks")


def after_crash(job: TrainingJob, folder: Path) -> dict[str, Any]:
    """The former checkpoint is found and loads; the next save clears what the crash left."""
    newest = find_dense(folder / "save")
    load_dense(job, folder / "save", newest.step or 0)
    found = {"newest": newest.step, "loaded": digest(job), "left": sorted(os.listdir(folder / "save"))}
    train_to(job, SAVED + 1)
    found["ok"] = save_dense(job, folder / "save").ok
    found["cleared"] = sorted(os.listdir(folder / "save"))
    return found


def mismatch(job: TrainingJob, folder: Path) -> dict[str, Any]:
    """Loading with other flags than the checkpoint was made with."""
    try:
        load_dense(job, folder / "save", SAVED)
    except MoevementError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    return {"refused": ""}


def write_corpus(folder: Path) -> None:
    """The sources of some modules, by bytes."""
    library = Path(os.__file__).parent
    texts = ((library / name).read_text() for name in ("os.py", "ast.py", "inspect.py", "typing.py"))
    corpora.write_corpus(texts, str(folder / "corpus"), "ByteLevelTokenizer")


SCENARIOS = (save, load, fail, crash, after_crash, mismatch)
_GRACE_SECONDS = 20.0


def rank_main(request: dict[str, Any]) -> None:
    """Runs the scenario on this rank."""
    folder = Path(request["folder"])
    if request["scenario"] == "corpus":
        write_corpus(folder)
        return
    config, _ = arguments.parse(request["flags"])
    job = build_job(config, distributed.start(config))
    scenario = {function.__name__: function for function in SCENARIOS}[request["scenario"]]
    found = scenario(job, folder)
    (folder / f"{request['scenario']}.rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    distributed.stop()


def fork_rank(request: dict[str, Any], rank: int) -> int:
    """Forks one rank; returns its pid in the parent."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(
            Path(request["folder"]) / f"{request['scenario']}.rank{rank}.log",
            os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
            0o644,
        )
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {"WORLD_SIZE": str(request["ranks"]), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
        rank_main(request)
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_ranks(request: dict[str, Any]) -> list[int]:
    """Runs all ranks of a request; once one has failed, the others get a short time to end."""
    pids = [fork_rank(request, rank) for rank in range(request["ranks"])]
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(pids):
        time.sleep(0.02)
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def main() -> None:
    """Serves requests until standard input closes."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run_ranks(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
