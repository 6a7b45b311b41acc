"""The engines that `bench` knows, which of them are here, and their processes. Pure."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.bench.figures import Run

OURS = "minitron"


@dataclass(frozen=True)
class Other:
    """An engine that somebody else makes. modules: what must be importable for it. install: for pip."""

    modules: tuple[str, ...]
    install: str


LLAMA_CPP = "llama.cpp"
OTHERS = {
    "transformers": Other(("transformers", "torch"), "transformers"),
    "vllm": Other(("vllm",), "vllm"),
    LLAMA_CPP: Other(("xllamacpp",), "xllamacpp"),
}
_WORKER = Path(__file__).with_name("worker.py")
_FIND = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n) is None])"
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def key_of(engine: str) -> str:
    """An engine's name in a key of the recipe, where a dot would divide it."""
    return engine.replace(".", "_")


def lacks(other: Other, python: str | None, limit: float = 60) -> bool:
    """Whether this Python, or the one at the path `python`, lacks it. limit: seconds that this one may take. Raises
    OSError where that is no Python."""
    if python is None:
        return any(importlib.util.find_spec(name) is None for name in other.modules)
    command = [python, "-c", _FIND, *other.modules]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise OSError(f"{python} did not answer within {limit:g} seconds") from None
    if found.returncode:
        raise OSError(f"{python} ended with exit code {found.returncode}")
    return found.stdout.strip() != "[]"


class EngineError(RuntimeError):
    """What an engine said where it could not load a model or run it."""


class SizeError(EngineError):
    """The same of one size, after which it may be asked for others."""


class Child:
    """An engine with one model, in a process of its own, which runs the file `worker` (worker.py). limit: seconds that
    an answer may take."""

    def __init__(
        self, engine: str, python: str | None, threads: int, worker: Path | None = None, *, limit: float
    ) -> None:
        self.engine, self.limit = engine, limit
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        for name in _OF_LAUNCHERS:
            environment.pop(name, None)  # it is alone
        command = [python or sys.executable, str(worker or _WORKER), engine]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        # In a session of its own, so that what it has started itself is ended with it.
        self.process = subprocess.Popen(command, **pipes, text=True, env=environment, start_new_session=True)
        self.is_late = self.is_asked = False

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request of worker.py. Raises SizeError for an error that it tells, and EngineError where it
        is gone: by itself, or ended for taking longer than its limit."""
        assert self.process.stdin and self.process.stdout
        clock = threading.Timer(self.limit, self._end_late)
        clock.daemon = True
        clock.start()
        self.is_asked = True
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            clock.cancel()
        self.is_asked = False
        if self.is_late:
            raise EngineError(f"it did not answer within bench.time_limit={self.limit:g} seconds, and was ended")
        if not line:
            last_words = (self._log().splitlines() or ["it said nothing"])[-1]
            raise EngineError(f"it ended with exit code {self.process.wait()}: {last_words[:500]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            logged = re.findall(r" E (.*\berror\b.*)", self._log()) or [""]  # llama.cpp's own reason
            raise SizeError(" ".join(f"{answer['error']} {logged[0]}".split())[:500])
        return answer

    def close(self) -> None:
        """End the process, and wait for it: at once, where it still works on what nobody waits for any more."""
        assert self.process.stdin and self.process.stdout
        if self.is_asked:
            self._kill()
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def _end_late(self) -> None:
        self.is_late = True
        self._kill()

    def _kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def _log(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace").strip()


@dataclass
class Theirs:
    """One model in an engine of somebody else. folder: Hugging Face's; None where it reads a GGUF file that is there.
    gguf: what llama.cpp reads, made by `converter` where it is not there. setting: the rest of worker.py's `load`.
    limit: seconds that it may take for each answer. kv_cache: the number format of its cache, where it says so."""

    engine: str
    model: str
    folder: Path | None
    gguf: Path
    converter: str | None
    python: str | None
    setting: dict[str, Any]
    limit: float
    version: str = ""
    kv_cache: str = ""

    def load(self) -> None:
        """Start the process. Raises EngineError."""
        path = self.gguf if self.engine == LLAMA_CPP else self.folder
        if self.engine == LLAMA_CPP and not self.gguf.is_file():
            assert self.folder is not None
            make_gguf(self.folder, self.gguf, self.setting["precision"], str(self.converter), self.limit)
        self.child = Child(self.engine, self.python, self.setting["threads"], limit=self.limit)
        try:
            said = self.child.ask(do="load", path=str(path), **self.setting)
            self.version, self.kv_cache = said["version"], said["kv_cache"]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.child.close()

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        """Make exactly `new_tokens` of each prompt. Raises EngineError."""
        answer = self.child.ask(do="run", prompts=prompts, new_tokens=new_tokens)
        return Run(answer["seconds"], answer["memory"])

    def tokens(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """What they are. Raises EngineError."""
        found: list[list[int]] = self.child.ask(do="tokens", prompts=prompts, new_tokens=new_tokens)["tokens"]
        return found


def make_gguf(folder: Path, target: Path, precision: str, converter: str, limit: float) -> None:
    """Convert a Hugging Face folder for llama.cpp, by its own script, within `limit` seconds. Raises EngineError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    words = ["--outtype", {"fp32": "f32", "bf16": "bf16"}[precision], "--outfile", str(target), str(folder)]
    how: Any = {"capture_output": True, "text": True, "check": False, "timeout": limit}
    try:
        done = subprocess.run([sys.executable, converter, *words], **how)
    except subprocess.TimeoutExpired:
        target.unlink(missing_ok=True)  # half of one
        rule = f"did not convert {folder} within bench.time_limit={limit:g} seconds"
        raise EngineError(f"its converter {rule}") from None
    if done.returncode or not target.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise EngineError(f"its converter refuses {folder}: {lines[-1][:500]}")
