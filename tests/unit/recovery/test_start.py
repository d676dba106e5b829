"""From what training starts: every rank makes the same choice, and says why a better source was passed over."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.moevement.errors import StoreError
from megatron.moevement.recovery.start import Choice, Found, choose_source, find_store, restart_count, store_path
from megatron.moevement.store.host_store import HostStore
from megatron.moevement.types import Run
from moevement_ext import DigestPool
from tests.support.slots import create_store
from tests.support.tables import small_table
from tests.support.toy import ThreadAgreement, ToyState, on_ranks
from tests.unit.schedule.test_slots import schedule
from tests.unit.store.test_host_store import write

TABLE = small_table()
RANKS = 3


def slots(directory: Path, steps: Callable[[int], range], run_id: str = "run") -> None:
    """The stores of all ranks, each with the slots of some steps of a rolling window of two."""
    for rank in range(RANKS):
        store = create_store(store_path(directory, rank), TABLE, slots=8)
        for step in steps(rank):
            write(store, schedule(2, "rolling").spec(step), rank, run_id)
        store.close()


def choose(directory: Path, dense_step: int | None = None, identity: dict[str, Any] | None = None) -> list[Choice]:
    """What the ranks choose together."""

    def one(agreement: ThreadAgreement) -> Choice:
        path = store_path(directory, agreement.rank)
        found = find_store(path, {"--seed": 1} if identity is None else identity, agreement, 0.0)
        return choose_source(found, ToyState(TABLE), agreement, DigestPool(), dense_step)

    results = on_ranks(RANKS, one)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return [result for result in results if isinstance(result, Choice)]


def agreed(choices: list[Choice]) -> Choice:
    """The choice, which must be that of every rank."""
    assert len(choices) == RANKS and all(choice == choices[0] for choice in choices)
    return choices[0]


def test_the_newest_window_of_all_ranks_is_chosen(tmp_path: Path) -> None:
    slots(tmp_path, lambda rank: range(4, 8 - (rank == 1)))
    choice = agreed(choose(tmp_path))
    assert choice.run == Run(5, 6) and choice.dense_step is None


@pytest.mark.parametrize(("dense", "run"), [(5, Run(6, 7)), (7, Run(6, 7)), (8, None)])
def test_a_dense_checkpoint_wins_only_if_it_is_newer(tmp_path: Path, dense: int, run: Run | None) -> None:
    slots(tmp_path, lambda _: range(4, 8))
    choice = agreed(choose(tmp_path, dense))
    assert choice.run == run and choice.dense_step == dense


def test_a_rank_without_slots_sends_all_to_the_dense_checkpoint(tmp_path: Path) -> None:
    slots(tmp_path, lambda _: range(4, 8))
    store_path(tmp_path, 1).unlink()
    choice = agreed(choose(tmp_path, 2))
    assert choice.run is None and choice.dense_step == 2
    assert "rank 1: no slots" in choice.reasons and "only ranks [0, 2] have slots of one run" in choice.reasons


def test_no_slots_at_all_is_a_start_from_scratch(tmp_path: Path) -> None:
    choice = agreed(choose(tmp_path))
    assert choice.run is None and choice.dense_step is None
    assert agreed(choose(tmp_path)).reasons == tuple(f"rank {rank}: no slots" for rank in range(RANKS))


def test_slots_of_different_runs_are_not_mixed(tmp_path: Path) -> None:
    slots(tmp_path, lambda _: range(4, 8))
    path = store_path(tmp_path, 2)
    path.unlink()
    room = {"slots": 8, "manifest_bytes": 32768, "data_bytes": 1 << 16}
    HostStore.create(path, {"identity": {"--seed": 1}, "run_id": "another"}, **room).close()
    choice = agreed(choose(tmp_path))
    assert choice.run is None and "slots of different runs" in choice.reasons


def test_windows_that_no_rank_can_share_are_given_up(tmp_path: Path) -> None:
    slots(tmp_path, lambda rank: range(2, 4) if rank else range(6, 8))
    choice = agreed(choose(tmp_path))
    assert choice.run is None and choice.reasons[-1] == "no window is complete on all ranks"


def test_a_damaged_slot_moves_every_rank_to_the_window_before(tmp_path: Path) -> None:
    slots(tmp_path, lambda _: range(4, 8))
    store = HostStore.open(store_path(tmp_path, 2))
    store.data(7)[0][0] ^= 1
    store.close()
    choice = agreed(choose(tmp_path))
    assert choice.run == Run(5, 6)
    assert any(reason.startswith("rank 2: slot of step 7: the digest") for reason in choice.reasons)


def test_a_damaged_file_is_a_reason_and_not_an_error(tmp_path: Path) -> None:
    slots(tmp_path, lambda _: range(4, 8))
    path = store_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:100])
    choice = agreed(choose(tmp_path, 3))
    assert choice.dense_step == 3 and choice.run is None
    assert any(reason.startswith("rank 0: damaged slots") for reason in choice.reasons)


def test_slots_of_another_model_are_refused_on_every_rank(tmp_path: Path) -> None:
    slots(tmp_path, lambda _: range(4, 8))

    def one(agreement: ThreadAgreement) -> Found:
        seed = 2 if agreement.rank == 1 else 1
        return find_store(store_path(tmp_path, agreement.rank), {"--seed": seed}, agreement, 0.0)

    results = on_ranks(RANKS, one)
    assert all(isinstance(result, StoreError) for result in results)
    assert len({str(result) for result in results}) == 1 and "--seed: 1 then, 2 now" in str(results[0])
    with pytest.raises(StoreError, match="another model; restore it"):
        choose(tmp_path, identity={"operators": "other"})
    with pytest.raises(StoreError, match="another --hidden-size"):
        choose(tmp_path, identity={"operators": "other", "--hidden-size": 8})


def test_slots_that_are_not_wanted_are_not_opened() -> None:
    assert on_ranks(1, lambda agreement: find_store(None, {}, agreement, 0.0)) == [Found(None, "no slots")]


def test_restarts_are_counted_over_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert restart_count() == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert restart_count() == 5


def test_a_rank_has_a_file_of_its_own() -> None:
    assert store_path(Path("a"), 12) == Path("a/rank00012.slots")
