"""Draws the figures. Each figure has one file, and is drawn from rows alone."""
