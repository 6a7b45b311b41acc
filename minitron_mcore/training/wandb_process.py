"""The process that alone talks to Weights & Biases, so that whatever it waits for, training does not. Pure.

    python -m minitron_mcore.training.wandb_process FD

Reads commands from its standard input, a JSON object a line, and answers on the file descriptor FD in the same form.
`training/dashboard.py` starts it, and ends it where it takes too long.

    begin      init: of wandb.init; config; documents: texts by kind, kept as artifacts; patience: seconds
    take_over  history: a metrics.jsonl whose rows come first; earlier: folders to delete, once they are in this run
    row        iteration; row: numbers
    line       text: for the run's console log
    documents  texts by kind, kept as new versions of the artifacts
    finish     exit_code: 0 shows the run as finished, else as failed

    ready      place: a URL, or the folder; folder   |   refused, failed: why there is no run
    taken      rows that wandb has taken so far
    why        what went wrong with one
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from minitron_mcore.training.metrics_file import logged

# What launchers send to all processes of a job: this one ends when training has told it all.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ENDINGS = {"recipe": ".yaml", "lineage": ".yaml", "plan": ".json"}


def main(answers: int) -> None:
    """Carry out the commands until `finish`, or until the training has gone, which is a failure."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)

    def tell(**answer: Any) -> None:
        with suppress(OSError):  # of a training that has gone
            os.write(answers, json.dumps(answer).encode() + b"\n")

    commands: Iterator[dict[str, Any]] = map(json.loads, sys.stdin.buffer)
    first = next(commands)
    try:
        run = begin(first)
    except Exception as error:
        is_mistake = type(error).__name__ in ("UsageError", "AuthenticationError")
        tell(**{"refused" if is_mistake else "failed": first_words(error)})
        return
    place = Path(run.dir).parent
    tell(ready=run.url if first["init"]["mode"] == "online" else str(place), folder=str(place))
    taken, exit_code = 0, 1
    for command in commands:
        if command["do"] == "finish":
            exit_code = command["exit_code"]
            break
        try:
            act(run, command)
        except Exception as error:
            tell(why=first_words(error))
            continue
        if command["do"] == "row":
            taken += 1
            tell(taken=taken)
    else:
        signal.alarm(int(first["patience"]) + 1)  # nobody is left to end this process
    try:
        run.finish(exit_code=exit_code)
    except Exception as error:
        tell(why=first_words(error))


def begin(command: dict[str, Any]) -> Any:
    """The run, with its configuration and documents. Raises what wandb raises."""
    import wandb

    # wandb's own patience is longer, as rows wait meanwhile.
    settings: dict[str, Any] = {"init_timeout": max(300.0, command["patience"]), "x_stats_pid": os.getppid()}
    known = getattr(wandb.Settings, "model_fields", {})
    chosen = wandb.Settings(**{name: value for name, value in settings.items() if name in known})
    run = wandb.init(**command["init"], config=command["config"], resume="allow", settings=chosen)
    keep(run, command["documents"])
    return run


def act(run: Any, command: dict[str, Any]) -> None:
    """Anything but the first and the last command. Raises what wandb raises."""
    match command["do"]:
        case "row":
            run.log(command["row"], step=command["iteration"])
        case "line":
            print(command["text"], flush=True)  # which wandb keeps
        case "documents":
            keep(run, command["documents"])
        case "take_over":
            rows = list(logged(Path(command["history"])))
            for iteration, moment, row in rows:
                run.log({"_timestamp": moment, **row}, step=iteration)
            for path in command["earlier"] if rows else ():
                shutil.rmtree(path, ignore_errors=True)


def keep(run: Any, documents: dict[str, str]) -> None:
    """Each text as an artifact of its kind; one that is as before makes no new version."""
    import wandb

    for kind, text in documents.items():
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", f"{run.name}-{kind}"), type=kind)
        with artifact.new_file(kind + ENDINGS[kind], mode="w", encoding="utf-8") as stream:
            stream.write(text)
        run.log_artifact(artifact)


def first_words(error: BaseException) -> str:
    """In a line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")


if __name__ == "__main__":
    main(int(sys.argv[1]))
