"""Turns configs into runs: resolves them, prunes, trains, writes files and reports."""
