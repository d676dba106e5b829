"""Process groups of one generation after another, under a job that stays as it is.

Megatron's modules, buffers and optimizers keep the groups that they were built with. After a failure all groups are
made anew; `holders` finds every reference to an old group in the job, and `rebind` puts the new one there.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.distributed_c10d import Store

from megatron.moevement.errors import RecoveryError

_WORLD = "world"
FAKE = "fake"


def named_groups() -> dict[str, Any]:
    """All groups that megatron.core keeps, by name, and the world; a list of groups counts one by one."""
    found: dict[str, Any] = {_WORLD: dist.group.WORLD}
    for name, value in vars(parallel_state).items():
        if name.endswith(("_GROUP", "_GROUPS", "_CP", "_AG", "_GLOO")):
            members = value if isinstance(value, list) else [value]
            found.update({f"{name}[{i}]": g for i, g in enumerate(members) if isinstance(g, dist.ProcessGroup)})
    return found


@contextlib.contextmanager
def without_communication() -> Iterator[None]:
    """Groups that are made inside communicate with nobody: their collectives return at once, with any values.

    A process that takes over a rank builds its job like this, because the others don't take part in it.
    """
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the backend)

    original = dist.new_group

    def fake(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **{**options, "backend": FAKE, "pg_options": None})

    dist.new_group = torch.distributed.new_group = fake
    try:
        yield
    finally:
        dist.new_group = torch.distributed.new_group = original


def alone() -> bool:
    """Whether this process's groups communicate with nobody."""
    return str(dist.get_backend()) == FAKE


def nowhere() -> Store:
    """A store for groups that communicate with nobody."""
    return dist.HashStore()  # type: ignore[attr-defined, no-any-return]


def free_from_collectives(backend: str, shut_down_sockets: Callable[[], object]) -> None:
    """Frees the main thread from a collective that can't end; called from another thread.

    gloo has no abort, so its sockets are shut. NCCL's communicators are aborted.
    """
    # First, so that NCCL's watchdogs are told to end before they can take shut sockets for errors of their own.
    aborting = abort_all(_communicators()) if backend == "nccl" else []
    shut_down_sockets()
    for thread in aborting:
        thread.join()


def abort_all(communicators: Sequence[Any]) -> list[threading.Thread]:
    """Aborts all at once, each on a thread, which are returned.

    An abort frees device memory, which waits for whatever runs on the device: one after another, the first would wait
    for the kernels of those that are not aborted yet.
    """

    def abort(communicator: Any) -> None:
        # One that is aborted already, or being made.
        with contextlib.suppress(RuntimeError):
            communicator.abort()

    threads = [
        threading.Thread(target=abort, args=(one,), name="moevement-abort", daemon=True) for one in communicators
    ]
    for thread in threads:
        thread.start()
    return threads


def _communicators() -> list[Any]:
    """NCCL's part of every group."""
    # A copy: the main thread may be making or destroying groups.
    known, found = list(dist.distributed_c10d._world.pg_map.items()), []
    for group, (backend, _) in known:
        with contextlib.suppress(RuntimeError):
            found += [group._get_backend(torch.device("cuda"))] if backend == "nccl" else []
    return found


def abort() -> None:
    """Ends whatever NCCL still runs for the groups there are; called from the main thread.

    Raises:
        RuntimeError: the device can't be used any more; this process must be replaced.
    """
    if not dist.is_initialized():
        return
    for thread in abort_all(_communicators()):
        thread.join()
    _end_batches()
    if torch.cuda.is_initialized():
        # What ran behind the aborted kernels ends too, before any of its memory is written again.
        torch.cuda.synchronize()


def leave() -> None:
    """Gives up all groups there are, also half-made ones. References to them stay where they are, for `rebind`.

    Raises:
        RuntimeError: see `abort`.
    """
    # An orderly end would wait for kernels that wait for the lost rank.
    abort()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
    # Groups find each other by names that count on. A first group that was interrupted while it was made has counted
    # too, and is none that could be destroyed: the others would look for this rank under another name.
    dist.distributed_c10d._world.group_count = 0


def _end_batches() -> None:
    """Closes batches of sends and receives that an error has interrupted.

    An open batch would swallow everything that this thread gives to NCCL from then on.
    """
    for group in list(dist.distributed_c10d._world.pg_coalesce_state):
        with contextlib.suppress(RuntimeError):
            group._end_coalescing(torch.device("cuda"))


def keep() -> None:
    """Keeps the groups there are from ever being destroyed: that would wait for threads that a lost wait holds."""
    for group in list(dist.distributed_c10d._world.pg_map):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def holders(roots: Sequence[Any], groups: Mapping[str, Any]) -> list[Any]:
    """Every object that can be reached from `roots` and refers to one of the groups itself.

    The garbage collector can't be asked who refers to a group: it doesn't track dictionaries, such as an object's
    attributes, that hold nothing else of interest to it.
    """
    wanted = {id(group) for group in groups.values()}
    seen, found, waiting = {id(waiting) for waiting in (groups, wanted)}, [], list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _NOT_ENTERED):
            continue
        seen.add(id(one))
        inside = _parts_of_function(one) if isinstance(one, types.FunctionType) else gc.get_referents(one)
        if any(id(part) in wanted for part in inside):
            found.append(one)
        waiting += inside
    return found


# They lead to the whole process, or to nothing.
_NOT_ENTERED = (types.ModuleType, type, types.BuiltinFunctionType, types.FrameType, str, bytes, int, float)


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    # Its referents would include the globals of its module.
    parts: list[Any] = [*(function.__closure__ or ()), *(function.__defaults__ or ()), function.__dict__]
    return [*parts, *(function.__kwdefaults__ or {}).values()]


def rebind(found: Sequence[Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """Puts the new groups wherever one of `found` refers to an old one; returns how many references there were.

    Raises:
        RecoveryError: a reference can't be changed, or the groups aren't the same ones by name.
    """
    different = sorted(set(old) ^ set(new))
    if different:
        raise RecoveryError(f"process groups changed between generations: {different[0]}")
    successors = {id(group): new[name] for name, group in old.items()}
    changed = sum(_replace(holder, successors) for holder in found)
    for holder in found:
        if any(id(part) in successors for part in gc.get_referents(holder)):
            raise RecoveryError(f"a {type(holder).__name__} still holds a process group of the failed generation")
    return changed


def _replace(holder: Any, successors: Mapping[int, Any]) -> int:
    """Replaces old groups in one object; 0 if it can't be changed."""
    if isinstance(holder, dict):
        return _replace_items(holder, [(k, v) for k, v in holder.items() if id(v) in successors], successors)
    if isinstance(holder, list):
        return _replace_items(holder, [(i, v) for i, v in enumerate(holder) if id(v) in successors], successors)
    if isinstance(holder, types.CellType):
        holder.cell_contents = successors[id(holder.cell_contents)]
        return 1
    # Attributes that are stored within the object.
    names = [*getattr(type(holder), "__slots__", ()), *getattr(holder, "__dict__", ())]
    held = [name for name in names if id(getattr(holder, name, None)) in successors]
    for name in held:
        object.__setattr__(holder, name, successors[id(getattr(holder, name))])
    return len(held)


def _replace_items(container: Any, places: list[tuple[Any, Any]], successors: Mapping[int, Any]) -> int:
    for place, group in places:
        container[place] = successors[id(group)]
    return len(places)
