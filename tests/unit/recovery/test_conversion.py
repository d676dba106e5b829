"""Conversion of a toy training state: every byte of it, and what must stop a conversion that isn't exact."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.moevement.errors import RecoveryError
from megatron.moevement.recovery.conversion import Conversion, Progress, convert
from megatron.moevement.recovery.plan import newest_run
from megatron.moevement.recovery.sources import SlotReader
from megatron.moevement.snapshot.capture import Capture
from megatron.moevement.store.committer import Committed, Committer
from megatron.moevement.store.host_store import HostStore
from megatron.moevement.types import IterationRecord, Run
from moevement_ext import CopyEngine, DigestPool
from tests.support.slots import create_store
from tests.support.tables import small_table
from tests.support.toy import ThreadAgreement, ToyState, alone, on_ranks
from tests.unit.schedule.test_slots import schedule

TABLE = small_table()
Change = Callable[[IterationRecord], IterationRecord]


def trained(
    path: Path, window: int, mode: str, steps: int, recorded: Change = lambda r: r
) -> tuple[HostStore, dict[str, object]]:
    """The slots of Steps 0 to `steps`, and all of the state of the last of them."""
    store, state = create_store(path, TABLE, slots=steps + 1), ToyState(TABLE)
    done: list[Committed] = []
    capture, committer = Capture(state, store, CopyEngine(), 0, "run"), Committer(store, DigestPool(), done.append)
    record, wanted = None, state.everything()
    for step in range(steps + 1):
        wanted = state.everything()
        capture.begin(schedule(window, mode).spec(step), None if record is None else recorded(record))
        copied, _ = capture.fence()
        assert copied is not None
        committer.submit(copied)
        record = state.train(rate=0.001 * step)
    committer.close()
    assert not any(slot.error for slot in done)
    return store, wanted


def converted(store: HostStore, agreement: ThreadAgreement, deterministic: bool = True) -> tuple[ToyState, Conversion]:
    """A new worker's state, which starts with other bytes in every place."""
    state, reader = ToyState(TABLE, seed=99), SlotReader(store, TABLE, 0, digests=DigestPool())
    run = newest_run(store.committed, TABLE.names)
    assert run is not None
    return state, convert(state, reader, run, agreement, deterministic, lambda _: None)


@pytest.mark.parametrize("mode", ["fixed", "rolling"])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_every_byte_is_restored(tmp_path: Path, window: int, mode: str) -> None:
    for steps in (2 * window - 1, 2 * window):
        store, wanted = trained(tmp_path / f"s{steps}", window, mode, steps)
        state, conversion = converted(store, alone())
        found = state.everything()
        assert [name for name in wanted if wanted[name] != found[name]] == []
        assert conversion.replays == conversion.run.replays and conversion.different == 0
        assert conversion.compared >= conversion.replays
        assert mode == "fixed" or conversion.replays == window - 1


def test_the_conversion_reports_what_it_does(tmp_path: Path) -> None:
    store, _ = trained(tmp_path / "s", 3, "rolling", 4)
    reports: list[Progress] = []
    reader = SlotReader(store, TABLE, 0, digests=DigestPool())
    convert(ToyState(TABLE), reader, Run(2, 4), alone(), True, reports.append)
    assert [(p.step, p.replayed) for p in reports] == [(2, True), (3, True), (4, False)]
    assert sum(p.loaded_full for p in reports) == len(TABLE) and reports[-1].frozen == 0
    assert reports[0].frozen == len(TABLE) - reports[0].loaded_full


def test_a_wrong_learning_rate_in_one_record_is_noticed(tmp_path: Path) -> None:
    def wrong(record: IterationRecord) -> IterationRecord:
        return replace(record, learning_rates=(0.5, 0.5)) if record.iteration == 3 else record

    store, wanted = trained(tmp_path / "s", 3, "rolling", 4, wrong)
    with pytest.raises(RecoveryError, match=r"not exact.*rank 0: compute weights .* at step 4"):
        converted(store, alone())
    state, conversion = converted(store, alone(), deterministic=False)
    assert conversion.different > 0 and state.everything() != wanted


def test_a_wrong_loss_is_noticed(tmp_path: Path) -> None:
    def wrong(record: IterationRecord) -> IterationRecord:
        return replace(record, loss=(record.loss or 0.0) + 2**-20)

    store, _ = trained(tmp_path / "s", 2, "rolling", 3, wrong)
    with pytest.raises(RecoveryError, match="loss of iteration 2"):
        converted(store, alone())


@pytest.mark.parametrize("change", [lambda _: None, lambda record: replace(record, iteration=record.iteration + 1)])
def test_a_slot_without_the_record_of_its_iteration_is_refused(tmp_path: Path, change: Change) -> None:
    store, _ = trained(tmp_path / "s", 2, "rolling", 3, change)
    with pytest.raises(RecoveryError, match="no record of iteration 2"):
        converted(store, alone())


def test_all_ranks_stop_if_one_is_not_exact(tmp_path: Path) -> None:
    def wrong(record: IterationRecord) -> IterationRecord:
        return replace(record, learning_rates=(0.5, 0.5))

    good, _ = trained(tmp_path / "good", 3, "rolling", 4)
    bad, _ = trained(tmp_path / "bad", 3, "rolling", 4, wrong)
    results = on_ranks(2, lambda agreement: converted(bad if agreement.rank else good, agreement))
    assert [type(result) for result in results] == [RecoveryError, RecoveryError]
    assert all("rank 1" in str(result) for result in results)
    results = on_ranks(2, lambda agreement: converted(good, agreement))
    assert all(isinstance(result, tuple) for result in results)
