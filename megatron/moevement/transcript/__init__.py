"""HOST MEMORY: what crossed a stage boundary, kept by the sender."""
