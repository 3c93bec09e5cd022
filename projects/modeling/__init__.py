"""Blocks that more than one paper needs."""
