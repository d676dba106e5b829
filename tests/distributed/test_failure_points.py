"""A failure at any moment, and damaged slots: an exact recovery from the next source, or a clear refusal."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron.moevement.store.host_store import HostStore
from megatron.moevement.store.lock import hold, release
from tests.distributed.conftest import Lab
from tests.support.launcher import Job, Outcome
from tests.support.scenario import Scenario, differences, sparse_flags

pytestmark = pytest.mark.distributed

SCENARIO = Scenario("pp2-ep2", "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2", dropout=0.1)
KILL = {"point": "forward", "rank": 3, "iteration": 6}


def sparse_job(lab: Lab, directory: Path, memory: Path, *extra: str) -> Job:
    """A job with a window of three slots, rolling."""
    return lab.job(SCENARIO, directory, sparse_flags(memory, "job", 3, "rolling", *extra))


def assert_exact(lab: Lab, outcome: Outcome) -> None:
    """Every value of the reference, bit for bit."""
    assert outcome.ok, outcome.output
    compared, differing = differences(lab.reference(SCENARIO), outcome)
    assert compared > 100 and not differing, differing[:10]


def first_iteration(outcome: Outcome) -> int:
    """Where the last generation began."""
    return min(int(iteration) for iteration in outcome.digests[0]["history"])


def test_snapshots_change_nothing(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    outcome = sparse_job(lab, tmp_path, shared_memory, "--sparse-ckpt-log-dir", str(tmp_path / "events")).run()
    assert_exact(lab, outcome)
    events = [json.loads(line) for line in (tmp_path / "events" / "events.rank00000.jsonl").read_text().splitlines()]
    kinds = [event["kind"] for event in events]
    assert kinds.count("slot") >= 8 and kinds.count("iteration") == 9 and "slot_failed" not in kinds
    last = [event for event in events if event["kind"] == "iteration"][-1]
    assert last["loadable_step"] >= 5 and last["memory_used_bytes"] <= last["memory_limit_bytes"]


def test_killed_again_in_every_phase_of_the_recovery(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    job = sparse_job(lab, tmp_path, shared_memory)
    job.faults += [
        KILL,
        {"point": "load", "rank": 0, "generation": 1, "count": 0},
        {"point": "replay", "rank": 3, "generation": 2, "count": 1},
        {"point": "before_forward", "rank": 1, "generation": 3, "iteration": 6},
        {"point": "optimizer", "rank": 2, "generation": 4, "iteration": 6},
    ]
    job.restarts = 6
    outcome = job.run()
    assert outcome.statuses == [-9, -9, -9, -9, -9, 0], outcome.output
    assert_exact(lab, outcome)
    assert first_iteration(outcome) >= 4


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 12))])
def test_kills_at_random_moments(lab: Lab, tmp_path: Path, shared_memory: Path, seed: int) -> None:
    """SIGKILL from outside, at any moment from the start of the process on, to any worker."""
    dice = random.Random(seed)
    mode, window = dice.choice(["fixed", "rolling"]), dice.randint(1, 4)
    job = lab.job(SCENARIO, tmp_path, sparse_flags(shared_memory, "job", window, mode))
    job.restarts = 6

    def kill_later(generation: int, pids: list[int]) -> None:
        if generation < 5:
            timer = threading.Timer(dice.uniform(0.5, 6.0), _kill, [dice.choice(pids)])
            timer.daemon = True
            timer.start()

    job.started = kill_later
    assert_exact(lab, job.run())


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_two_ranks_die_at_once(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    job = sparse_job(lab, tmp_path, shared_memory)
    job.faults += [KILL, {**KILL, "rank": 0}]
    assert_exact(lab, job.run())


def test_a_failed_capture_does_not_end_training(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    job = sparse_job(lab, tmp_path, shared_memory, "--sparse-ckpt-log-dir", str(tmp_path / "events"))
    job.faults += [{"point": "fail_capture", "iteration": 3, "rank": 1}, {**KILL, "iteration": 8}]
    outcome = job.run()
    assert_exact(lab, outcome)
    assert first_iteration(outcome) >= 6, "a window after the failed slot was complete"
    assert '"slot_failed"' in (tmp_path / "events" / "events.rank00001.jsonl").read_text()


def test_auto_chooses_a_window_and_a_restart_keeps_it(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    flags = sparse_flags(shared_memory, "job", "auto", "rolling", "--sparse-ckpt-measure-iters", "2")
    job = lab.job(SCENARIO, tmp_path, [*flags, "--sparse-ckpt-bandwidth-gib-per-second", "0.002"])
    job.faults.append({**KILL, "iteration": 7})
    assert_exact(lab, job.run())


def flip_data(path: Path, steps: Callable[[list[int]], list[int]]) -> None:
    """Flips one bit in the data of some committed slots."""
    store = HostStore.open(path)
    for step in steps(sorted(store.committed)):
        data, _ = store.data(step)
        data[256] ^= 4  # inside of the first operator; the end of the room is not used by every slot
        data.release()
    store.close()


def test_a_damaged_newest_slot_falls_back_to_the_window_before(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    job = sparse_job(lab, tmp_path, shared_memory)
    job.faults.append(KILL)
    newest: list[int] = []

    def damage(_generation: int) -> None:
        flip_data(shared_memory / "job" / "rank00001.slots", lambda steps: newest.extend(steps[-1:]) or steps[-1:])

    job.between = damage
    outcome = job.run()
    assert_exact(lab, outcome)
    assert 0 < first_iteration(outcome) < newest[0]
    assert "digest of" in outcome.output


@pytest.mark.parametrize("damage", ["all_slots", "file_missing", "file_cut", "superblock", "empty", "unfinished"])
def test_a_lost_rank_starts_from_scratch_and_says_so(
    lab: Lab, tmp_path: Path, shared_memory: Path, damage: str
) -> None:
    job = sparse_job(lab, tmp_path, shared_memory)
    job.faults.append(KILL)
    path = shared_memory / "job" / "rank00002.slots"

    def lose(_generation: int) -> None:
        if damage == "all_slots":
            flip_data(path, lambda steps: steps)
        elif damage == "file_missing":
            path.unlink()
        else:
            content = path.read_bytes()
            damaged = {
                "file_cut": content[:5000],
                "superblock": content[:60] + b"?" + content[61:],
                "empty": b"",
                "unfinished": bytes(len(content)),
            }
            path.write_bytes(damaged[damage])

    job.between = lose
    outcome = job.run()
    assert_exact(lab, outcome)
    assert first_iteration(outcome) == 0 and "scratch" in outcome.output and "rank 2" in outcome.output


@pytest.mark.parametrize("control", ["forget_gradient_norm", "wrong_record", "keep_random_state"])
def test_negative_controls_are_noticed(lab: Lab, tmp_path: Path, shared_memory: Path, control: str) -> None:
    job = sparse_job(lab, tmp_path, shared_memory)
    job.restarts = 1
    job.faults += [KILL, {"point": control, "generation": 1}]
    outcome = job.run()
    noticed = not outcome.ok and "not exact" in outcome.output
    assert noticed or differences(lab.reference(SCENARIO), outcome)[1], "nobody noticed"


def test_without_digests_a_flipped_bit_still_does_not_pass(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    job = sparse_job(lab, tmp_path, shared_memory, "--sparse-ckpt-digest", "off")
    job.restarts = 1
    job.faults.append(KILL)
    job.between = lambda _generation: flip_data(shared_memory / "job" / "rank00001.slots", lambda steps: steps[-4:])
    outcome = job.run()
    noticed = not outcome.ok and "not exact" in outcome.output
    assert noticed or differences(lab.reference(SCENARIO), outcome)[1], "nobody noticed"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["--hidden-size", "48"], "--hidden-size: 32 then, 48 now"),
        (["--seed", "77"], "--seed"),
        (["--sparse-ckpt-window-mode", "fixed"], "--sparse-ckpt-window-mode: rolling then, fixed now"),
        (["--sparse-ckpt-window", "2"], "--sparse-ckpt-window"),
        (["--global-batch-size", "16"], "--global-batch-size"),
        (["--use-distributed-optimizer"], "--use-distributed-optimizer"),
        (["--moe-aux-loss-coeff", "0.5"], "--moe-aux-loss-coeff: 0.01 then, 0.5 now"),
        (["--clip-grad", "0.7"], "--clip-grad: 0.3 then, 0.7 now"),
        (["--adam-beta2", "0.95"], "--adam-beta2: 0.999 then, 0.95 now"),
    ],
)
def test_slots_of_another_run_are_refused(
    lab: Lab, tmp_path: Path, shared_memory: Path, change: list[str], text: str, kept_slots: Path
) -> None:
    shutil.copytree(kept_slots, shared_memory / "job")
    before = {path.name: path.read_bytes() for path in (shared_memory / "job").iterdir()}
    job = sparse_job(lab, tmp_path, shared_memory, *change)
    outcome = job.run()
    assert outcome.statuses == [2], outcome.output
    assert text in outcome.output and "Traceback" not in outcome.output
    assert {path.name: path.read_bytes() for path in (shared_memory / "job").iterdir()} == before, "nothing is lost"


@pytest.fixture(scope="module")
def kept_slots(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slots of a finished run."""
    directory = tmp_path_factory.mktemp("kept")
    outcome = sparse_job(lab, directory, directory, "--sparse-ckpt-keep").run()
    assert outcome.ok, outcome.output
    return directory / "job"


