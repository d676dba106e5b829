"""Where each byte of a slot lies: a pure function of the operator table and what the slot holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.store.format import DigestedRegion
from megatron.moevement.types import BYTES_PER_FULL_ELEMENT, FULL_COMPONENTS, BufferInfo, Operator, Presence

ALIGNMENT_BYTES = 64
BUFFERS_REGION = "@buffers"


@dataclass(frozen=True, slots=True)
class Region:
    """A contiguous, separately digested part of a slot: one operator, or the module buffers.

    `offsets` and `sizes` (bytes) describe its pieces, relative to the start of the slot's data.
    """

    name: str
    presence: Presence
    offset: int
    nbytes: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """All regions of a slot, in the order of their offsets, and the bytes of the data area."""

    regions: tuple[Region, ...]
    nbytes: int

    def __iter__(self) -> Iterator[Region]:
        return iter(self.regions)


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def piece_sizes(operator: Operator, presence: Presence) -> list[int]:
    """Bytes of the operator's pieces, in the order of `TrainingState.pieces`."""
    if presence is Presence.WEIGHTS_ONLY:
        return [part.owned * part.weight_bytes for part in operator.slices]
    per_component = BYTES_PER_FULL_ELEMENT // len(FULL_COMPONENTS)
    return [part.owned * per_component for part in operator.slices for _ in FULL_COMPONENTS]


def _region(name: str, presence: Presence, start: int, sizes: Sequence[int]) -> Region:
    offsets, offset = [], start
    for size in sizes:
        offsets.append(offset)
        offset += size
    return Region(name, presence, start, offset - start, tuple(offsets), tuple(sizes))


def slot_layout(
    table: OperatorTable, full: Sequence[str], weights_only: Sequence[str], buffers: Sequence[BufferInfo]
) -> SlotLayout:
    """The layout of a slot. Pieces of a region follow each other without a gap; regions are aligned to 64 bytes."""
    regions = [_region(BUFFERS_REGION, Presence.FULL, 0, [b.nbytes for b in buffers])]
    for presence, names in ((Presence.FULL, full), (Presence.WEIGHTS_ONLY, weights_only)):
        for name in names:
            start = _align(regions[-1].offset + regions[-1].nbytes)
            regions.append(_region(name, presence, start, piece_sizes(table[name], presence)))
    last = regions[-1]
    return SlotLayout(tuple(regions), _align(last.offset + last.nbytes))


def digested_regions(layout: SlotLayout) -> tuple[DigestedRegion, ...]:
    """The regions as their digests see them. What lies between them, for the alignment, is never read nor digested."""
    return tuple(DigestedRegion(region.name, region.offset, region.sizes) for region in layout)
