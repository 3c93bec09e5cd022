"""Data sets by name, the mapper, and the training loader."""