def test_another_world_size_is_refused(lab: Lab, tmp_path: Path, shared_memory: Path, kept_slots: Path) -> None:
    shutil.copytree(kept_slots, shared_memory / "job")
    job = sparse_job(lab, tmp_path, shared_memory)
    job.world_size = 8
    outcome = job.run()
    assert outcome.statuses == [2] and "--nproc-per-node times --nnodes: 4 then, 8 now" in outcome.output, (
        outcome.output
    )


def test_slots_of_a_running_job_are_refused(lab: Lab, tmp_path: Path, shared_memory: Path, kept_slots: Path) -> None:
    shutil.copytree(kept_slots, shared_memory / "job")
    before = {path.name: path.read_bytes() for path in (shared_memory / "job").iterdir()}
    hold(shared_memory / "job" / "rank00002.slots")
    outcome = sparse_job(lab, tmp_path, shared_memory, "--sparse-ckpt-fresh").run()
    release(shared_memory / "job" / "rank00002.slots", remove=False)
    assert outcome.statuses == [2] and "--sparse-ckpt-name job: another running job" in outcome.output, outcome.output
    assert {path.name: path.read_bytes() for path in (shared_memory / "job").iterdir()} == before, "nothing is lost"


def test_an_older_format_is_refused(lab: Lab, tmp_path: Path, shared_memory: Path, kept_slots: Path) -> None:
    shutil.copytree(kept_slots, shared_memory / "job")
    path = shared_memory / "job" / "rank00001.slots"
    with path.open("r+b") as file:
        file.seek(7)
        file.write(b"\0")
    outcome = sparse_job(lab, tmp_path, shared_memory).run()
    assert outcome.statuses == [2] and "slot format 0" in outcome.output, outcome.output


