from pathlib import Path

import pytest

from megatron.moevement.agent.options import PRELOAD, parse

SCRIPT = str(Path(__file__))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse(words)
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
    options = parse([*words, *"--start-timeout-seconds 60 --grace-seconds 3".split(), SCRIPT])
    assert (options.nnodes, options.node_rank, options.head) == (3, 2, ("h1", 2900))
    assert (options.replacement, options.preload, options.grace_seconds) == ("fork", ("json", "os"), 3.0)
    limits = options.limits
    assert (limits.failures, limits.idle_failures) == (7, 2)
    assert (limits.heartbeat_seconds, limits.hang_seconds, limits.start_seconds) == (4.0, 9.0, 60.0)
    spare = parse(["--nnodes", "2", "--spare", "--head", "[::1]:2900", SCRIPT])
    assert (spare.node_rank, spare.head) == (None, ("::1", 2900))


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
        ("--preload no_such_module S", "--preload no_such_module: no such module; give names that Python can import"),
        ("no_script.py", "SCRIPT no_script.py: no such file; give the path of the training script"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert refused(capsys, *(SCRIPT if word == "S" else word for word in words.split())) == message


def test_a_missing_script_and_an_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "SCRIPT" in refused(capsys)
    assert "--replacement" in refused(capsys, "--replacement", "lukewarm", SCRIPT)
