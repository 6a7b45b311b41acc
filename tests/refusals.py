"""What a test expects of a refusal: which key and value it names, and words of its rule and of its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from minitron_mcore.errors import InputError

ANY = object()


@contextmanager
def refuses(key: str = "", value: Any = ANY, rule: str = "", remedy: str = "") -> Iterator[None]:
    """The block raises InputError of just this key and this value (None: none is shown), in one line."""
    with pytest.raises(InputError) as caught:
        yield
    error = caught.value
    assert error.key == key and (value is ANY or str(error.value) == str(value)), (error.key, error.value, str(error))
    assert rule in error.rule and remedy in error.remedy and "\n" not in str(error), str(error)
