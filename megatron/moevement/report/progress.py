"""The progress display of rank 0: a live table, plain lines, or nothing. It listens to the events.

The process that takes over rank 0 goes on with the display; what it can't tell, the agent's own lines do.
"""

import os
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron.moevement.report.narration import RECOVERY_KINDS, RecoveryNarration
from megatron.moevement.report.read_events import Event

_WARN_SHARE = 0.9
_REASONS_SHOWN = 4
# `--sparse-ckpt-log-level`, and how severe what is narrated is; anything else is `info`.
LEVELS = ("debug", "info", "warning", "error")
_SEVERITY = {"slot": "debug", "conversion": "info", "slot_failed": "warning", "window_given_up": "warning"}
_SEVERITY |= {"transcript_off": "warning", "transcript_failed": "warning"}


@dataclass(frozen=True, slots=True)
class ProgressSettings:
    """What the display is told of the job. `mode` is a value of `--sparse-ckpt-progress`, `level` one of
    `--sparse-ckpt-log-level`: less severe events are not narrated. Iterations are always shown."""

    train_iters: int
    tokens_per_iteration: int
    log_interval: int
    mode: str
    level: str = "info"


class ProgressDisplay:
    """A listener for `EventLog.listen` that shows an iteration's figures and narrates a recovery.

    Listeners are called on several threads. A terminal or pipe that breaks turns the display off and never ends
    training.
    """

    def __init__(self, settings: ProgressSettings, stream: TextIO | None = None) -> None:
        self._settings = settings
        self._stream = stream if stream is not None else sys.stdout
        self._lock = threading.Lock()
        self.mode = _resolve(settings.mode, self._stream)
        self._live: Live | None = None
        self._recovery = RecoveryNarration()
        self._shown: Event | None = None

    def __call__(self, event: Event) -> None:
        """Takes one event; kinds that the display doesn't know are passed over."""
        if self.mode == "off":
            return
        with self._lock:
            try:
                self._take(event)
            except (OSError, ValueError) as error:
                self._give_up(error)

    def close(self) -> None:
        """Leaves the last table on the terminal and gives the terminal back."""
        live, self._live = self._live, None
        if live is None:
            return
        try:
            live.stop()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _take(self, event: Event) -> None:
        if event["kind"] == "iteration":
            # What a recovery replays was shown before it, and is narrated.
            if not event.get("replayed"):
                self._iteration(event)
        elif event["kind"] == "finished":
            self.close()
        elif LEVELS.index(_severity(event)) >= LEVELS.index(self._settings.level):
            for line in self._narrate(event):
                self._say(line)
            if event["kind"] in RECOVERY_KINDS:
                self._update()

    def _iteration(self, event: Event) -> None:
        number = int(event["iteration"]) + 1
        if number % self._settings.log_interval and number != self._settings.train_iters:
            return
        if self.mode == "plain":
            self._say(plain_line(event, self._settings))
            return
        if self._live is None:
            console = Console(file=self._stream)
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()
            # A killed worker can't give the cursor back.
            console.show_cursor(True)
        self._shown = event
        self._update()

    def _update(self) -> None:
        if self._live is not None and self._shown is not None:
            self._live.update(live_table(self._shown, self._settings, self._recovery), refresh=True)

    def _narrate(self, event: Event) -> list[str]:
        """Lines about anything but an iteration."""
        kind = event["kind"]
        if kind == "start":
            return _start_lines(event)
        if kind == "plan":
            return [f"plan: window of {event['window']} slots, {_bytes(event['memory_bytes'])} of host memory a rank"]
        if kind in RECOVERY_KINDS:
            return self._recovery.lines(event)
        if kind == "slot":
            return [f"slot of step {event['step']} committed: {_bytes(event['data_bytes'])}"]
        if kind == "slot_failed":
            return [f"slot of step {event['step']} failed, training goes on: {event['reason']}"]
        if kind == "transcript":
            kept = f"{event['segments']} iterations, {_bytes(event['memory_bytes'])} of host memory a rank"
            return [f"boundary transcript: {kept}"]
        if kind == "transcript_off":
            return [f"no boundary transcript, training goes on: {event['reason']}"]
        if kind == "transcript_failed":
            return [f"no boundary transcript of iteration {event['iteration']}: {event['reason']}"]
        if kind == "calibration_failed":
            return [f"chunks of copies are not calibrated: {event['reason']}"]
        if kind == "window_given_up":
            return [f"slot of step {event['step']} given up: {event['reason']}"]
        if kind == "dense_save":
            if not event["ok"]:
                return [f"dense checkpoint of step {event['step']} failed, training goes on: {event['error']}"]
            return [f"dense checkpoint of step {event['step']}: {_bytes(event['nbytes'])} in {event['seconds']:.2f} s"]
        if kind == "injected":
            return [f"fault injected: {event['fault']}"]
        if kind == "reorder":
            refused = ", refused: the new order's slots would not fit" if event["refused"] else ""
            return [f"order of experts changed at step {event['step']}{refused}"]
        return []

    def _say(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
            return
        self._stream.write(line + "\n")
        self._stream.flush()

    def _give_up(self, error: Exception) -> None:
        self.mode, self._live = "off", None
        if isinstance(error, BrokenPipeError):
            _detach(self._stream)


def _severity(event: Event) -> str:
    if event["kind"] == "dense_save" and not event["ok"]:
        return "error"
    return _SEVERITY.get(event["kind"], "info")


def plain_line(event: Event, settings: ProgressSettings) -> str:
    """One compact line about an iteration, numbered from 1 as Megatron does."""
    parts = [
        f"iteration {event['iteration'] + 1:>{len(str(settings.train_iters))}}/{settings.train_iters}",
        f"loss {_number(event.get('loss'), '.4f')}",
        f"grad norm {_norm(event)}",
        f"{event['seconds']:.3f} s",
        f"{_tokens_per_second(event, settings):,.0f} tokens/s",
    ]
    if event.get("window"):
        parts += [
            f"slot {event['window_index'] + 1}/{event['window']} {_bytes(event['slot_bytes'])}",
            f"stall {1000 * event['stall_seconds']:.1f} ms",
            f"oldest {_age(event)}",
            f"memory {_memory(event)}",
        ]
    if event.get("failed_slots"):
        parts.append(f"failed slots {event['failed_slots']}")
    return " | ".join(parts)


def live_table(event: Event, settings: ProgressSettings, recovery: RecoveryNarration) -> Group:
    """The figures of an iteration as a two-column block under a progress bar, with a recovery that is under way."""
    number = int(event["iteration"]) + 1
    table = Table.grid(padding=(0, 3))
    for style in ("dim", "bold", "dim", "bold"):
        table.add_column(style=style, no_wrap=True)
    rows: list[tuple[str, str | Text]] = [
        ("loss", _number(event.get("loss"), ".4f")),
        ("tokens/s", f"{_tokens_per_second(event, settings):,.0f}"),
        ("grad norm", _norm(event)),
        ("iteration time", f"{event['seconds']:.3f} s"),
    ]
    if event.get("window"):
        failed, used = int(event["failed_slots"]), event["memory_used_bytes"]
        full = used > _WARN_SHARE * max(event["memory_limit_bytes"], 1)
        rows += [
            ("slot", _bytes(event["slot_bytes"])),
            ("stall", f"{1000 * event['stall_seconds']:.1f} ms"),
            ("window", _bar(event["window_index"] + 1, event["window"])),
            ("oldest snapshot", _age(event)),
            ("memory", Text(_memory(event), style="yellow" if full else "")),
            ("failed slots", Text(str(failed), style="red" if failed else "")),
            ("last recovery", recovery.last),
            ("loadable", f"step {event['loadable_step']}" if event["loadable_step"] >= 0 else "no window yet"),
        ]
    for left, right in zip(rows[::2], rows[1::2], strict=True):
        table.add_row(*left, *right)
    head = Text.assemble(
        (f"iteration {number}/{settings.train_iters}  ", "bold"), _bar(number, settings.train_iters, 40)
    )
    if not recovery.now:
        return Group(head, table)
    done, of = recovery.progress
    running = Text.assemble((f"recovery: {recovery.now}  ", "bold yellow"), _bar(done, of) if of else "")
    return Group(head, running, table)


def _resolve(mode: str, stream: TextIO) -> str:
    if mode != "auto":
        return mode
    try:
        return "live" if stream.isatty() else "plain"
    except ValueError:
        return "off"


def _start_lines(event: Event) -> list[str]:
    if event.get("run"):
        lines = [f"start: slots of steps {event['run'][0]} to {event['run'][1]} can be loaded by every rank"]
    elif event.get("dense_step") is not None:
        lines = [f"start: dense checkpoint of step {event['dense_step']}"]
    else:
        lines = ["start: from scratch"]
    reasons = _by_text(event.get("reasons", ()))
    lines += [f"  {reason}" for reason in reasons[:_REASONS_SHOWN]]
    if len(reasons) > _REASONS_SHOWN:
        lines.append(f"  and {len(reasons) - _REASONS_SHOWN} more reasons, see the events")
    return lines


def _by_text(reasons: Iterable[str]) -> list[str]:
    """`rank 0: text` and `rank 1: text` as one line."""
    ranks: dict[str, list[str]] = {}
    for reason in reasons:
        rank, colon, text = reason.partition(": ")
        known = colon and rank.startswith("rank ")
        ranks.setdefault(text if known else reason, []).extend([rank.removeprefix("rank ")] if known else [])
    return [
        f"rank{'s' if len(who) > 1 else ''} {', '.join(who)}: {text}" if who else text for text, who in ranks.items()
    ]


def _detach(stream: TextIO) -> None:
    """Points a broken pipe at the null device, so that later prints and the flush at exit don't fail either."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _bar(done: int, total: int, width: int = 16) -> Text:
    filled = round(width * done / max(total, 1))
    return Text.assemble(("#" * filled, "green"), ("." * (width - filled), "dim"), f" {done}/{total}")


def _tokens_per_second(event: Event, settings: ProgressSettings) -> float:
    return settings.tokens_per_iteration / max(float(event["seconds"]), 1e-9)


def _norm(event: Mapping[str, Any]) -> str:
    return "skipped (overflow)" if event.get("skipped") else _number(event.get("grad_norm"), ".3f")


def _age(event: Event) -> str:
    bound = event.get("oldest_age_bound_steps")
    return f"{event['oldest_age_steps']}/{bound} steps" if bound else f"{event['oldest_age_steps']} steps"


def _memory(event: Event) -> str:
    return f"{_bytes(event['memory_used_bytes'])}/{_bytes(event['memory_limit_bytes'])}"


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
