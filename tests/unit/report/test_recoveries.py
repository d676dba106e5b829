import itertools

import pytest

from megatron.moevement.recovery.phases import Phase
from megatron.moevement.report.recoveries import DEAD, Kill, listed, local_recoveries, processes, stages
from tests.unit.report.synthetic import LOCAL_KILLS, disturbed_run, local_run

KILLS = tuple(Kill(*kill) for kill in LOCAL_KILLS)


def test_one_recovery_of_two_kills() -> None:
    (found,) = local_recoveries(local_run(), KILLS)
    assert (found.started, found.ended, found.target) == (105.4, 113.2, 5)
    assert (found.scope, found.source, found.who) == ((1, 2), "local", "stages 1, 2")
    assert [decision["generation"] for decision in found.decisions] == [1, 2]
    assert found.kills == KILLS
    assert found.replayed(Phase.CONVERT) == (1, 2, 3)
    assert found.replayed(Phase.CATCH_UP) == (4,)
    assert found.replayed(Phase.CONVERT, Phase.CATCH_UP) == (1, 2, 3, 4)


def test_spans_of_a_rank_that_waited_and_served() -> None:
    (found,) = local_recoveries(local_run(), KILLS)
    spans = [(span.phase, span.started, span.ended) for span in found.spans if span.rank == 0]
    assert [name for name, _, _ in spans] == [*(["leave", "join", "agree", "serve"] * 2), "meet"]
    assert all(before[2] == after[1] for before, after in itertools.pairwise(spans))
    assert (spans[0][1], spans[-1][2]) == (105.51, 113.2)
    served = [span.iterations for span in found.spans if span.rank == 0 and span.phase == Phase.SERVE]
    assert served == [(1,), (1, 2, 3, 4)]


def test_a_kill_ends_the_phase_that_it_hits() -> None:
    (found,) = local_recoveries(local_run(), KILLS)
    second = [span for span in found.spans if span.rank == 2]
    dead = next(at for at, span in enumerate(second) if span.phase == DEAD)
    assert (second[dead - 1].phase, second[dead - 1].ended) == (Phase.SERVE, 108.2)
    assert (second[dead].started, second[dead].ended) == (108.2, 109.0)
    first = [span.phase for span in found.spans if span.rank == 1]
    assert first[:4] == [DEAD, Phase.JOIN, Phase.AGREE, Phase.LOAD]


def test_without_known_kills_it_starts_with_the_first_notice() -> None:
    (found,) = local_recoveries(local_run(), ())
    assert (found.started, found.kills) == (105.51, ())


def test_restarts_of_all_are_no_localized_recoveries() -> None:
    assert local_recoveries(disturbed_run(), KILLS) == []
    assert local_recoveries([], ()) == []


def test_processes_of_ranks() -> None:
    assert processes(local_run()) == {0: [1000], 1: [1001, 2001], 2: [1002, 3002]}
    assert stages(local_run()) == {0: 0, 1: 1, 2: 2}


@pytest.mark.parametrize(("numbers", "text"), [([], "stage "), ([2], "stage 2"), ([0, 2], "stages 0, 2")])
def test_listed(numbers: list[int], text: str) -> None:
    assert listed("stage", numbers) == text
