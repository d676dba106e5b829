"""Host memory, planned before training, printed and held to."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron.moevement.config import GIB
from megatron.moevement.errors import StoreError
from megatron.moevement.store.format import HEADER_BYTES, PAGE_BYTES

MANIFEST_BASE_BYTES = 64 * 1024
MANIFEST_BYTES_PER_SLICE = 96
MANIFEST_BYTES_PER_OPERATOR = 192


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of host memory that one rank's slots take; the same on every rank of the world, the largest counts."""

    slots: int
    manifest_bytes: int
    data_bytes: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return -(-(HEADER_BYTES + self.manifest_bytes + self.data_bytes) // PAGE_BYTES) * PAGE_BYTES

    @property
    def total_bytes(self) -> int:
        """Bytes of all slots of the rank."""
        return self.slots * self.slot_bytes


def manifest_room(operators: int, slices: int, blob_bytes: int) -> int:
    """Room for a slot's manifest, in bytes: names, digests, Adam steps, RNG states in base 64."""
    return (
        MANIFEST_BASE_BYTES
        + operators * MANIFEST_BYTES_PER_OPERATOR
        + slices * MANIFEST_BYTES_PER_SLICE
        + blob_bytes * 2
    )


def check_room(plan: MemoryPlan, limit_gib: float, directory: Path, ranks_on_node: int, existing_bytes: int) -> None:
    """Refuses a plan that is above the limit or the free space.

    Args:
        plan: the largest plan of any rank.
        limit_gib: limit per rank, GiB; 0 is none.
        directory: where the files go; its nearest existing parent is asked for free space.
        ranks_on_node: ranks that share the directory.
        existing_bytes: bytes of this job's files that are there already and will be used or replaced.

    Raises:
        StoreError: names the flag, what is needed and what there is.
    """
    if limit_gib and plan.total_bytes > limit_gib * GIB:
        raise StoreError(
            f"--sparse-ckpt-host-memory-gib {limit_gib:g}: the plan needs {plan.total_bytes / GIB:.3f} GiB per rank "
            f"({plan.slots} slots of {plan.slot_bytes / GIB:.3f}); raise the limit, use --sparse-ckpt-reorder off, "
            "or choose another --sparse-ckpt-window"
        )
    parent = directory
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free + existing_bytes
    needed = plan.total_bytes * ranks_on_node
    if needed > free:
        raise StoreError(
            f"--sparse-ckpt-dir {directory}: {ranks_on_node} ranks need {needed / GIB:.3f} GiB of slots, "
            f"{free / GIB:.3f} are free; choose another directory, a larger tmpfs, or another --sparse-ckpt-window"
        )
