"""What the ranks agree on over the control group: a gloo group of the whole world, apart from training's groups."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron.moevement.errors import AgreementError


class Agreement:
    """Collectives of control values. Every method is called by all ranks of the group, in the same order.

    Args:
        group: a gloo process group with CPU tensors; its time-out bounds every wait.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    @property
    def rank(self) -> int:
        """Rank in the group."""
        return dist.get_rank(self._group)

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return dist.get_world_size(self._group)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank. Values are small Python objects."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def maximum(self, values: Sequence[float]) -> tuple[float, ...]:
        """Element-wise maximum over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tuple(float(v) for v in tensor)

    def require_equal(self, what: str, value: Any) -> None:
        """Raises AgreementError, naming the ranks, unless every rank has the same value."""
        values = self.gather(value)
        differing = [rank for rank, other in enumerate(values) if other != values[0]]
        if differing:
            raise AgreementError(f"{what} differs between rank 0 ({values[0]}) and ranks {differing}")

    def start_minimum(self, values: Sequence[int]) -> None:
        """Starts the element-wise minimum of `values` over all ranks without waiting for it."""
        tensor = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self._group, async_op=True)
        self._pending = (tensor, work)

    def finish_minimum(self) -> tuple[int, ...] | None:
        """The result of the last `start_minimum`, or None if there is none under way."""
        if self._pending is None:
            return None
        tensor, work = self._pending
        self._pending = None
        work.wait()
        return tuple(int(value) for value in tensor)

    def forget(self) -> None:
        """Drops a minimum that is under way: its group is gone."""
        self._pending = None

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier(group=self._group)
