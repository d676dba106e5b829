from pathlib import Path

import pytest

from megatron.moevement.agent.options import PRELOAD, parse

SCRIPT = str(Path(__file__))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse(words, {})
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1
    return lines[0].removeprefix("python -m megatron.moevement.agent: error: ")


def test_one_node_needs_nothing_but_a_script() -> None:
    options = parse(["--nproc-per-node", "4", SCRIPT, "--lr", "1e-3", "--spare"])
    assert (options.nproc_per_node, options.nnodes, options.node_rank) == (4, 1, 0)
    assert options.head == ("127.0.0.1", 0)
    assert (options.replacement, options.preload) == ("warm", (PRELOAD,))
    assert options.script == (SCRIPT, "--lr", "1e-3", "--spare")


def test_every_flag_arrives() -> None:
    words = "--nnodes 3 --node-rank 2 --head h1:2900 --replacement fork --preload json,os --max-failures 7".split()
    words += "--max-failures-without-progress 2 --heartbeat-timeout-seconds 4 --hang-timeout-seconds 9".split()
    options = parse([*words, *"--start-timeout-seconds 60 --grace-seconds 3 --stop-timeout-seconds 0".split(), SCRIPT])
    assert (options.nnodes, options.node_rank, options.head) == (3, 2, ("h1", 2900))
    assert (options.replacement, options.preload, options.grace_seconds) == ("fork", ("json", "os"), 3.0)
    limits = options.limits
    assert (limits.failures, limits.idle_failures) == (7, 2)
    assert (limits.heartbeat_seconds, limits.hang_seconds, limits.start_seconds, limits.stop_seconds) == (
        4.0,
        9.0,
        60.0,
        0.0,
    )
    spare = parse(["--nnodes", "2", "--spare", "--head", "[::1]:2900", SCRIPT])
    assert (spare.node_rank, spare.head) == (None, ("::1", 2900))


STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_LOCALID": "0"}


def test_slurm_says_what_is_not_given() -> None:
    first = parse(["--slurm", "--spares", "1", SCRIPT], {**STEP, "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "8"})
    assert (first.nnodes, first.node_rank, first.head, first.nproc_per_node) == (2, 0, ("n1", 20007), 8)
    spare = parse([*"--slurm --spares 1 --head h:99 --nproc-per-node 4".split(), SCRIPT], {**STEP, "SLURM_NODEID": "2"})
    assert (spare.nnodes, spare.node_rank, spare.head, spare.nproc_per_node) == (2, None, ("h", 99), 4)
    all_work = parse(["--slurm", SCRIPT], {**STEP, "SLURM_NODEID": "2"})
    assert (all_work.nnodes, all_work.node_rank, all_work.nproc_per_node) == (3, 2, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nproc-per-node 0 S", "--nproc-per-node 0: give 1 or more"),
        ("--nnodes -1 S", "--nnodes -1: give 1 or more"),
        ("--max-failures -1 S", "--max-failures -1: give 0 or more"),
        ("--hang-timeout-seconds nan S", "--hang-timeout-seconds nan: give a number of seconds above 0"),
        ("--grace-seconds 0 S", "--grace-seconds 0.0: give a number of seconds above 0"),
        ("--heartbeat-timeout-seconds 0.5 S", "--heartbeat-timeout-seconds 0.5: give 1 or more"),
        ("--nnodes 2 --node-rank 1 S", "--head is missing: give HOST:PORT of the agent with --node-rank 0"),
        ("--nnodes 2 --head h:1 S", "--node-rank is missing: give 0 to 1, or --spare"),
        ("--nnodes 2 --head h:1 --node-rank 2 S", "--node-rank 2: give 0 to 1"),
        ("--head h:0 S", "--head h:0: give HOST:PORT"),
        ("--head 2900 S", "--head 2900: give HOST:PORT"),
        (
            "--nnodes 2 --head h:1 --spare --node-rank 1 S",
            "--node-rank 1: a --spare has none until it takes over; leave one of the two out",
        ),
        ("--slurm --nnodes 2 S", "--nnodes 2: Slurm says it; leave it out, or --slurm"),
        ("--slurm --node-rank 0 S", "--node-rank 0: Slurm says it; leave it out, or --slurm"),
        ("--slurm --spare S", "--spare: Slurm says which nodes are spares; give their number as --spares"),
        ("--slurm --spares -1 S", "--spares -1: give 0 or more"),
        ("--slurm S", "--slurm: SLURM_JOB_ID is not set; start the agents with srun --ntasks-per-node=1"),
        ("--spares 1 S", "--spares 1: only with --slurm; start each spare's agent with --spare"),
        ("--preload no_such_module S", "--preload no_such_module: no such module; give names that Python can import"),
        ("no_script.py", "SCRIPT no_script.py: no such file; give the path of the training script"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert refused(capsys, *(SCRIPT if word == "S" else word for word in words.split())) == message


def test_a_missing_script_and_an_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "SCRIPT" in refused(capsys)
    assert "--replacement" in refused(capsys, "--replacement", "lukewarm", SCRIPT)
