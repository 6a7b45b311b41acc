"""What constraints.txt pins: licences that go with Apache-2.0, and no vulnerability that is known.

Licences are those that the installed packages state themselves; vulnerabilities those of OSV (https://osv.dev), which
has PyPI's own advisories and GitHub's.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)", re.MULTILINE)
OSV = "https://api.osv.dev/v1/querybatch"

# Of a licence's name, as packages write it. The last two ask something of whoever changes or hands on the package
# itself, which nobody does here: it is a dependency, installed as its authors made it.
COMPATIBLE = re.compile(
    r"Apache|MIT|(?:\dB|B)SD|ISC\b|PSF|Python Software Foundation|CNRI-Python|Zlib|CC0|BSL-1\.0|Unlicense|DFSG approved"
    r"|MPL|Mozilla|LGPL|Lesser General Public"
)
# Not of every machine: of an extra, of a GPU's, of another system's or of another Python. NVIDIA's come with PyTorch's
# CUDA build, and their licence lets them be used and handed on with it; none is part of this project, nor of its CPU
# image.
ELSEWHERE = {
    **dict.fromkeys(("async-timeout", "nvidia-resiliency-ext"), "Apache-2.0"),
    **dict.fromkeys(("cffi", "exceptiongroup", "greenlet", "tomli", "triton"), "MIT"),
    "decorator": "BSD-2-Clause",
    **dict.fromkeys(("appnope", "httpx2-jsfetch", "pycparser", "pynvml"), "BSD-3-Clause"),
    **dict.fromkeys(("cuda-bindings", "cuda-pathfinder", "cuda-toolkit"), "NVIDIA"),
}
# Where a package lists what only a part of its source has: of docutils an editor's mode, which is not installed.
STATED = {"docutils": "BSD-2-Clause"}
OF_CUDA = re.compile(r"nvidia-(?:cu[\w-]+|nccl-cu\d+|nvjitlink|nvshmem-cu\d+|nvtx)")
# Advisory -> why it does not matter here. One that is fixed goes from here, as its version does from constraints.txt.
ACCEPTED: dict[str, str] = {}


def pins() -> list[tuple[str, str]]:
    """(name, version), for every Python that is supported."""
    return PIN.findall(CONSTRAINTS.read_text(encoding="utf-8"))


def licence_of(stated: Any) -> str:
    """By the newest of the three ways in which a package states it."""
    classifiers = [text.removeprefix("License :: ") for text in stated.get_all("Classifier") or ()]
    named = [text for text in classifiers if text in ("OSI Approved",) or "License" in text or "approved" in text]
    return str(stated.get("License-Expression") or "; ".join(named) or stated.get("License") or "").split("\n")[0]


def is_compatible(licence: str) -> bool:
    """Of several, joined by AND or listed, every one; of a choice one."""
    listed = re.split(r"\s+AND\s+|;", re.sub(r"[()]", " ", re.sub(r"\sWITH\s+\S+", "", licence)))
    return bool(licence) and all(
        any(COMPATIBLE.search(choice) for choice in re.split(r"\s+OR\s+", each)) for each in listed if each.strip()
    )


def test_what_is_compatible() -> None:
    good = ("Apache-2.0 AND MIT", "GPL-3.0 OR MIT", "Apache-2.0 WITH LLVM-exception", "OSI Approved :: MIT License")
    assert [is_compatible(each) for each in good] == [True] * 4
    bad = ("", "GPL-3.0-only", "MIT AND AGPL-3.0", "Proprietary", "CC-BY-NC-4.0", "GNU General Public License v3")
    assert [is_compatible(each) for each in bad] == [False] * 6


@pytest.mark.slow
def test_licences_go_with_apache_2() -> None:
    found, missing = {}, set()
    for name in dict(pins()):
        try:
            found[name] = licence_of(distribution(name).metadata)
            found[name] = STATED.get(name, found[name])
        except PackageNotFoundError:
            if name not in ELSEWHERE and not OF_CUDA.fullmatch(name):
                missing.add(name)
    assert len(found) > 100, "this environment has them"
    assert {name: licence for name, licence in found.items() if not is_compatible(licence)} == {}
    assert missing == set(), "neither installed here nor known: look their licences up"


def advisories(answer: Mapping[str, Any], asked: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """(name, version, advisory) of an answer of OSV's."""
    for (name, version), result in zip(asked, answer["results"], strict=True):
        yield from ((name, version, each["id"]) for each in result.get("vulns", ()))


def test_an_advisory_is_seen() -> None:
    answer: dict[str, Any] = {"results": [{}, {"vulns": [{"id": "PYSEC-2025-1", "modified": "2025"}]}]}
    assert list(advisories(answer, [("a", "1"), ("b", "2")])) == [("b", "2", "PYSEC-2025-1")]


@pytest.mark.slow
def test_no_known_vulnerability() -> None:
    asked = pins()
    package = [{"version": version, "package": {"name": name, "ecosystem": "PyPI"}} for name, version in asked]
    request = urllib.request.Request(
        OSV, json.dumps({"queries": package}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as stream:
            answer = json.load(stream)
    except (urllib.error.URLError, TimeoutError) as error:
        pytest.skip(f"{OSV} cannot be reached: {error}")
    found = set(advisories(answer, asked))
    assert {each for each in found if each[2] not in ACCEPTED} == set()
    assert ACCEPTED.keys() <= {each[2] for each in found}, "what is fixed goes from ACCEPTED"
