"""Prunes one network over several devices, and joins several processes into one job."""
