"""Popularity: every routed token is counted once, passes without gradients not at all."""

from collections.abc import Callable

import torch

from megatron.moevement.integration import train_loop
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.router_popularity import RouterPopularity
from megatron.moevement.integration.train_loop import NoHooks


def test_every_token_is_counted_once_per_choice(build: Callable[..., TrainingJob]) -> None:
    job = build()
    popularity = RouterPopularity(job.chunks)
    for chunk in job.chunks:
        chunk.train()
    train_loop.train_iteration(job, NoHooks())
    counts = popularity.take()
    tokens = job.config.samples_per_iteration * job.config.seq_length * job.config.moe_router_topk
    assert counts.keys() == {(layer, expert) for layer in range(2) for expert in range(4)}
    for layer in range(2):
        assert sum(count for (at, _), count in counts.items() if at == layer) == tokens
    assert popularity.take() == {}, "it starts again from 0"
    train_loop.train_iteration(job, NoHooks())
    train_loop.train_iteration(job, NoHooks())
    assert sum(popularity.take().values()) == 2 * 2 * tokens


def test_passes_without_gradients_or_training_do_not_count(build: Callable[..., TrainingJob]) -> None:
    job = build()
    popularity = RouterPopularity(job.chunks)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    mask = torch.triu(torch.ones(1, 1, 16, 16, dtype=torch.bool), diagonal=1)
    job.chunks[0].train()
    with torch.no_grad():
        job.chunks[0](tokens, tokens, mask)
    job.chunks[0].eval()
    job.chunks[0](tokens, tokens, mask)
    assert popularity.take() == {}
    job.chunks[0].train()
    job.chunks[0](tokens, tokens, mask)
    assert sum(popularity.take().values()) == 2 * 16 * job.config.moe_router_topk