@pytest.fixture
def tiny_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_too_little_memory_is_refused_at_start(lab: Lab, tmp_path: Path, tiny_tmpfs: Path) -> None:
    outcome = sparse_job(lab, tmp_path / "out", tiny_tmpfs).run()
    assert outcome.statuses == [2] and "--sparse-ckpt-dir" in outcome.output, outcome.output
    assert "Traceback" not in outcome.output and not list((tiny_tmpfs / "job").glob("*.slots"))


def test_an_unusable_directory_is_refused(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = sparse_job(lab, tmp_path / "out", tmp_path / "file").run()
    assert outcome.statuses == [2] and "--sparse-ckpt-dir" in outcome.output, outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize("flag", ["--save", "--tensorboard-dir"])
def test_an_output_that_cannot_be_written_is_refused(lab: Lab, tmp_path: Path, shared_memory: Path, flag: str) -> None:
    (tmp_path / "file").write_text("")
    outcome = sparse_job(lab, tmp_path / "out", shared_memory, flag, str(tmp_path / "file" / "below")).run()
    assert outcome.statuses == [2] and f"{flag} {tmp_path}/file/below" in outcome.output, outcome.output
    assert "Traceback" not in outcome.output


def test_total_loss_falls_back_to_the_dense_checkpoint(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    save = tmp_path / "dense"
    job = sparse_job(lab, tmp_path, shared_memory, "--save", str(save), "--save-interval", "4")
    job.faults.append({**KILL, "iteration": 7})
    job.between = lambda _generation: shutil.rmtree(shared_memory / "job")
    outcome = job.run()
    assert_exact(lab, outcome)
    assert first_iteration(outcome) == 4
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "9"
    assert not (shared_memory / "job").exists(), "the last step is durable, the slots are removed"

    again = sparse_job(lab, tmp_path / "again", shared_memory, "--save", str(save), "--exit-interval", "1").run()
    assert again.statuses == [2] and f"--save {save} holds a checkpoint of step 9: add --load" in again.output
    assert "holds a checkpoint" not in outcome.output


def test_killed_in_a_dense_save(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    save = tmp_path / "dense"
    job = sparse_job(lab, tmp_path, shared_memory, "--save", str(save), "--save-interval", "6")
    job.faults.append({"point": "dense_save", "rank": 1, "iteration": 6})
    assert_exact(lab, job.run())
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "9"


def test_a_dense_checkpoint_continues_another_run(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    save = tmp_path / "dense"
    first = sparse_job(lab, tmp_path / "one", shared_memory, "--save", str(save), "--exit-interval", "5").run()
    assert first.ok, first.output
    second = sparse_job(lab, tmp_path / "two", shared_memory, "--load", str(save)).run()
    assert_exact(lab, second)
    assert first_iteration(second) == 5


def test_a_dense_save_without_space_does_not_end_training(
    lab: Lab, tmp_path: Path, shared_memory: Path, tiny_tmpfs: Path
) -> None:
    outcome = sparse_job(lab, tmp_path / "out", shared_memory, "--save", str(tiny_tmpfs), "--save-interval", "3").run()
    assert_exact(lab, outcome)
    assert "training goes on" in outcome.output
    assert (shared_memory / "job" / "rank00000.slots").exists(), "not durable: the slots stay"


def test_the_plan_is_printed_and_nothing_else_happens(lab: Lab, tmp_path: Path, shared_memory: Path) -> None:
    flags = sparse_flags(
        shared_memory, "job", "auto", "fixed", "--sparse-ckpt-dry-run", "--sparse-ckpt-measure-iters", "3"
    )
    outcome = lab.job(SCENARIO, tmp_path, flags).run()
    assert outcome.ok, outcome.output
    for word in ("operators", "window", "slot data", "host memory", "a recovery", "measured", "transcript"):
        assert word in outcome.output
    assert not any(shared_memory.iterdir())
