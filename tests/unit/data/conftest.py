"""Two real token files, and a section `data` that reads them."""

from __future__ import annotations

import pytest

from minitron_mcore.data.config import DataConfig

LENGTH = 64


@pytest.fixture(scope="module")
def prefixes(corpus):
    return str(corpus / "email_text_document"), str(corpus / "json_text_document")


@pytest.fixture
def config(prefixes, tmp_path):
    return DataConfig(train=prefixes[0], valid=prefixes[1], sequence_length=LENGTH, cache_path=str(tmp_path / "cache"))
