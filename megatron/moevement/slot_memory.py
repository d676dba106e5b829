"""The host memory of this rank's slots: planned, taken on all ranks or on none, pinned, given back."""

import contextlib
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.errors import StoreError
from megatron.moevement.operators.state import MemoryRange
from megatron.moevement.planning import SparsePlan
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.snapshot.pinning import Pinning
from megatron.moevement.store.host_store import HostStore, discard
from megatron.moevement.store.lock import hold, release
from megatron.moevement.store.memory_plan import check_room
from moevement_ext import CopyEngine


def together(agreement: Agreement, action: Callable[[], object]) -> None:
    """Does `action` on this rank; a StoreError on any rank is raised on all of them, so that none waits. Collective."""
    problem = ""
    try:
        action()
    except StoreError as error:
        problem = str(error)
    problems = [text for text in agreement.gather(problem) if text]
    if problems:
        raise StoreError(problems[0])


class SlotMemory:
    """Makes, pins and gives back the slot file of one rank.

    Args:
        config: where the slots lie and how much they may take.
        agreement: the control group.
        engine: pins the memory.
        path: the slot file of this rank.
        ranks_on_node: ranks whose files share the directory.
    """

    def __init__(
        self, config: SparseCheckpointConfig, agreement: Agreement, engine: CopyEngine, path: Path, ranks_on_node: int
    ) -> None:
        self._config, self._agreement, self._engine = config, agreement, engine
        self._path, self._ranks_on_node = path, ranks_on_node
        self._pinning: Pinning | None = None

    def lock(self) -> None:
        """Keeps other jobs away from the slots. Collective.

        Raises:
            StoreError: on every rank, if another job uses the slots of any rank.
        """
        if self._config.dry_run:
            return
        # Rank 0 first: of two jobs that start together one gets all locks, and not each of them some.
        together(self._agreement, lambda: hold(self._path) if self._agreement.rank == 0 else None)
        try:
            together(self._agreement, lambda: hold(self._path))
        except StoreError:
            self.give_back(None, keep=True)
            raise

    def check(self, plan: SparsePlan) -> None:
        """Refuses a plan that there is no room for, before any rank takes memory. Collective.

        Raises:
            StoreError: on every rank.
        """
        existing = sum(self._agreement.gather(self._path.stat().st_size if self._path.exists() else 0))
        room = (self._config.host_memory_gib, self._config.job_directory, self._ranks_on_node, existing)
        try:
            together(self._agreement, lambda: check_room(plan.memory, *room))
        except StoreError:
            # A refused start leaves nothing behind.
            self.give_back(None, keep=self._path.exists())
            raise

    def create(self, plan: SparsePlan, content: Mapping[str, Any], threads: int) -> HostStore:
        """Takes the memory of the plan, in place of older slots. Collective.

        Args:
            plan: how much.
            content: what the file says of itself besides its run and its geometry.
            threads: how many fill the pages.

        Raises:
            StoreError: on every rank; no rank keeps any memory then.
        """
        run_id = self._agreement.gather(uuid.uuid4().hex)[0]
        memory, created = plan.memory, list[HostStore]()

        def create() -> None:
            discard(self._path)
            sizes = (memory.slots, memory.manifest_bytes, memory.data_bytes)
            created.append(HostStore.create(self._path, {**content, "run_id": run_id}, *sizes, threads=threads))

        try:
            together(self._agreement, create)
        except StoreError:
            for store in created:
                store.remove()
            raise
        self.pin(created[0])
        return created[0]

    def pin(self, store: HostStore) -> None:
        """Starts to pin the slots."""
        self._pinning = Pinning(self._engine, [MemoryRange(*place) for place in store.slot_ranges])

    @property
    def pinned(self) -> bool:
        """Whether all slots of this rank are pinned, or never will be."""
        return self._pinning is None or self._pinning.done

    @property
    def pinned_slots(self) -> int:
        """Slots that are pinned so far."""
        return self._pinning.pinned if self._pinning is not None else 0

    @property
    def problem(self) -> str:
        """Why memory isn't pinned; empty if nothing is wrong."""
        return self._pinning.problem if self._pinning is not None else ""

    def wait_until_pinned(self) -> None:
        """Returns when all slots are pinned."""
        if self._pinning is not None:
            self._pinning.wait()

    def lock_alone(self) -> None:
        """The same for a process that took over a rank while the others wait: its lock went with the dead one.

        Raises:
            StoreError: another job uses the slots.
        """
        hold(self._path)

    def give_back(self, store: HostStore | None, keep: bool) -> None:
        """Unpins and unmaps the slots. Deletes them unless they are kept, and then the directory if it is empty."""
        if self._pinning is not None:
            self._pinning.close()
        if store is not None:
            store.close() if keep else store.remove()
        release(self._path, remove=not keep)
        # Other ranks' files, and slots that this run left alone, keep the directory.
        with contextlib.suppress(OSError):
            self._path.parent.rmdir()
