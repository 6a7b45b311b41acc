"""An engine in a process of its own, which loads one model and generates, timing every step.

    PYTHON worker.py ENGINE        requests on stdin, answers on stdout, each a line of JSON

    {"do": "load", "path": …, "precision": "fp32", "device": "cpu", "threads": 2, "batch": 4, "length": 192}
      → {"version": "5.23.0", "kv_cache": "fp32"}
    {"do": "run", "prompts": [[5, 7, …], …], "new_tokens": 64}
      → {"seconds": [0.02, …], "memory": 1234567}
    {"do": "tokens", "prompts": [[5, 7, …], …], "new_tokens": 64}
      → {"tokens": [[…], …]}

Both make exactly `new_tokens` of each prompt, greedily, past any end mark; the second tells them. seconds: since the
prompts were given, until every sequence had its first, second, … token. memory: bytes of the weights and of what runs
take beside them, at most so far; null where it cannot be told.

Another Python may run this file, one that has the engine and nothing of this project. So it imports nothing of it, and
an engine only once it is asked for.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
import traceback
import urllib.request
from typing import Any, Protocol


class Engine(Protocol):
    """What is made of a `load` request."""

    version: str
    modules: tuple[str, ...]  # that are imported before its memory is counted

    # One that keeps keys and values in another format than the weights' names it: kv_cache.

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Seconds until all sequences had their first, second, … token."""
        ...

    def tokens(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        ...


class Transformers:
    """`generate` with a cache, greedy; eager attention kernels as transformers chooses them."""

    modules = ("torch", "transformers.models.auto.modeling_auto", "transformers.generation")

    def __init__(self, path: str, precision: str, device: str, threads: int, batch: int, length: int) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        torch.set_num_threads(threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        # A folder is data: it can name neither code nor a kernel of the hub's, nor hold weights as pickles.
        how = {"local_files_only": True, "trust_remote_code": False, "attn_implementation": None}
        automatic = transformers.AutoModelForCausalLM
        model: Any = automatic.from_pretrained(path, dtype=dtype, use_safetensors=True, **how)
        model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        self.model = model.to(device).eval()
        self.version = transformers.__version__

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        seconds: list[float] = []
        device = self.model.device

        class Clock(StoppingCriteria):
            """Asked after every token; stops nothing."""

            def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
                return torch.zeros(len(input_ids), dtype=torch.bool, device=device)

        start = time.perf_counter()
        self._made(prompts, new_tokens, stopping_criteria=StoppingCriteriaList([Clock()]))
        return seconds

    def tokens(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        made: list[list[int]] = self._made(prompts, new_tokens)[:, len(prompts[0]) :].tolist()
        return made

    def _made(self, prompts: list[list[int]], new_tokens: int, **others: Any) -> Any:
        import torch

        ids = torch.tensor(prompts, device=self.model.device)
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **others)


class Vllm:
    """Its engine's own steps, in this process."""

    modules = ("vllm",)

    def __init__(self, path: str, precision: str, device: str, threads: int, batch: int, length: int) -> None:
        import vllm

        self.vllm = vllm
        self.llm = vllm.LLM(
            model=path,
            dtype={"fp32": "float32", "bf16": "bfloat16"}[precision],
            max_model_len=length,
            max_num_seqs=batch,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            enforce_eager=device == "cpu",
        )
        self.version = vllm.__version__

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        return self._made(prompts, new_tokens)[1]

    def tokens(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return self._made(prompts, new_tokens)[0]

    def _made(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[float]]:
        sampling = self.vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        engine, start = self.llm.llm_engine, time.perf_counter()
        tokens: dict[str, list[int]] = {}
        when: dict[str, list[float]] = {}
        for number, prompt in enumerate(prompts):
            name = str(number)
            tokens[name], when[name] = [], []
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            made = engine.step()
            now = time.perf_counter() - start
            for output in made:
                found = list(output.outputs[0].token_ids)
                when[output.request_id] += [now] * (len(found) - len(tokens[output.request_id]))
                tokens[output.request_id] = found
        return list(tokens.values()), [max(of_step) for of_step in zip(*when.values(), strict=True)]


class LlamaCpp:
    """Its server's completions, a slot a sequence, through xllamacpp."""

    modules = ("xllamacpp",)
    _settings: Any = {"temperature": 0, "ignore_eos": True, "cache_prompt": False}  # noqa: RUF012  (never changed)

    def __init__(self, path: str, precision: str, device: str, threads: int, batch: int, length: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel = length * batch, batch
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_gpu_layers = 0 if device == "cpu" else 999
        params.fit_params = False
        params.cache_ram_mib = 0  # no cache of prompts
        types, self.kv_cache = xllamacpp.ggml_type, "fp32" if precision == "fp32" else "fp16"
        kind = types.GGML_TYPE_F32 if precision == "fp32" else types.GGML_TYPE_F16  # its own default
        params.cache_type_k = params.cache_type_v = kind
        if precision == "fp32":
            # On a CPU it rounds to fp16: tokens whose logits lie within 1e-4 of each other were others.
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)
        self.version = f"xllamacpp {xllamacpp.__version__}"

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        when: list[list[float]] = [[] for _ in prompts]

        def follow(number: int) -> None:
            def take(chunk: Any) -> None:
                # A token that is only part of a character is told together with the next.
                made = self._checked(chunk)["timings"]["predicted_n"]
                when[number] += [time.perf_counter() - start] * (made - len(when[number]))

            asked = {"max_tokens": new_tokens, **self._settings, "stream": True, "timings_per_token": True}
            self.server.handle_completions({"prompt": prompts[number], **asked}, take)

        threads = [threading.Thread(target=follow, args=(number,)) for number in range(len(prompts))]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [max(of_step) for of_step in zip(*when, strict=True)]

    def tokens(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Of its HTTP server, the only one that tells numbers: of the others some are lost in halves of characters."""
        asked = {"n_predict": new_tokens, **self._settings, "return_tokens": True}
        return [self._post({"prompt": prompt, **asked})["tokens"] for prompt in prompts]

    def _post(self, asked: dict[str, Any]) -> dict[str, Any]:
        body, head = json.dumps(asked).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server.listening_address}/completion", body, head)
        with urllib.request.urlopen(request) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    @staticmethod
    def _checked(answer: dict[str, Any]) -> dict[str, Any]:
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp answered {json.dumps(answer)}")
        return answer


# Its engine in this process; quiet; a gigabyte for the cache on a CPU.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
ENGINES: dict[str, Any] = {"transformers": Transformers, "vllm": Vllm, "llama.cpp": LlamaCpp}


class Memory:
    """Bytes that a model takes, from before it is loaded on: on CUDA of torch's allocator, on a CPU of this process."""

    def __init__(self, on_cuda: bool) -> None:
        self.on_cuda = on_cuda
        self.before = self._now()
        self.of_weights: int | None = None
        self.of_runs = 0

    def loaded(self, least: int = 0) -> None:
        """What has come since the beginning is the model's; `least` bytes, as where it lies in what another one left to
        the process."""
        now = self._now()
        self.of_weights = None if now is None or self.before is None else max(now - self.before, least)

    def run_begins(self) -> None:
        self.start = self._now()
        if self.on_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif self.start is not None:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak counts from here on

    def run_ended(self) -> int | None:
        """Bytes of the model with the run that took most so far; None where they cannot be told."""
        peak = self._now(peak=True)
        if peak is None or self.start is None or self.of_weights is None:
            return None
        self.of_runs = max(self.of_runs, peak - self.start)
        return self.of_weights + self.of_runs

    def _now(self, *, peak: bool = False) -> int | None:
        if self.on_cuda:
            import torch

            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        if not os.access("/proc/self/clear_refs", os.W_OK):
            return None
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def answers(name: str) -> Any:
    """Takes a request, gives its answer."""
    engine: Any = None
    memory: Any = None

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal engine, memory
        do = request.pop("do")
        if do == "load":
            for module in ENGINES[name].modules:
                importlib.import_module(module)
            on_cuda = request["device"] == "cuda"
            memory = Memory(on_cuda) if "torch" in sys.modules or not on_cuda else None
            engine = ENGINES[name](**request)
            if memory:
                memory.loaded()
            return {"version": engine.version, "kv_cache": getattr(engine, "kv_cache", request["precision"])}
        if do == "tokens":
            tokens = engine.tokens(request["prompts"], request["new_tokens"])
            _check([len(made) for made in tokens], request["new_tokens"])
            return {"tokens": tokens}
        if memory:
            memory.run_begins()
        seconds = engine.generate(request["prompts"], request["new_tokens"])
        _check([len(seconds)], request["new_tokens"])
        return {"seconds": seconds, "memory": memory and memory.run_ended()}

    return answer


def _check(made: list[int], asked: int) -> None:
    if {*made} != {asked}:
        raise RuntimeError(f"made {made} tokens instead of {asked}")


def main() -> None:
    """Answer until stdin ends. What engines print goes to stderr."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = answers(sys.argv[1])
    for line in sys.stdin:
        try:
            said = answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), file=stream, flush=True)


if __name__ == "__main__":
    main()
