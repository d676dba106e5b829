"""A worker for the agent's tests: sums over gloo in a loop, survives failures, and writes down what happens to it.

Arguments: folder, iterations to make, seconds an iteration. Faults: `<folder>/fault-<rank>` holds a word that the rank
obeys once, when it reads the file. A replacement learns the iteration from the others.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.moevement.agent.link import WorkerLink
from megatron.moevement.agent.sockets import shut_down_sockets
from megatron.moevement.errors import JobEnded, PeerLost


class Worker:
    """One rank."""

    def __init__(self, folder: Path, iterations: int, seconds: float) -> None:
        link = WorkerLink.from_environment()
        assert link is not None
        self.link, self.folder, self.iterations, self.seconds = link, folder, iterations, seconds
        self.memory = torch.arange(1 << 16, dtype=torch.float32) + link.rank
        self.iteration = -1 if link.replacement else 0
        self.noted = -1
        link.watch(self.abort)

    def abort(self) -> None:
        """Frees the main thread."""
        self.note("abort")
        shut_down_sockets()

    def note(self, what: str, **more: object) -> None:
        """Appends a line to the rank's file."""
        line = {"what": what, "at": time.monotonic(), "pid": os.getpid(), "generation": self.link.generation, **more}
        with (self.folder / f"rank-{self.link.rank}").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def run(self) -> None:
        """Generation after generation, until the iterations are made."""
        self.note("start", replacement=self.link.replacement)
        self.obey("early")
        if self.link.replacement:
            self.link.next_generation()
        while True:
            try:
                self.train()
                break
            except (RuntimeError, PeerLost) as error:
                self.note("left", error=str(error)[:80])
                if dist.is_initialized():
                    dist.destroy_process_group()
                self.link.next_generation()
        self.note("done", memory=self.memory.sum().item(), iteration=self.iteration)
        dist.destroy_process_group()
        self.link.close()

    def train(self) -> None:
        """One generation."""
        link = self.link
        timeout = timedelta(seconds=60)
        dist.init_process_group(
            "gloo", store=link.store(timeout), rank=link.rank, world_size=link.world_size, timeout=timeout
        )
        newest = torch.tensor([self.iteration])
        dist.all_reduce(newest, op=dist.ReduceOp.MAX)
        self.iteration = max(0, int(newest))
        self.note("in", iteration=self.iteration)
        last = False
        while self.iteration < self.iterations and not last:
            link.beat("forward", self.iteration)
            self.obey("forward")
            time.sleep(self.seconds)
            total = torch.tensor([1.0, (self.folder / "finish").exists()])
            dist.all_reduce(total)
            assert int(total[0]) == link.world_size
            last = bool(total[1])
            self.iteration += 1
            if self.noted != link.generation:
                self.noted = link.generation
                self.note("works", memory=self.memory.sum().item())
        dist.barrier()

    def obey(self, point: str) -> None:
        """The fault that the test has ordered, if any."""
        path = self.folder / f"fault-{self.link.rank}"
        if not path.exists() or not (word := path.read_text()).startswith(point):
            return
        if not word.endswith("always"):
            path.unlink()
        self.note("fault", word=word)
        fault = word.split()[1]
        if fault == "hang":
            time.sleep(600)
        elif fault == "refuse":
            sys.exit(2)
        elif fault == "error":
            raise ValueError("an error of the script")
        else:
            os.kill(os.getpid(), signal.Signals[fault])


def main() -> int:
    """Runs the rank."""
    worker = Worker(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    try:
        worker.run()
    except JobEnded as end:
        worker.note("ended", reason=str(end))
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
