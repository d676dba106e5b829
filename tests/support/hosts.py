"""Hosts on one machine: each has a network and pid namespace of its own, its own name and its own /dev/shm.

They share every other directory, as nodes share a file system. Needs root and iproute2; leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_NETWORK = "10.77.0"
_BOOT = 'hostname "$0"; mount --bind "$1" /etc/hosts; mount -t tmpfs -o size=2g tmpfs /dev/shm; shift; exec "$@"'
_NETNS = Path("/run/netns")
_PREFIX = "moevement"


def remedy() -> str:
    """What is missing for virtual hosts on this machine; empty if nothing is."""
    if os.geteuid() != 0:
        return "virtual hosts need root: run the tests as root"
    for program in ("ip", "nsenter", "unshare", "setpriv"):
        if subprocess.run(["sh", "-c", f"command -v {program}"], capture_output=True).returncode:
            return f"virtual hosts need {program}: run scripts/slurm/install.sh"
    return ""


class Hosts:
    """`n1`, `n2` and so on, and `ctl`, at one switch.

    Args:
        count: of those named by number.
        folder: for the file of their names.
    """

    def __init__(self, count: int, folder: Path) -> None:
        _remove_stale()
        self.names = [f"n{number + 1}" for number in range(count)] + ["ctl"]
        self._prefix = f"{_PREFIX}{os.getpid()}"
        self._folder = folder
        self._booted: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
        self._hosts_file = folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        self._hosts_file.write_text("\n".join(lines) + "\n")
        try:
            self._wire()
        except BaseException:
            self.close()
            raise

    def address(self, name: str) -> str:
        """Its address on the switch."""
        return f"{_NETWORK}.{254 if name == 'ctl' else int(name[1:])}"

    def _netns(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _wire(self) -> None:
        switch = self._netns("switch")
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for name in self.names:
            netns = self._netns(name)
            _ip("netns", "add", netns)
            _ip("-n", switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", netns)
            _ip("-n", switch, "link", "set", name, "master", "switch", "up")
            _ip("-n", netns, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", netns, "link", "set", device, "up")

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """The command on the host's network, but among this machine's processes."""
        return ["nsenter", f"--net={_NETNS / self._netns(name)}", *command]

    def boot(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Starts a host, whose first process is the command; what it prints goes to `<name>.log`."""
        # Whatever ends this process ends the hosts.
        words = ["setpriv", "--pdeathsig", "KILL", *self.inside(name, ())]
        words += "unshare --pid --fork --kill-child=SIGKILL --mount-proc --mount --uts --ipc sh -c".split()
        with (self._folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [*words, _BOOT, name, str(self._hosts_file), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=None if environment is None else {**environment},
            )
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 30
        while not (found := children.read_text().split()):
            assert process.poll() is None and time.monotonic() < deadline, self.said(name)
            time.sleep(0.01)
        self._booted[name] = (process, int(found[0]))

    def said(self, name: str) -> str:
        """What the host's first process printed."""
        path = self._folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def ended(self, name: str) -> int | None:
        """The status of the host's first process, once that has ended."""
        return self._booted[name][0].poll()

    def processes(self, name: str) -> list[int]:
        """Everything that runs on the host, by its pid on this machine."""
        if name not in self._booted:
            return []
        with contextlib.suppress(OSError):
            space = os.readlink(f"/proc/{self._booted[name][1]}/ns/pid")
            return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _pid_space(path) == space]
        return []

    def find(self, name: str, pid: int) -> int:
        """The pid on this machine of a process that calls itself `pid` on its host."""
        for process in self.processes(name):
            with contextlib.suppress(OSError):
                status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
                if status["NSpid"].split()[-1] == str(pid):
                    return process
        raise AssertionError(f"{name}: no process {pid}")

    def crash(self, name: str) -> None:
        """The host is gone at once, with its processes and its memory."""
        process, first = self._booted.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)
        process.wait(30)

    def cut(self, name: str) -> None:
        """Takes the host's link down: the others and it hear nothing of each other, no connection is closed."""
        _ip("-n", self._netns("switch"), "link", "set", name, "down")

    def mend(self, name: str) -> None:
        """Brings the link back."""
        _ip("-n", self._netns("switch"), "link", "set", name, "up")

    def close(self) -> None:
        """Ends every host and removes every network."""
        for name in list(self._booted):
            self.crash(name)
        for path in _NETNS.glob(f"{self._prefix}-*"):
            _ip("netns", "delete", path.name)


def alive(pid: int) -> bool:
    """Whether a process still runs; who has ended stays a zombie where the first process of its host reaps nobody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _pid_space(process: Path) -> str:
    try:
        return os.readlink(process / "ns" / "pid")
    except OSError:
        return ""


def _remove_stale() -> None:
    """Networks of test runs that were killed."""
    for path in _NETNS.glob(f"{_PREFIX}[0-9]*-*"):
        owner = path.name.removeprefix(_PREFIX).partition("-")[0]
        if owner != str(os.getpid()) and not Path(f"/proc/{owner}").exists():
            _ip("netns", "delete", path.name)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        print(f"ip {' '.join(words)}: {done.stderr.strip()}", file=sys.stderr)
        done.check_returncode()
