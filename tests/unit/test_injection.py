"""Faults on purpose: plans that are understood or refused in one line; faults that happen once, where they should."""

import argparse
from pathlib import Path

import pytest
import torch

from megatron.moevement import injection
from megatron.moevement.errors import ConfigError
from megatron.moevement.injection import Fault, InjectedError, Injector, Marks, Plan, RandomFaults, parse


def injector(text: str, directory: Path, rank: int = 0) -> tuple[Injector, list[str]]:
    """An injector that writes down instead of striking."""
    struck: list[str] = []
    return Injector(parse(text), rank, Marks(directory, rank), lambda kind, said: struck.append(said)), struck


def test_a_plan_is_understood() -> None:
    plan = parse(
        "kill@rank=3,iteration=7,point=forward:2; stop@rank=0+1,point=convert,occurrence=2,times=3;"
        " random@seed=1,mtbf=1.5m,kinds=kill+hang,until=40"
    )
    assert plan.faults == (
        Fault("kill", frozenset({3}), "forward", micro_batch=2, iteration=7),
        Fault("stop", frozenset({0, 1}), "convert", occurrence=2, times=3),
    )
    assert plan.random == RandomFaults(1, 90.0, ("kill", "hang"), 40)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the plan has no fault"),
        ("kill", "give KIND@key=value"),
        ("burn@rank=1,point=begin", "'burn' is none of kill, stop"),
        ("kill@rank=1", "point= is missing"),
        ("kill@point=begin", "rank= is missing"),
        ("kill@rank=1,point=lunch", "point 'lunch' is none of start, begin"),
        ("kill@rank=x,point=begin", "rank=x: give a whole number from 0 on"),
        ("kill@rank=1,point=begin:2", "only forward and backward have micro-batches"),
        ("kill@rank=1,point=begin,rank=2", "rank is given twice"),
        ("kill@rank=1,point=begin,color=red", "'color' is none of rank"),
        ("kill@rank=1,point", "'point' is not key=value"),
        ("kill@rank=1,point=begin,occurrence=0", "occurrence=0: give a whole number from 1 on"),
        ("hang@rank=1,point=commit", "on a thread of its own"),
        ("random@mtbf=3s", "seed= is missing"),
        ("random@seed=1,mtbf=0s", "give a time such as 30s"),
        ("random@seed=1,mtbf=3 parsecs", "give a time such as 30s"),
        ("random@seed=1,mtbf=3s,kinds=kill+burn", "kind 'burn' is none of"),
        ("random@seed=1,mtbf=3s;random@seed=2,mtbf=3s", "can be given once"),
    ],
)
def test_a_bad_plan_is_refused_by_its_part(text: str, says: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        parse(text)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_rank_that_is_not_there() -> None:
    parse("kill@rank=3,point=begin").check(4)
    with pytest.raises(ConfigError, match="rank=3: the job has ranks 0 to 2"):
        parse("kill@rank=3,point=begin").check(3)


def test_a_fault_strikes_its_rank_at_its_place_only(tmp_path: Path) -> None:
    there, struck = injector("kill@rank=2,point=begin,iteration=5", tmp_path, 2)
    for iteration in (4, 5, 6):
        there.reached("begin", iteration, None)
        there.reached("capture", iteration, None)
    assert struck == ["kill at begin of iteration 5"]
    other, spared = injector("kill@rank=2,point=begin,iteration=5", tmp_path / "other", 1)
    other.reached("begin", 5, None)
    assert not spared


def test_a_recovery_belongs_to_the_iteration_that_it_ends(tmp_path: Path) -> None:
    there, struck = injector("kill@rank=0,point=join,iteration=5", tmp_path)
    there.reached("join", None, None)
    for iteration in (4, 5):
        there.begin(iteration)
        there.reached("join", None, None)
    assert struck == ["kill at join of iteration 5"]


def test_micro_batches_are_counted_for_each_chunk(tmp_path: Path) -> None:
    there, struck = injector("kill@rank=0,point=backward:1,iteration=3,times=9", tmp_path)
    for iteration in (2, 3):
        there.begin(iteration)
        for point in ("forward", "backward"):
            for chunk in ("a", "b", "a", "b", "a"):
                there.reached(point, None, chunk)
    assert struck == ["kill at backward of micro-batch 1 of iteration 3"] * 2


def test_a_fault_strikes_once_in_the_life_of_the_job(tmp_path: Path) -> None:
    for life in range(3):
        there, struck = injector("kill@rank=0,point=convert,occurrence=2", tmp_path)
        for step in (4, 5, 6):
            there.reached("convert", step, None)
        assert struck == (["kill at convert of iteration 5"] if life == 0 else [])


def test_a_fault_with_times_strikes_as_often(tmp_path: Path) -> None:
    struck = []
    for _ in range(4):
        there, said = injector("kill@rank=0,point=join,times=3", tmp_path)
        there.reached("join", None, None)
        struck += said
    assert len(struck) == 3


def test_marks_are_each_ranks_own(tmp_path: Path) -> None:
    one, other = Marks(tmp_path / "job", 1), Marks(tmp_path / "job", 2)
    assert one.take(0, 1) and other.take(0, 1) and not one.take(0, 1)
    one.clear()
    assert one.take(0, 1) and not other.take(0, 1)


def test_random_moments_have_the_mean_of_the_whole_job_and_come_again() -> None:
    faults = RandomFaults(7, 30.0, ("kill", "stop"))
    drawn = [faults.draw(rank, generation, 4) for rank in range(4) for generation in range(500)]
    assert drawn == [faults.draw(rank, generation, 4) for rank in range(4) for generation in range(500)]
    assert drawn != [RandomFaults(8, 30.0, ("kill", "stop")).draw(r, g, 4) for r in range(4) for g in range(500)]
    # A seeded draw: the numbers are always the same ones.
    assert 110 < sum(seconds for seconds, _ in drawn) / len(drawn) < 130
    assert {kind for _, kind in drawn} == {"kill", "stop"}


def test_what_strikes_at_random_waits_for_the_main_thread_and_for_the_last_iteration(tmp_path: Path) -> None:
    there, struck = injector("random@seed=1,mtbf=1s,kinds=exception,until=5", tmp_path)
    there.strike_at_random("kill")
    assert struck == ["kill at random"]
    there.strike_at_random("exception")
    there.reached("commit", 3, None)
    assert len(struck) == 1, "a point of another thread"
    there.reached("begin", 3, None)
    assert struck[1:] == ["exception at random, at begin"]
    there.begin(5)
    there.strike_at_random("kill")
    assert len(struck) == 2


def test_without_a_plan_nothing_happens() -> None:
    injection.reached("begin", 3)
    injection.begin(3)
    weight = torch.ones(2, requires_grad=True)
    output = weight * 2
    injection.reached_in_backward(output, "chunk")
    output.sum().backward()
    assert weight.grad is not None


def test_an_armed_plan_strikes_in_the_backward_pass_and_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    (tmp_path / "rank00001.injected.0.0").touch()
    plan = parse("exception@rank=1,point=backward:0,iteration=4")
    try:
        injection.arm(plan, tmp_path, (1, 2, 0), told.append)
        injection.begin(4)
        weight = torch.ones(2, requires_grad=True)
        output = weight * 2
        injection.reached_in_backward(output, "chunk")
        with pytest.raises(InjectedError):
            output.sum().backward()
        assert told == ["exception at backward of micro-batch 0 of iteration 4"]
        assert "rank 1: injected exception at backward" in capsys.readouterr().err
        assert list(tmp_path.iterdir())
    finally:
        injection.disarm(forget=True)
    assert not tmp_path.exists(), "nothing is left, and the directory was empty"


def test_a_replacement_keeps_the_marks(tmp_path: Path) -> None:
    (tmp_path / "rank00001.injected.0.0").touch()
    try:
        injection.arm(Plan(parse("exception@rank=1,point=begin").faults), tmp_path, (1, 2, 3), lambda _text: None)
        injection.reached("begin", 4)
    finally:
        injection.disarm()
    assert len(list(tmp_path.iterdir())) == 1


def test_memory_really_runs_out() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="injected: .*alloc"):
        injection.do("oom")
