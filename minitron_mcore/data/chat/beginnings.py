"""The ids of what a text begins with, from those of the whole text. Pure.

A text is cut at added tokens first, before it is normalized; what stands between two of them becomes ids by itself
(`tokenizers`: AddedVocabulary). So of a text that ends somewhere after such a token, the ids up to that token are those
that the longer text has, and only what follows is cut anew.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any


def dividers(hf: Any) -> dict[int, str]:
    """Ids and texts of the added tokens of transformers' tokenizer `hf` that divide every text that they stand in,
    whatever surrounds them; {} where it has none, or cuts up their names."""
    if not hf.is_fast or hf.split_special_tokens:
        return {}
    return {
        number: token.content
        for number, token in hf.added_tokens_decoder.items()
        # Those with flags take white space from their surroundings, or are looked for in what is normalized.
        if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        and token.content.strip() == token.content
    }


class Beginnings:
    """The ids of `text` by `hf`, with no marks of its own, and of what it begins with. divided_by: `dividers(hf)`."""

    def __init__(self, hf: Any, text: str, divided_by: dict[int, str]) -> None:
        self.hf, self.text = hf, text
        found = hf(text, add_special_tokens=False, return_offsets_mapping=bool(divided_by))
        self.ids: list[int] = list(found["input_ids"])
        # Of each divider, in order: its place among the ids, the characters where it begins and ends.
        self._places, self._starts, self._ends = [], [], []
        for place, number in enumerate(self.ids):
            if (content := divided_by.get(number)) is None:
                continue
            start, end = found["offset_mapping"][place]
            if text[start:end] == content:  # else the model has made it of other characters
                self._places.append(place)
                self._starts.append(start)
                self._ends.append(end)

    def count(self, text: str) -> int | None:
        """How many ids `text` has, if they are what those of the whole text begin with; else None."""
        last = bisect_right(self._ends, len(text)) - 1
        if last < 0 or not self.text.startswith(text):
            return self._matched(0, text)
        return self._matched(self._places[last], text[self._starts[last] :])

    def _matched(self, place: int, text: str) -> int | None:
        """Where the ids of `text` end, if they stand at `place`."""
        ids = list(self.hf(text, add_special_tokens=False)["input_ids"])
        end = place + len(ids)
        return end if self.ids[place:end] == ids else None
