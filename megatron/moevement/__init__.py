"""MoEvement for Megatron: sparse checkpoints of Mixture-of-Experts training, exact recovery.

Read the package as the data flows: operators (what), schedule (when), snapshot (device to host), store (host
memory), recovery (after a failure), dense (a dense checkpoint), manager (one iteration and one recovery).
Only `integration` touches megatron.core.
"""

__version__ = "0.1.0"
