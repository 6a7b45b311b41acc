"""How long a rank waits for the others in a collective before it gives them up."""

from __future__ import annotations

import os
from datetime import timedelta

from minitron_mcore.errors import InputError

VARIABLE = "MINITRON_TIMEOUT_MINUTES"
DEFAULT_MINUTES = 30


def collective_timeout() -> timedelta:
    """The timeout of every process group. Raises InputError where the variable is not a whole number of minutes."""
    given = os.environ.get(VARIABLE, str(DEFAULT_MINUTES))
    if not given.isdecimal() or int(given) < 1:
        raise InputError(VARIABLE, given, "must be a whole number of minutes, 1 or more")
    return timedelta(minutes=int(given))
