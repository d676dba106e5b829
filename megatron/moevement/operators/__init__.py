"""WHAT is snapshotted: the operator table, parameter slices, start states and iteration records."""
