"""How long a rank waits for the others in a collective, before it takes them for dead."""

from __future__ import annotations

import os
from datetime import timedelta

from minitron_mcore.errors import InputError

VARIABLE = "MINITRON_TIMEOUT_MINUTES"
DEFAULT_MINUTES = 30


def collective_timeout() -> timedelta:
    """Of every process group. Raises InputError for a variable that is no whole number of minutes from 1 on."""
    given = os.environ.get(VARIABLE, str(DEFAULT_MINUTES))
    if not given.isdecimal() or int(given) < 1:
        raise InputError(f"{VARIABLE}={given} must be a whole number of minutes, 1 or more")
    return timedelta(minutes=int(given))
