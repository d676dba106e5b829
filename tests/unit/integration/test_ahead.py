"""Transcripts are fetched in order, one iteration ahead, and a failure to fetch is the failure of who asks."""

import threading
from collections.abc import Sequence

import pytest

from megatron.moevement.errors import RecoveryError, TranscriptInvalid
from megatron.moevement.integration.ahead import Ahead
from megatron.moevement.transcript.keys import Direction
from megatron.moevement.transcript.packing import Bundle


class Neighbour:
    """Gives an iteration when it is let."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[int] = []
        self.begun, self.may = threading.Semaphore(0), threading.Semaphore(0)
        self._error = error

    def __call__(self, iteration: int) -> Sequence[Bundle]:
        self.asked.append(iteration)
        self.begun.release()
        assert self.may.acquire(timeout=20)
        if self._error is not None:
            raise self._error
        return [Bundle(0, "run", iteration, Direction.FORWARD, (), ())]


def test_the_next_one_is_on_its_way() -> None:
    neighbour = Neighbour()
    ahead = Ahead(neighbour, range(7, 10))
    for iteration in (7, 8, 9):
        # Asked for before anybody wants it here.
        assert neighbour.begun.acquire(timeout=20)
        assert neighbour.asked[-1] == iteration
        neighbour.may.release()
        assert [bundle.iteration for bundle in ahead(iteration)] == [iteration]
    assert neighbour.asked == [7, 8, 9]


def test_never_more_than_one() -> None:
    neighbour = Neighbour()
    ahead = Ahead(neighbour, range(3))
    neighbour.may.release()
    neighbour.may.release()
    ahead(0)
    assert neighbour.begun.acquire(timeout=20)
    assert neighbour.begun.acquire(timeout=20)
    assert neighbour.asked == [0, 1]
    ahead(1)
    neighbour.may.release()


def test_out_of_turn_and_over_the_end() -> None:
    neighbour = Neighbour()
    neighbour.may.release()
    ahead = Ahead(neighbour, [4])
    with pytest.raises(RecoveryError, match="iteration 5 is replayed out of turn"):
        ahead(5)
    ahead(4)
    with pytest.raises(RecoveryError, match="out of turn"):
        ahead(4)


@pytest.mark.parametrize(
    "error", [TranscriptInvalid("damaged"), RuntimeError("Connection closed by peer"), ValueError("no such group")]
)
def test_what_the_thread_meets_reaches_who_asks(error: Exception) -> None:
    neighbour = Neighbour(error)
    neighbour.may.release()
    ahead = Ahead(neighbour, [1, 2])
    with pytest.raises(type(error), match=str(error)):
        ahead(1)
    assert neighbour.asked == [1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_broke() -> None:
    neighbour = Neighbour(KeyError("unforeseen"))
    neighbour.may.release()
    with pytest.raises(RecoveryError, match="could not be fetched"):
        Ahead(neighbour, [1])(1)
    # It says so on its way out, which must not come during another test.
    for thread in threading.enumerate():
        if thread.name == "moevement-fetch":
            thread.join()
