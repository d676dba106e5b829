"""Who starts, watches and replaces worker processes: one agent per node, and the workers' link to it."""
