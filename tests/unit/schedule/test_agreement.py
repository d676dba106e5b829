"""Agreement over real gloo: three processes, one group apart from the default one."""

import datetime
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron.moevement.errors import AgreementError
from megatron.moevement.schedule.agreement import Agreement
from tests.support.toy import ThreadAgreement, on_ranks

RANKS = 3


def exchange(agreement: Agreement) -> dict[str, Any]:
    """Every method once, with values that differ from rank to rank."""
    rank = agreement.rank
    found: dict[str, Any] = {"rank": rank, "size": agreement.size, "nothing": agreement.finish_minimum()}
    found["gather"] = agreement.gather({"rank": rank, "names": frozenset({str(rank)})})
    found["maximum"] = agreement.maximum([float(rank), -float(rank), 2.0**60 + 2**10 * rank])
    agreement.start_minimum((10 - rank, rank))
    found["minimum"], found["taken"] = agreement.finish_minimum(), agreement.finish_minimum()
    agreement.require_equal("window", 4)
    try:
        agreement.require_equal("window", 4 if rank < 2 else 5)
    except AgreementError as error:
        found["error"] = str(error)
    agreement.barrier()
    return found


def expected(rank: int) -> dict[str, Any]:
    """What `exchange` must find."""
    return {
        "rank": rank,
        "size": RANKS,
        "nothing": None,
        "gather": [{"rank": r, "names": frozenset({str(r)})} for r in range(RANKS)],
        "maximum": (2.0, 0.0, 2.0**60 + 2**11),
        "minimum": (8, 0),
        "taken": None,
        "error": "window differs between rank 0 (4) and ranks [2]",
    }


def work(rank: int, store: str) -> None:
    """One process."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=60))
    assert exchange(Agreement(group)) == expected(rank)
    dist.destroy_process_group()


def test_processes_agree(tmp_path: Path) -> None:
    # One server imports torch once, in a process without the groups that other tests may have made in this one.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.toy"])
    processes = [context.Process(target=work, args=(rank, str(tmp_path / "store"))) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * RANKS


def test_threads_of_other_tests_agree_in_the_same_way() -> None:
    assert on_ranks(RANKS, exchange) == [expected(rank) for rank in range(RANKS)]


def test_the_result_depends_on_every_rank() -> None:
    def one(agreement: ThreadAgreement) -> Any:
        return agreement.maximum([9.0 if agreement.rank == 1 else 0.0])

    assert on_ranks(RANKS, one) == [(9.0,)] * RANKS
    with pytest.raises(AgreementError):
        raise next(r for r in on_ranks(2, lambda a: a.require_equal("x", a.rank)) if isinstance(r, Exception))
