"""DENSE CHECKPOINTS: where they lie and how they become durable."""
