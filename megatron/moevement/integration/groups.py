"""Process groups of one generation after another, under a job that stays as it is.

Megatron's modules, buffers and optimizers keep the groups that they were built with. After a failure all groups are
made anew; `rebind` finds every reference to an old group in the process, puts the new one there, and fails if one is
left: a stale group would hang or mix generations.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import types
from collections.abc import Callable, Iterator, Mapping
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


def nowhere() -> Store:
    """A store for groups that communicate with nobody."""
    return dist.HashStore()  # type: ignore[attr-defined, no-any-return]


def free_from_collectives(backend: str, shut_down_sockets: Callable[[], object]) -> None:
    """Frees the main thread from a collective that can't end; called from another thread.

    gloo has no abort, so its sockets are shut. NCCL's communicators are aborted.
    """
    shut_down_sockets()
    if backend == "nccl":
        for group in list(dist.distributed_c10d._world.pg_map):
            with contextlib.suppress(RuntimeError):
                group._get_backend(torch.device("cuda")).abort()


def leave() -> None:
    """Gives up all groups there are, also half-made ones. References to them stay where they are, for `rebind`."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def rebind(old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """Puts the new groups wherever the process refers to old ones; returns how many references there were.

    Raises:
        RecoveryError: a reference can't be changed, or the groups aren't the same ones by name.
    """
    missing = sorted(set(old) ^ set(new))
    if missing:
        raise RecoveryError(f"process groups changed between generations: {missing[0]}")
    successors = {id(group): new[name] for name, group in old.items()}
    groups = list({id(group): group for group in old.values()}.values())
    gc.collect()
    changed = sum(_replace(holder, successors) for holder in _holders(groups, old))
    left = _holders(groups, old)
    if left:
        raise RecoveryError(f"a {type(left[0]).__name__} still holds a process group of the failed generation")
    return changed


def _holders(groups: list[Any], old: Mapping[str, Any]) -> list[Any]:
    """Whatever refers to a group, but for this module's own books and running functions."""
    own = {id(groups), id(old)}
    wanted = {id(group) for group in groups}
    known = (*gc.get_referrers(*groups), *_imported_holders(wanted), *_untracked_holders(wanted))
    found = {id(holder): holder for holder in known}
    return [
        holder
        for holder in found.values()
        if id(holder) not in own and not isinstance(holder, types.FrameType) and not _is_listing(holder, groups)
    ]


def _imported_holders(wanted: set[int]) -> Iterator[Any]:
    """Modules' variables, and containers that these name: `gc.freeze` hides from the collector what imports made."""
    for module in list(sys.modules.values()):
        variables = getattr(module, "__dict__", {})
        for container in (variables, *(v for v in list(variables.values()) if type(v) in (dict, list))):
            if _holds(container, wanted):
                yield container


def _untracked_holders(wanted: set[int]) -> Iterator[Any]:
    """Dictionaries and tuples that the collector has ceased to look at, because they can't be part of a cycle.

    The attributes of an object that has nothing but a group and numbers are such a dictionary.
    """
    for tracked in gc.get_objects():
        waiting = gc.get_referents(tracked)
        while waiting:
            inner = waiting.pop()
            if type(inner) in (dict, tuple) and not gc.is_tracked(inner):
                if _holds(inner, wanted):
                    yield inner
                waiting.extend(inner.values() if type(inner) is dict else inner)


def _holds(container: Any, wanted: set[int]) -> bool:
    values = container.values() if isinstance(container, dict) else container
    return any(id(value) in wanted for value in list(values))


def _is_listing(holder: Any, groups: list[Any]) -> bool:
    # The argument tuple of get_referrers itself.
    return (
        isinstance(holder, tuple)
        and len(holder) == len(groups)
        and all(a is b for a, b in zip(holder, groups, strict=True))
    )


def _replace(holder: Any, successors: Mapping[int, Any]) -> int:
    """Replaces old groups in one container; 0 if it can't be changed, which the second look finds."""
    if isinstance(holder, dict):
        return _replace_items(holder, [(k, v) for k, v in holder.items() if id(v) in successors], successors)
    if isinstance(holder, list):
        return _replace_items(holder, [(i, v) for i, v in enumerate(holder) if id(v) in successors], successors)
    if isinstance(holder, types.CellType):
        holder.cell_contents = successors[id(holder.cell_contents)]
        return 1
    # An object whose attributes are stored within it refers to them itself, without a dictionary.
    slots = [name for name in getattr(type(holder), "__slots__", ()) if id(getattr(holder, name, None)) in successors]
    for name in slots:
        object.__setattr__(holder, name, successors[id(getattr(holder, name))])
    if slots:
        return len(slots)
    attributes = getattr(holder, "__dict__", {})
    return _replace_items(attributes, [(k, v) for k, v in attributes.items() if id(v) in successors], successors)


def _replace_items(container: Any, places: list[tuple[Any, Any]], successors: Mapping[int, Any]) -> int:
    for place, group in places:
        container[place] = successors[id(group)]
    return len(places)
