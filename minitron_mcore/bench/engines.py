"""The engines that `bench` knows, which of them are here, and their processes. Pure."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
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


def lacks(other: Other, python: str | None) -> bool:
    """Whether this Python, or the one at the path `python`, lacks it. Raises OSError where that is no Python."""
    if python is None:
        return any(importlib.util.find_spec(name) is None for name in other.modules)
    command = [python, "-c", _FIND, *other.modules]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if found.returncode:
        raise OSError(f"{python} ended with exit code {found.returncode}")
    return found.stdout.strip() != "[]"


class EngineError(RuntimeError):
    """What an engine said where it could not load a model or run it."""


class Child:
    """An engine with one model, in a process of its own, which runs the file `worker` (worker.py)."""

    def __init__(self, engine: str, python: str | None, threads: int, worker: Path | None = None) -> None:
        self.engine = engine
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        for name in _OF_LAUNCHERS:
            environment.pop(name, None)  # it is alone
        command = [python or sys.executable, str(worker or _WORKER), engine]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, **pipes, text=True, env=environment)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request of worker.py. Raises EngineError."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last_words = (self._log().splitlines() or ["it said nothing"])[-1]
            raise EngineError(f"it ended with exit code {self.process.wait()}: {last_words[:500]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            logged = re.findall(r" E (.*\berror\b.*)", self._log()) or [""]  # llama.cpp's own reason
            raise EngineError(" ".join(f"{answer['error']} {logged[0]}".split())[:500])
        return answer

    def close(self) -> None:
        """End the process, and wait for it."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def _log(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace").strip()


@dataclass
class Theirs:
    """One model in an engine of somebody else. folder: Hugging Face's. gguf: what llama.cpp reads, made by `converter`
    where it is not there. setting: the rest of worker.py's `load`."""

    engine: str
    model: str
    folder: Path
    gguf: Path
    converter: str | None
    python: str | None
    setting: dict[str, Any]
    version: str = ""

    def load(self) -> None:
        """Start the process. Raises EngineError."""
        path = self.folder
        if self.engine == LLAMA_CPP:
            path = self.gguf
            if not path.is_file():
                make_gguf(self.folder, path, self.setting["precision"], str(self.converter))
        self.child = Child(self.engine, self.python, self.setting["threads"])
        try:
            self.version = self.child.ask(do="load", path=str(path), **self.setting)["version"]
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


def make_gguf(folder: Path, target: Path, precision: str, converter: str) -> None:
    """Convert a Hugging Face folder for llama.cpp, by its own script. Raises EngineError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    words = ["--outtype", {"fp32": "f32", "bf16": "bf16"}[precision], "--outfile", str(target), str(folder)]
    done = subprocess.run([sys.executable, converter, *words], capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise EngineError(f"its converter refuses {folder}: {lines[-1][:500]}")
