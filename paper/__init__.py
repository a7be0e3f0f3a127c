"""Reproduces the figures of the paper: their configs, their drawing, published numbers, results."""
