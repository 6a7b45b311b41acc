"""The LM Evaluation Harness's model interface over a model that lies sharded on the ranks.

Importing this module imports the harness, which takes seconds: the first rank alone does. Texts become tokens as the
harness's own `hf` model makes them for the exported folder, so that the same log-likelihoods come out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minitron_mcore.errors import InputError
from minitron_mcore.evaluation.harness.names import KEY
from minitron_mcore.evaluation.harness.requests import Continuations, Likelihoods
from minitron_mcore.runtime.progress import Bar

Bars = Callable[[int, str], AbstractContextManager[Bar]]  # of so many units, of what


class ShardedModel(TemplateLM):
    """Answers the harness by asking every rank."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        ask: Callable[[Likelihoods | Continuations], Any],
        *,
        inputs_at_once: Callable[[int], int],
        tokens_at_once: int,
        end_tokens: Sequence[int],
        bars: Bars,
    ) -> None:
        """tokenizer: transformers', as it is exported. ask: has every rank do a request, and gives the result.
        inputs_at_once: of rows in a micro-batch, how many inputs fill a call of the schedule. tokens_at_once: of a
        micro-batch. end_tokens: those that end a generated text."""
        super().__init__()
        self.tokenizer, self.max_length, self.max_gen_toks = tokenizer, max_length, 256
        self._ask, self._bars = ask, bars
        self._inputs_at_once, self._tokens_at_once = inputs_at_once, tokens_at_once
        self._end_tokens = tuple(end_tokens)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """What a tokenizer adds by itself, it adds, unless the text begins with it already."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        last = not add_generation_prompt
        how = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "continue_final_message": last}
        return str(self.tokenizer.apply_chat_template(chat_history, **how))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        with self._bars(len(requests), "log-likelihoods") as bar:
            return self._answers(requests, bar)

    def _answers(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], bar: Bar | None = None
    ) -> list[tuple[float, bool]]:
        """The longest first, so that rows of a call are of like length, and equal inputs beside each other."""
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda number: (-len(rows[number][0]), rows[number][0]))
        found: dict[int, tuple[float, bool]] = {}
        for numbers, micro_batch_size in self._calls(rows, order):
            answers = self._ask(Likelihoods([rows[number] for number in numbers], micro_batch_size))
            for number, total, greedy in zip(numbers, answers.sums.tolist(), answers.greedy.tolist(), strict=True):
                found[number] = total, greedy
                if (text := requests[number][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", text, found[number])
            if bar is not None:
                bar.reach(len(found))
        return [found[number] for number in range(len(rows))]

    def _row(self, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], int]:
        """What is too long loses its beginning, as in the harness's `hf` model."""
        if not 0 < len(continuation) <= self.max_length:
            rule = f"holds a continuation of {len(continuation)} tokens"
            remedy = f"it must have at least one, and at most max_position_embeddings={self.max_length}"
            raise InputError(KEY, None, rule, remedy)
        tokens = tuple((context + continuation)[-(self.max_length + 1) :])
        return tokens, len(tokens) - len(continuation)

    def _calls(
        self, rows: Sequence[tuple[tuple[int, ...], int]], order: Sequence[int]
    ) -> Iterator[tuple[list[int], int]]:
        """`order` cut for one call of the schedule after another, each with its micro-batch size."""
        start = 0
        while start < len(order):
            micro_batch_size = max(1, self._tokens_at_once // (len(rows[order[start]][0]) - 1))
            most, inputs, end = self._inputs_at_once(micro_batch_size), set(), start
            while end < len(order):
                inputs.add(rows[order[end]][0][:-1])
                if len(inputs) > most:
                    break
                end += 1
            yield list(order[start:end]), micro_batch_size
            start = end

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Documents one call's fill at a time, so that an interrupted evaluation keeps those that are done."""
        found: list[float] = []
        windows: list[tuple[None, list[int], list[int]]] = []
        counts: list[int] = []
        most = self._inputs_at_once(max(1, self._tokens_at_once // self.max_length))
        with self._bars(len(requests), "documents") as bar:
            for number, request in enumerate(requests, 1):
                own = self._windows(request.args[0])
                windows, counts = windows + own, [*counts, len(own)]
                if len(windows) < most and number < len(requests):
                    continue
                answers = iter(self._answers(windows))
                for count in counts:
                    found.append(float(sum(next(answers)[0] for _ in range(count))))
                    self.cache_hook.add_partial("loglikelihood_rolling", requests[len(found) - 1].args, found[-1])
                windows, counts = [], []
                bar.reach(len(found))
        return found

    def _windows(self, text: str) -> list[tuple[None, list[int], list[int]]]:
        tokens, prefix = self.tok_encode(text), self.prefix_token_id
        parts = get_rolling_token_windows(tokens, prefix, max_seq_len=self.max_length, context_len=1)
        return [(None, *window) for window in map(make_disjoint_window, parts)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Requests of equal settings together, the longest prompts first."""
        found: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        with self._bars(len(requests), "continuations") as bar:
            for numbers in alike.values():
                self._generate_alike(requests, numbers, found, bar)
        return [found[number] for number in range(len(requests))]

    def _generate_alike(
        self, requests: Sequence[Instance], numbers: Sequence[int], found: dict[int, str], bar: Bar
    ) -> None:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks))
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(settings.get("until"), eos=end)
        new = int(settings["max_gen_toks"])
        if new >= self.max_length:
            rule = f"asks for {new} new tokens, and the model's max_position_embeddings is {self.max_length}"
            raise InputError(KEY, None, rule, "lower max_gen_toks in the task's generation_kwargs")
        prompts = {n: self.tok_encode(requests[n].args[0])[-(self.max_length - new) :] for n in numbers}
        order = sorted(numbers, key=lambda number: -len(prompts[number]))
        start = 0
        while start < len(order):
            micro_batch_size = max(1, self._tokens_at_once // (len(prompts[order[start]]) + new))
            some = order[start : start + self._inputs_at_once(micro_batch_size)]
            request = Continuations(
                [prompts[number] for number in some],
                micro_batch_size,
                new,
                tuple(text for text in stop if text),
                self._end_tokens,
                temperature=float(settings.get("temperature") or 0.0),
                top_p=float(settings.get("top_p") or 1.0),
            )
            for number, tokens in zip(some, self._ask(request), strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                found[number] = postprocess_generated_text(text, stop, None)
                self.cache_hook.add_partial("generate_until", requests[number].args, found[number])
            start += len(some)
            bar.reach(len(found))
