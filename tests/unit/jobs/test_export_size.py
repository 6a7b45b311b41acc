"""`max_shard_size`, as transformers reads it where it is clear, and one sentence where it is not."""

from __future__ import annotations

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.jobs.export import parse_size

SIZES = {
    "5GB": 5_000_000_000,
    "500MB": 500_000_000,
    "2GiB": 2 << 30,
    "300KiB": 300 << 10,
    "10KB": 10_000,
    "1.5GB": 1_500_000_000,
    "1TB": 10**12,
    "123456": 123_456,
    " 5 GB ": 5_000_000_000,
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes(text: str) -> None:
    assert parse_size(text, "max_shard_size") == SIZES[text]


@pytest.mark.parametrize(
    "text", ["5gb", "5Gb", "5kb", "GB", "", "-5GB", "5 giga", "5G", "1.5", "1e9", "0", "0.0001KB", "٣GB"]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^max_shard_size=.*write a (number of bytes|size as)") as caught:
        parse_size(text, "max_shard_size")
    assert "\n" not in str(caught.value)
