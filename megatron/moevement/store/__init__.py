"""HOST MEMORY: slots in shared memory that outlive their worker."""
