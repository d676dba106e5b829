"""A head of agents under a clock of the test."""

import dataclasses
from dataclasses import asdict
from typing import Any

from megatron.moevement.agent.head import Head, Limits
from megatron.moevement.agent.marks import Mark

FRESH = Mark(3, 0.0, 0, 1, False, "forward", False)


class Cluster:
    """A head under a clock of the test, and what it has ordered."""

    def __init__(self, nodes: int = 1, slots: int = 2, limits: Limits | None = None) -> None:
        self.now, self.orders, self.said = 0.0, list[tuple[int, dict[str, Any]]](), list[str]()
        limits = limits or Limits(failures=10, idle_failures=3)
        order = lambda agent, message: self.orders.append((agent, message))  # noqa: E731
        self.head = Head(nodes, limits, order, self.said.append, lambda: self.now)
        self.life, self.iteration = 0, 1
        for node in range(nodes):
            self.enter(node, node, slots)

    def enter(self, agent: int, node: int | None, slots: int = 2) -> None:
        self.head.handle({"is": "enter", "agent": agent, "node": node, "slots": slots})

    def about(self, rank: int, what: str, mark: Mark | None = None, **more: Any) -> None:
        member = self.head.members[rank]
        mark = mark or dataclasses.replace(FRESH, generation=self.head.generation, iteration=self.iteration)
        event = {"is": what, "agent": member.agent, "rank": rank, "incarnation": member.incarnation}
        self.head.handle({**event, "mark": asdict(mark), **more})

    def die(self, rank: int) -> None:
        self.about(rank, "ended", status=-9, why="SIGKILL")

    def ready(self, *ranks: int) -> None:
        for rank in ranks:
            self.about(rank, "ready")

    def tick(self, alive: list[int] | None = None, marks: dict[int, Mark] | None = None) -> None:
        self.life += 1
        lives: dict[int, tuple[int, list[dict[str, Any]]]] = {}
        for agent in self.head.agents if alive is None else alive:
            members = [member for member in self.head.members.values() if member.agent == agent]
            reports = [
                {"rank": m.rank, "incarnation": m.incarnation, "mark": asdict((marks or {}).get(m.rank, FRESH))}
                for m in members
            ]
            lives[agent] = (self.life, reports)
        self.head.tick(lives)

    def taken(self) -> list[tuple[int, dict[str, Any]]]:
        orders, self.orders = self.orders, []
        return orders


def does(orders: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, str, Any]]:
    return [(agent, order["do"], order.get("rank", order.get("generation"))) for agent, order in orders]
