"""AFTER A FAILURE: which slots to load, and the sparse-to-dense conversion."""
