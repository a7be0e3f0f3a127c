"""The drawing of each figure, from rows alone."""
