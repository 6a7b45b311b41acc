"""A tokenizer's fingerprint: equal where the same ids mean the same, whatever the files look like.

A SentencePiece model and the tokenizer.json made from it share no byte, yet data of the one is data of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Optional

# Texts whose cutting tells one set of merges, scores or normalization from another. Each begins with a letter, since
# the kinds differ in the space they put before a text that begins with one, and none holds the name of a mark.
# To change one would give every tokenizer another fingerprint than the one that its data and checkpoints record.
PROBES = (
    "The quick brown fox jumps over the lazy dog, and nobody was surprised by it.",
    "Pruning and distillation: internationalization, unbelievably, counterrevolutionaries, antidisestablishment.",
    "x = [1, 22, 333, 4444, 55555, 1234567890, 3.14159, -2e-10, 0xff]",
    "def f(self, *args):\n    if not args:\n        return None\n    for a in args:\n            print(a)\n",
    "a b  c   d    e\tf\t\tg\n\nh \n i\r\nj",
    "HTTP/1.1 200 OK; https://example.org/a_b/c-d?e=f&g=%20#h (it's, don't, WE'LL)",
    "Größe, naïve café, São Paulo, Łódź, œuvre, ΑΒΓ αβγ, Привет, мир",
    "e\u0301 \ufb01 \u2460 \u00bd \uff21 \u00a0 \u2026",
    "A漢字かな交じり文、한국어, العربية, עברית, हिन्दी, ไทย",
    "B🙂👩‍👩‍👧🇺🇳∑∫√≠≤",
)


def fingerprint(pieces: dict[int, str], marks: dict[str, Optional[int]], encode: Callable[[str], list[int]]) -> str:
    """sha256 in hex, of what each id stands for, which ids are the marks, and how `encode` cuts PROBES.

    `pieces` by their ids, with a SentencePiece model's signs: U+2581 for a space, <0x0A> for a byte.
    Ids of a probe count without their order: two cuts of one run of spaces, equally good to a unigram model, may come
    in either order by a rounding.
    """
    digest = hashlib.sha256()
    for number, piece in sorted(pieces.items()):
        text = piece.encode("utf-8", errors="surrogatepass")
        digest.update(b"%d %d " % (number, len(text)) + text)
    digest.update(repr(sorted(marks.items())).encode())
    for probe in PROBES:
        digest.update(repr(sorted(encode(probe))).encode())
    return digest.hexdigest()


def files_fingerprint(folder: str, names: Iterable[str], begins: str = "") -> str:
    """sha256 in hex of the files of these names that are in `folder`, end to end, behind `begins`: what data and
    checkpoints named a tokenizer by before fingerprints were of ids."""
    digest = hashlib.sha256(begins.encode())
    for path in (Path(folder, name) for name in names):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()
