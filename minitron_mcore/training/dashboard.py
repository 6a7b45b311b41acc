"""A run of Weights & Biases, which never stops a training and never slows it down. Pure.

Another process talks to it (wandb_process.py). What it is to know waits in a queue of at most MOST entries; what finds
that full is left out and counted. The training waits for it twice, `log.wandb_timeout` seconds at most: for an answer
at the start, and for the last rows at the end, after which the process is ended. metrics.jsonl has every row.
"""

from __future__ import annotations

import inspect
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from minitron_mcore.errors import InputError
from minitron_mcore.tables import counted
from minitron_mcore.training.config import LogConfig

MOST = 2000  # entries that wait for a slow process: some 2 KB each
LOG_IN = "log in with `wandb login`, or set log.wandb=offline"
REASONS = ("failed", "refused", "why")
ROOT = Path(__file__).parents[2]


def check_wandb(log: LogConfig, rank: int) -> None:
    """Raise InputError where uploading is asked for without an API key; it is looked up on the first rank alone."""
    if log.wandb == "online" and rank == 0 and not is_logged_in():
        raise InputError("log.wandb", "online", "needs an API key", LOG_IN)


def is_logged_in() -> bool:
    """Whether there is a key; whether the server takes it is not asked."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if "prompt" in inspect.signature(wandb.login).parameters:
        return wandb.login(prompt=False, verify=False)
    return bool(wandb.api.api_key)  # older versions; newer ones warn at every use


class Dashboard:
    """A run of Weights & Biases in `folder`/wandb; its id lies in `folder`/wandb_run_id. One process makes it.

    One run a folder, resumed under its id when the training is, in the group `log.wandb_group`, of job type `stage`.
    Offline, too, there is one folder below `wandb/`, whatever was killed: a resumed run copies its earlier rows from
    metrics.jsonl, which was cut back to where it goes on, into the new folder and deletes the old one. Online, repeated
    iterations keep their first numbers, as Weights & Biases accepts each step once.
    """

    def __init__(
        self,
        folder: Path,
        log: LogConfig,
        name: str,
        recipe: dict[str, Any],
        *,
        stage: str = "train",
        documents: dict[str, str] | None = None,
        goes_on: bool = False,
    ) -> None:
        """documents: texts by kind (wandb_process.py: ENDINGS), kept as artifacts. goes_on: an earlier process of this
        training logged to it. Raises InputError where Weights & Biases refuses the settings of a new one."""
        self.folder, self.timeout = folder, log.wandb_timeout
        self.rows = self.taken = 0
        id_file = folder / "wandb_run_id"
        said = id_file.read_text(encoding="utf-8", errors="replace") if id_file.is_file() else ""
        # It becomes part of the names of folders, which are deleted once their rows are in a new one.
        self.id = said if re.fullmatch(r"[\w-]{1,128}", said, re.ASCII) else uuid.uuid4().hex[:8]
        self.mode = log.wandb
        if self.mode == "auto":
            self.mode = "online" if is_logged_in() else "offline"
        self.earlier = sorted((folder / "wandb").glob(f"offline-run-*-{self.id}"))
        init = {"project": log.wandb_project, "name": name, "id": self.id, "mode": self.mode, "dir": str(folder)}
        init |= {"group": log.wandb_group or recipe.get("name") or name, "job_type": stage}
        self._entries: queue.Queue[dict[str, Any]] = queue.Queue(MOST)
        self._answers: list[dict[str, Any]] = []
        self._answered = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        # Plain data, as JSON has them.
        begin = {"do": "begin", "init": init, "config": recipe, "documents": documents or {}, "patience": self.timeout}
        self._start(json.loads(json.dumps(begin, default=str)))
        is_there = self._answered.wait(self.timeout)
        answer = dict(self._answers[0]) if self._answers else {}
        if (refused := answer.get("refused")) and not goes_on:
            self._end()
            raise InputError("log.wandb", self.mode, f"is refused by Weights & Biases ({refused})", LOG_IN)
        if said != self.id:
            id_file.write_text(self.id)
        self._announced = False
        if "ready" in answer:
            self._announce()
        elif is_there:
            self._warn(f"{answer.get('refused') or answer.get('failed') or 'its process ended'}: going on without it")
            self._end()
        else:
            self._warn(f"no answer within {self.timeout:g} s: training goes on, and what it logs waits for one")

    def take_over(self, history: Path) -> None:
        """Bring what an earlier, killed process logged offline into this run: the rows of `history`, which has been cut
        back. Nothing happens online, or where there are no such rows."""
        if self.mode == "offline" and self.earlier and history.is_file():
            self._put({"do": "take_over", "history": str(history), "earlier": [str(path) for path in self.earlier]})

    def write(self, iteration: int, row: dict[str, float]) -> None:
        self.rows += 1
        self._put({"do": "row", "iteration": iteration, "row": dict(row)})
        self._announce()

    def say(self, text: str) -> None:
        """A line for the run's console log."""
        self._put({"do": "line", "text": text})

    def close(self, *, finished: bool, documents: dict[str, str] | None = None) -> None:
        """End the run, as `finished` or as failed, with the last versions of `documents`; say what it did not get."""
        ends_by = time.monotonic() + self.timeout
        if self._process is not None:
            last: list[dict[str, Any]] = [{"do": "documents", "documents": documents}] if documents else []
            for entry in (*last, {"do": "finish", "exit_code": 0 if finished else 1}):
                with suppress(queue.Full):
                    self._entries.put(entry, timeout=max(0.0, ends_by - time.monotonic()))
            try:
                self._process.wait(max(0.0, ends_by - time.monotonic()))
            except subprocess.TimeoutExpired:
                places = [answer["folder"] for answer in self._answers if "folder" in answer]
                rest = f": what it had lies in {places[0]}, for `wandb sync`" if places else ""
                self._warn(f"not done {self.timeout:g} s after the training{rest}")
            self._end()
        if lost := self.rows - self.taken:
            reasons = [text for answer in self._answers for kind, text in answer.items() if kind in REASONS]
            why = reasons[-1] if reasons else "it was too slow"
            self._warn(f"it lacks {counted(lost, 'row')} ({why}), all of which are in {self.folder / 'metrics.jsonl'}")

    def _start(self, begin: dict[str, Any]) -> None:
        ours, theirs = os.pipe()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            **{"WANDB_SILENT": "true", "WANDB_DATA_DIR": str(self.folder / "wandb" / "data")},
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        words = [sys.executable, "-m", "minitron_mcore.training.wandb_process", str(theirs)]
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=variables,
                pass_fds=[theirs],
                start_new_session=True,  # a Ctrl-C is for the training
            )
        except OSError as error:
            os.close(ours)
            self._answers.append({"failed": str(error)})
            self._answered.set()
        else:
            self._entries.put(begin)
            threading.Thread(target=self._hand_over, args=(self._process,), daemon=True).start()
            self._listener = threading.Thread(target=self._listen, args=(ours,), daemon=True)
            self._listener.start()
        finally:
            os.close(theirs)

    def _hand_over(self, process: subprocess.Popen[bytes]) -> None:
        """What waits in the queue, to the process; a thread, which alone waits for it."""
        assert process.stdin is not None
        with suppress(OSError, ValueError):  # once it has gone, what is left stays in the queue
            while (entry := self._entries.get())["do"] != "end":
                process.stdin.write(json.dumps(entry).encode() + b"\n")
                process.stdin.flush()

    def _listen(self, ours: int) -> None:
        with open(ours, "rb") as answers:
            for line in answers:
                answer = json.loads(line)
                if "taken" in answer:
                    self.taken = answer["taken"]
                elif len(self._answers) < MOST:
                    self._answers.append(answer)
                    self._answered.set()
        self._answered.set()  # it has ended

    def _announce(self) -> None:
        """Say where the run is, once it is there."""
        if not self._announced and self._answers and "ready" in self._answers[0]:
            print(f"wandb: {self.mode}, run {self.id} -> {self._answers[0]['ready']}", flush=True)
            self._announced = True

    def _put(self, entry: dict[str, Any]) -> None:
        """Where there is room, and somebody to tell it to."""
        if self._process is not None:
            with suppress(queue.Full):
                self._entries.put_nowait(entry)

    def _end(self) -> None:
        """End the process, and the thread that hands it what waits."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        self._listener.join(5.0)  # the last of its answers
        with suppress(queue.Empty):
            while True:
                self._entries.get_nowait()
        self._entries.put({"do": "end"})

    def _warn(self, words: str) -> None:
        print(f"WARNING: wandb: {words}", flush=True)
