"""A fork server: imports torch and megatron.core once, then forks worker processes that run pretrain_gpt.py.

Talks JSON lines: a request names environment, arguments, faults and an output file, the answer is the worker's pid; an
ended worker is reported as {"ended": pid, "status": n}. Workers are real processes with their own memory; only the
import is shared.
"""

import importlib
import json
import os
import select
import signal
import sys
from typing import Any


def main() -> None:
    """Serves requests until its standard input closes, then kills every worker that is left."""
    from megatron.moevement.integration import cpu_backend, quiet

    quiet.quiet_core_warnings()
    cpu_backend.hide_cuda()
    cpu_backend.install()
    import pretrain_gpt  # noqa: F401
    import tests.support.faults  # noqa: F401
    from megatron.moevement.integration import program  # noqa: F401

    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    workers: set[int] = set()
    answer({"ready": os.getpid()})
    buffered = b""
    while True:
        ready, _, _ = select.select([0, readable], [], [])
        if readable in ready:
            os.read(readable, 4096)
            reap(workers)
        if 0 not in ready:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            break
        *lines, buffered = (buffered + data).split(b"\n")
        for line in lines:
            pid = fork(json.loads(line), (readable, writable))
            workers.add(pid)
            answer({"started": pid})
    for pid in workers:
        os.kill(pid, signal.SIGKILL)


def answer(message: dict[str, Any]) -> None:
    """One JSON line on standard output."""
    os.write(1, json.dumps(message).encode() + b"\n")


def reap(workers: set[int]) -> None:
    """Reports every worker that has ended."""
    while workers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        workers.discard(pid)
        answer({"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def fork(request: dict[str, Any], inherited: tuple[int, int]) -> int:
    """Forks a worker; returns its pid in the parent, never returns in the worker."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in inherited:
            os.close(descriptor)
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(request["environment"])
        sys.argv = ["pretrain_gpt.py", *request["arguments"]]
        code = run(request["faults"], request["program"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(faults: list[dict[str, Any]], program: str) -> int:
    """The worker's program, a module with a `main`, with its faults in place."""
    from tests.support import faults as injected

    injected.install(faults)
    return int(importlib.import_module(program).main())


if __name__ == "__main__":
    main()
