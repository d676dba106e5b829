"""Every knob of sparse checkpointing, declared once: flag, type, unit, default, limit and reason.

`docs/flags.md` is generated from this file (`scripts/generate_flags.py`), and `arguments.py` makes the command line
from it, so that a flag can't be documented and not exist, or exist and be ignored.
"""

import argparse
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron.moevement.errors import ConfigError
from megatron.moevement.injection import Plan, parse

GIB = 1 << 30
MIB = 1 << 20
MAX_DIGEST_THREADS = 64
MAX_CHUNK_MIB = 1024
MAX_CHUNKS_IN_FLIGHT = 64
MAX_NAME_BYTES = 255


def _knob(default: Any, flag: str, text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"flag": flag, "text": text, **extra})


def window_argument(text: str) -> int | None:
    """Parses `--sparse-ckpt-window`: `auto` is None, else a positive number of slots."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'auto' nor a number of slots >= 1")
    return int(text)


def on_off_argument(text: str) -> bool:
    """Parses `on` or `off`."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'on' nor 'off'")
    return text == "on"


@dataclass(frozen=True, slots=True)
class SparseCheckpointConfig:
    """The values of all `--sparse-ckpt*` flags."""

    enabled: bool = _knob(False, "--sparse-ckpt", "Take a sparse snapshot in every iteration.")
    window: int | None = _knob(
        None,
        "--sparse-ckpt-window",
        "Slots in a window (W), or `auto`: the smallest W whose worst slot can be copied before the optimizer step and "
        "digested within an iteration, as measured (the paper's Algorithm 1 with real operator sizes).",
        type=window_argument,
        metavar="W|auto",
        unit="slots",
    )
    window_mode: str = _knob(
        "rolling",
        "--sparse-ckpt-window-mode",
        "`fixed`: an operator that was captured in full is absent until the next window (the paper). `rolling`: it "
        "goes on as weights-only, so that any W slots in a row are a window; a shorter replay for more bytes.",
        choices=("fixed", "rolling"),
    )
    max_window: int = _knob(
        64,
        "--sparse-ckpt-max-window",
        "Largest W that `auto` may choose; a longer window makes recovery slower in proportion.",
        unit="slots",
    )
    copy_share: float = _knob(
        0.8,
        "--sparse-ckpt-copy-share",
        "Share of the time before the optimizer step that `auto` lets the copy of a slot take. Less makes windows "
        "longer: slots are smaller and disturb training less, recoveries replay more iterations. Where no window makes "
        "slots that small, it takes the next larger share, in steps of 0.1 up to 0.8. A window that is given, or found "
        "with slots, stays as it is.",
        unit="fraction",
    )
    measure_iterations: int = _knob(
        6,
        "--sparse-ckpt-measure-iters",
        "Iterations that `auto` times before it chooses W, the first not counted. Four more follow in which it "
        "measures the link; no slots are taken in any of them.",
        unit="iterations",
    )
    reorder: bool = _knob(
        True,
        "--sparse-ckpt-reorder",
        "Order experts by ascending popularity and order them again when popularity has changed. Off keeps "
        "the order of names, and in rolling mode saves about half of the slots' memory.",
        type=on_off_argument,
        metavar="on|off",
    )
    reorder_change: float = _knob(
        0.10,
        "--sparse-ckpt-reorder-change",
        "An expert counts as changed if its share of tokens differs by more than this fraction (paper section 3.2).",
        unit="fraction",
    )
    reorder_share: float = _knob(
        0.25,
        "--sparse-ckpt-reorder-share",
        "Order again when at least this fraction of experts has changed (paper section 3.2).",
        unit="fraction",
    )
    reorder_windows: int = _knob(
        4,
        "--sparse-ckpt-reorder-windows",
        "Least number of windows between two changes of order. Right behind a change a recovery loads up to 2W-1 slots "
        "instead of W in rolling mode, and the shares of few tokens are noise.",
        unit="windows",
    )
    directory: Path = _knob(
        Path("/dev/shm/moevement"),
        "--sparse-ckpt-dir",
        "Directory of the slots; on a tmpfs they lie in memory that outlives the worker.",
        type=Path,
    )
    name: str = _knob(
        "default",
        "--sparse-ckpt-name",
        "Name of the job inside the directory. Workers that are restarted under the same name find their slots.",
    )
    fresh: bool = _knob(
        False,
        "--sparse-ckpt-fresh",
        "Discard the slots of an earlier run of this name instead of recovering from them.",
    )
    keep: bool = _knob(
        False,
        "--sparse-ckpt-keep",
        "Keep the slots after training has ended. Without it they are removed once a dense checkpoint of the last "
        "step is durable, and kept if there is no --save.",
    )
    host_memory_gib: float = _knob(
        0.0,
        "--sparse-ckpt-host-memory-gib",
        "Limit of the slots' memory per rank; 0 is no limit but the file system's free space. The plan is "
        "printed, and refused if it needs more; so are slots of an earlier run that take more.",
        unit="GiB",
    )
    transcript: str = _knob(
        "auto",
        "--sparse-ckpt-transcript",
        "Keep what crosses pipeline stage boundaries, so that only the stage of a failed worker rolls back and "
        "replays; `auto` is on where there is more than one stage. Without it all stages roll back.",
        choices=("auto", "on", "off"),
    )
    transcript_memory_gib: float = _knob(
        0.0,
        "--sparse-ckpt-transcript-memory-gib",
        "Limit of the transcript's memory per rank; 0 is no limit but the file system's free space. A plan that needs "
        "more turns the transcript off with a warning.",
        unit="GiB",
    )
    digest: str = _knob(
        "on",
        "--sparse-ckpt-digest",
        "Digest every operator of a slot (XXH3, 128 bits) before it is committed and verify it before it is used. "
        "`on`: the GPU digests what is copied where it lies; without one, or in a build without nvcc, threads digest "
        "the copy. `host`: threads do it always.",
        choices=("on", "host", "off"),
    )
    digest_threads: int = _knob(
        0,
        "--sparse-ckpt-digest-threads",
        "Threads per rank that digest slots, or only verify them where a GPU makes the digests, and fill their memory; "
        "0 is half of the rank's share of the cores, 8 at most.",
        unit="threads",
    )
    dense_interval: int = _knob(
        0,
        "--sparse-ckpt-dense-interval",
        "Write a dense checkpoint to --save every so many iterations in addition to --save-interval; 0 is never.",
        unit="iterations",
    )
    dense_after_recovery: bool = _knob(
        True,
        "--sparse-ckpt-dense-after-recovery",
        "Write a dense checkpoint to --save right after a conversion on all ranks; a stage that recovers alone writes "
        "none.",
        type=on_off_argument,
        metavar="on|off",
    )
    chunk_mib: int = _knob(
        0,
        "--sparse-ckpt-chunk-mib",
        "Size of one copy from device to host. Small chunks let the model's own small copies pass between them, large "
        "ones waste less of the link; 0 is what a calibration in the first iterations finds best, and 4 on the CPU.",
        unit="MiB",
    )
    chunks_in_flight: int = _knob(
        0,
        "--sparse-ckpt-chunks-in-flight",
        "Chunks handed to the device at a time; 0 is what the calibration finds best, and 2 on the CPU.",
        unit="chunks",
    )
    bandwidth_gib_per_second: float = _knob(
        0.0,
        "--sparse-ckpt-bandwidth-gib-per-second",
        "Cap on the snapshot copies' bandwidth per rank; 0 is no cap. `auto` plans with the cap.",
        unit="GiB/s",
    )
    log_directory: Path | None = _knob(
        None,
        "--sparse-ckpt-log-dir",
        "Directory of the JSONL events, one file a rank; none are written without it.",
        type=Path,
    )
    log_level: str = _knob(
        "info",
        "--sparse-ckpt-log-level",
        "Least severe message that is printed.",
        choices=("debug", "info", "warning", "error"),
    )
    progress: str = _knob(
        "auto",
        "--sparse-ckpt-progress",
        "Progress display on rank 0: `live` table, `plain` lines, `off`; `auto` is live on a terminal, else plain.",
        choices=("auto", "live", "plain", "off"),
    )
    inject: Plan | None = _knob(
        None,
        "--sparse-ckpt-inject",
        "Faults on purpose, to see a recovery: `kill@rank=3,point=forward:2,iteration=7; random@seed=1,mtbf=30s` (see "
        "`docs/faults.md`).",
        type=parse,
        metavar="PLAN",
    )
    dry_run: bool = _knob(
        False,
        "--sparse-ckpt-dry-run",
        "Print the plan (operators, bytes per slot, window, host memory, replay length) and exit. Where `auto` chooses "
        "the window, the iterations that it measures are trained first.",
    )

    def __post_init__(self) -> None:
        changed = [knob.name for knob in fields(self) if getattr(self, knob.name) != knob.default]
        if changed and not self.enabled:
            raise ConfigError(f"{flag_of(changed[0])} does nothing without --sparse-ckpt: add it")
        for name, low in {"max_window": 1, "measure_iterations": 2, "reorder_windows": 1}.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{flag_of(name)} {getattr(self, name)}: must be at least {low}")
        for name, most in {"chunk_mib": MAX_CHUNK_MIB, "chunks_in_flight": MAX_CHUNKS_IN_FLIGHT}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{flag_of(name)} {getattr(self, name)}: must be 0 to {most}; 0 calibrates")
        if not 0 <= self.digest_threads <= MAX_DIGEST_THREADS:
            raise ConfigError(f"{flag_of('digest_threads')} {self.digest_threads}: must be 0 to {MAX_DIGEST_THREADS}")
        for name in ("host_memory_gib", "transcript_memory_gib", "bandwidth_gib_per_second", "dense_interval"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{flag_of(name)} {getattr(self, name)}: must be 0, which turns it off, or above")
        if not 0 < self.copy_share <= 1:
            raise ConfigError(f"{flag_of('copy_share')} {self.copy_share}: must be above 0, and 1 at most")
        for name in ("reorder_change", "reorder_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{flag_of(name)} {getattr(self, name)}: must be between 0 and 1")
        if not self.name.isprintable() or not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"--sparse-ckpt-name {self.name!r}: must be a file name without '/' or a leading dot")
        if len(self.name.encode()) > MAX_NAME_BYTES:
            raise ConfigError(
                f"--sparse-ckpt-name of {len(self.name)} characters: must be at most {MAX_NAME_BYTES} bytes"
            )

    def threads(self, ranks_on_node: int) -> int:
        """Threads that digest slots and fill their memory on this rank."""
        share = len(os.sched_getaffinity(0)) // max(ranks_on_node, 1)
        return self.digest_threads or max(1, min(8, share // 2))

    @property
    def job_directory(self) -> Path:
        """Where the slot files of this job lie."""
        return self.directory / self.name


def flag_of(name: str) -> str:
    """The command-line flag of the knob `name`."""
    return str(next(f.metadata["flag"] for f in fields(SparseCheckpointConfig) if f.name == name))


def _destination(name: str) -> str:
    return f"sparse_ckpt__{name}"


def add_sparse_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Adds every `--sparse-ckpt*` flag to `parser`."""
    group = parser.add_argument_group("sparse checkpointing")
    for knob in fields(SparseCheckpointConfig):
        meta = dict(knob.metadata)
        flag, text, unit = meta.pop("flag"), meta.pop("text").replace("%", "%%"), meta.pop("unit", None)
        help_text = f"{text} [{unit}]" if unit else text
        if knob.default is False and "type" not in meta:
            group.add_argument(flag, dest=_destination(knob.name), action="store_true", help=help_text)
            continue
        if "choices" not in meta:
            meta.setdefault("type", type(knob.default))
        group.add_argument(flag, dest=_destination(knob.name), default=knob.default, help=help_text, **meta)


def config_from_namespace(namespace: argparse.Namespace) -> SparseCheckpointConfig:
    """The configuration that the parsed flags describe.

    Raises:
        ConfigError: a value is out of its range.
    """
    return SparseCheckpointConfig(
        **{knob.name: getattr(namespace, _destination(knob.name)) for knob in fields(SparseCheckpointConfig)}
    )
