"""Processes of engines: what they are asked and answer, and how they fail."""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minitron_mcore.bench import engines
from minitron_mcore.bench.engines import OTHERS, Child, EngineError, Other, SizeError, lacks, make_gguf
from minitron_mcore.bench.figures import Case
from minitron_mcore.bench.prompts import prompts_of
from minitron_mcore.bench.worker import Memory, answers

STUB = """
import json, os, subprocess, sys, time
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "hang":
        subprocess.Popen(["sleep", "120"])  # it has the pipe too
        time.sleep(120)
    if asked["do"] == "die":
        print("Segmentation fault", file=sys.stderr, flush=True)
        os._exit(3)
    if asked["do"] == "log":
        print("0.1 E load: error loading model: wrong shape", file=sys.stderr, flush=True)
        print(json.dumps({"error": "RuntimeError: no"}), flush=True)
        continue
    told = {"threads": os.environ["OMP_NUM_THREADS"], "rank": os.environ.get("RANK"), "engine": sys.argv[1], **asked}
    print(json.dumps(told), flush=True)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(engines, "_WORKER", tmp_path / "stub.py")
    monkeypatch.setenv("RANK", "1")
    return Child("vllm", None, 3, limit=120)


def test_a_child_answers_line_by_line(child: Child) -> None:
    assert child.ask(do="load", path="x") == {
        **{"threads": "3", "rank": None, "engine": "vllm"},
        **{"do": "load", "path": "x"},
    }
    assert child.ask(do="run")["do"] == "run"
    child.close()
    assert child.process.returncode == 0


def test_a_child_that_fails_says_why(child: Child) -> None:
    with pytest.raises(SizeError, match=r"^RuntimeError: no load: error loading model: wrong shape$"):
        child.ask(do="log")
    for _ in range(2):  # and again, once it is gone
        with pytest.raises(EngineError, match=r"^it ended with exit code 3: Segmentation fault$") as caught:
            child.ask(do="die")
        assert not isinstance(caught.value, SizeError), "it can be asked for no other size"
    child.close()


def test_a_child_that_hangs_is_ended_with_what_it_started(child: Child) -> None:
    start, child.limit = time.monotonic(), 0.5
    for _ in range(2):  # and again, once it is gone
        with pytest.raises(EngineError, match=r"^it did not answer within bench.time_limit=0.5 seconds, and was"):
            child.ask(do="hang")
    child.close()
    assert child.process.returncode == -9 and time.monotonic() - start < 60


def test_a_child_that_still_works_is_ended_where_nobody_waits_any_more(child: Child) -> None:
    """As after Ctrl-C, which it does not get."""
    child.ask(do="load")
    start = time.monotonic()
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        child.ask(do="hang")
    child.close()
    assert child.process.returncode == -9 and time.monotonic() - start < 25


def test_an_engine_that_does_not_load_leaves_no_process(tmp_path: Path) -> None:
    setting = {"precision": "fp32", "device": "cpu", "threads": 1, "batch": 1, "length": 8}
    seat = engines.Theirs("none", "m", tmp_path, tmp_path / "m.gguf", None, None, setting, 120)
    with pytest.raises(EngineError, match="KeyError: 'none'"):
        seat.load()
    assert seat.child.process.returncode is not None


def test_what_is_installed() -> None:
    assert not lacks(OTHERS["transformers"], None) and not lacks(OTHERS["transformers"], sys.executable)
    nothing = Other(("no_such_module",), "nothing")
    assert lacks(nothing, None) and lacks(nothing, sys.executable)
    with pytest.raises(OSError):
        lacks(nothing, "/bin/false")


def test_nobody_waits_for_a_python_or_a_converter_that_hangs(tmp_path: Path) -> None:
    python, converter = tmp_path / "python", tmp_path / "convert.py"
    python.write_text("#!/bin/sh\nexec sleep 120\n")
    python.chmod(0o755)
    with pytest.raises(OSError, match=r"python did not answer within 0.2 seconds$"):
        lacks(Other(("torch",), "torch"), str(python), limit=0.2)
    converter.write_text("import time; time.sleep(120)")
    target = tmp_path / "m.gguf"
    target.touch()
    with pytest.raises(EngineError, match=r"did not convert .* within bench.time_limit=0.2 seconds$"):
        make_gguf(tmp_path, target, "fp32", str(converter), limit=0.2)
    assert not target.exists(), "half of one would be taken for the whole the next time"


@pytest.mark.parametrize(("precision", "cache"), [("fp32", "fp32"), ("bf16", "fp16")])
def test_llama_cpp_says_what_its_cache_is(precision: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set here and told in one place, whatever its own default is."""
    params: Any = SimpleNamespace(**{name: SimpleNamespace() for name in ("model", "cpuparams", "cpuparams_batch")})
    kinds = SimpleNamespace(GGML_TYPE_F32="fp32", GGML_TYPE_F16="fp16")
    off = SimpleNamespace(LLAMA_FLASH_ATTN_TYPE_DISABLED=0)
    named: dict[str, Any] = {"CommonParams": lambda: params, "Server": lambda given: None}
    named |= {"ggml_type": kinds, "llama_flash_attn_type": off}
    monkeypatch.setitem(sys.modules, "xllamacpp", SimpleNamespace(__version__="1", **named))
    setting = {"precision": precision, "device": "cpu", "threads": 1, "batch": 1, "length": 8}
    assert answers("llama.cpp")({"do": "load", "path": "m.gguf", **setting})["kv_cache"] == cache
    assert params.cache_type_k == params.cache_type_v == cache


def test_prompts_are_those_of_a_seed() -> None:
    case = Case(3, 50, 2)
    prompts = prompts_of(case, 10, 1)
    assert [len(prompt) for prompt in prompts] == [50] * 3 and {*itertools.chain(*prompts)} == {*range(10)}
    assert prompts == prompts_of(case, 10, 1) != prompts_of(case, 10, 2)
    assert prompts == prompts_of(Case(3, 50, 7), 10, 1), "whatever is made of them"


def test_memory_counts_what_stays_and_the_highest_run() -> None:
    """Within a megabyte of 32 that are filled: resident pages of a process are not its own alone."""
    memory = Memory(on_cuda=False)
    if memory.before is None:
        pytest.skip("this system has no /proc/self/clear_refs")
    weights = mmap.mmap(-1, 32 << 20)  # pages of its own, whatever the process has left over
    weights.write(b"1" * len(weights))
    memory.loaded()
    found = []
    for size in (16, 64, 1):
        memory.run_begins()
        with mmap.mmap(-1, size << 20) as filled:
            for _ in range(size):
                filled.write(b"1" * (1 << 20))
        found.append(memory.run_ended())
    weights.close()
    assert found == pytest.approx([48 << 20, 96 << 20, 96 << 20], abs=4 << 20)
