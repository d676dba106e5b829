"""Reading slots for a recovery: only what is verified is offered to the planner."""

from collections.abc import Iterable

from megatron.moevement.errors import SlotInvalid
from megatron.moevement.operators.state import MemoryRange, RecordedOperator
from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.snapshot.layout import BUFFERS_REGION, Region, SlotLayout, digested_regions, slot_layout
from megatron.moevement.store.format import Manifest, region_digests
from megatron.moevement.store.host_store import HostStore
from megatron.moevement.types import Presence, SlotInfo
from moevement_ext import DigestPool


class SlotReader:
    """Committed slots of one store, as the operators of `table`.

    Args:
        store: the rank's own store.
        table: the operators that the slots must be of.
        rank: a slot must say that it is this rank's.
        digests: verifies digests, and slots that have none are refused then; None verifies none.
    """

    def __init__(self, store: HostStore, table: OperatorTable, rank: int, digests: DigestPool | None) -> None:
        self._store = store
        self._table = table
        self._rank = rank
        self._run_id = store.content["run_id"]
        self._digests = digests
        # A conversion asks for those of a slot ten times; decoding takes milliseconds, while all other ranks wait.
        self._manifests: dict[int, Manifest] = {}
        self._regions: dict[int, dict[str, Region]] = {}

    # For people; slots of other places have readers of their own.
    source = "own host memory"

    def manifest(self, step: int) -> Manifest:
        """The manifest of the slot of `step`, verified when it is first asked for.

        Raises:
            SlotInvalid: damaged, of another rank or run, or with operators that the model doesn't have.
        """
        known = self._manifests.get(step)
        if known is not None:
            return known
        manifest = self._store.manifest(step)
        if manifest.rank != self._rank or manifest.run_id != self._run_id:
            raise SlotInvalid(f"slot of rank {manifest.rank} in run {manifest.run_id}, wanted rank {self._rank}")
        unknown = {*manifest.spec.full, *manifest.spec.weights_only} - self._table.names
        if unknown:
            raise SlotInvalid(f"operator {min(unknown)} is not in the model")
        self._manifests[step] = manifest
        return manifest

    def layout(self, manifest: Manifest) -> SlotLayout:
        """Where the slot's pieces lie."""
        return slot_layout(self._table, manifest.spec.full, manifest.spec.weights_only, manifest.start.buffers)

    def verify(self, step: int) -> None:
        """Checks every byte of a slot that a recovery would use.

        Raises:
            SlotInvalid: what is wrong with it.
        """
        manifest = self.manifest(step)
        layout = self.layout(manifest)
        data, address = self._store.data(step)
        if layout.nbytes > len(data):
            raise SlotInvalid("longer than its room")
        if self._digests is None:
            return
        undigested = next((region.name for region in layout if region.name not in manifest.digests), None)
        if undigested is not None:
            raise SlotInvalid(f"{undigested} has no digest; it was written with --sparse-ckpt-digest off")
        for name, found in region_digests(self._digests, address, digested_regions(layout)).items():
            if found != manifest.digests[name]:
                raise SlotInvalid(f"the digest of {name} is wrong")

    def verified(self) -> tuple[dict[int, SlotInfo], dict[int, str]]:
        """Usable slots by step, and why the others are not."""
        usable, rejected = {}, {}
        for step, info in self._store.committed.items():
            try:
                self.verify(step)
            except SlotInvalid as error:
                rejected[step] = str(error)
                continue
            usable[step] = info
        return usable, rejected

    def buffers(self, step: int) -> list[MemoryRange]:
        """Host ranges of the module buffers in the slot."""
        return self._ranges(step, {BUFFERS_REGION})[BUFFERS_REGION]

    def operators(self, step: int, names: Iterable[str]) -> list[RecordedOperator]:
        """The named operators of the slot, with the addresses of their pieces."""
        manifest, wanted = self.manifest(step), set(names)
        ranges = self._ranges(step, wanted)
        return [
            RecordedOperator(name, presence, tuple(ranges[name]), manifest.adam_steps.get(name, ()))
            for presence, listed in (
                (Presence.FULL, manifest.spec.full),
                (Presence.WEIGHTS_ONLY, manifest.spec.weights_only),
            )
            for name in listed
            if name in wanted
        ]

    def _ranges(self, step: int, names: set[str]) -> dict[str, list[MemoryRange]]:
        _, address = self._store.data(step)
        if step not in self._regions:
            self._regions[step] = {region.name: region for region in self.layout(self.manifest(step))}
        regions = self._regions[step]
        return {
            name: [MemoryRange(address + offset, size) for offset, size in zip(one.offsets, one.sizes, strict=True)]
            for name, one in ((name, regions[name]) for name in names if name in regions)
        }
