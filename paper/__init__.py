"""The figures of the paper: their configs, their drawing, the published numbers and our results."""
