"""Errors that a user can mend.

The launchers (train_net.py, demo.py, tools/) print a UserError as one paragraph and exit with code 2; every other
exception is a defect of ours and keeps its traceback. A message names what was expected, what was found, and what to do.
"""


class UserError(Exception):
    """Something that the person who started the program can put right."""


class ConfigError(UserError):
    """A wrong key, value or config file."""


class DataError(UserError):
    """A missing data set or file, or annotations that cannot be used."""


class CheckpointError(UserError):
    """A weights file that is missing, truncated, corrupt, or that asks for more than plain tensors."""
