"""The errors that are the user's to fix.

An error of these types carries one line that names the file or config key and says what to do. The front door prints
the line and leaves with ``exit_code``; anything else is a defect of ours and shows its stack trace.
"""

from __future__ import annotations


class TilefleetError(Exception):
    """The work failed or the data is bad (exit code 1)."""

    exit_code = 1


class UsageError(TilefleetError):
    """The command line or a config is wrong; nothing was started (exit code 2)."""

    exit_code = 2
