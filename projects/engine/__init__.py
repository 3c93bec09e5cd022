"""Launching, training, checkpoints."""
