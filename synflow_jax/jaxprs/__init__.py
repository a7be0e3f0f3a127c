"""Reads the programs that JAX traces: one interpreter, and evaluation that cannot overflow."""
