"""WHEN an operator is snapshotted: window, ordering, slots and snapshot age."""
