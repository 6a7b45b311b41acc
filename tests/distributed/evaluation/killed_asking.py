"""`python -m tests.distributed.evaluation.killed_asking N evaluate ...`: minitron, killed in the N-th request of the
harness's first rank to all ranks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def break_off() -> None:
    raise KeyError("broken off")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def counting(breaks_at: int = 0, end: Callable[[], None] = break_off) -> Iterator[list[int]]:
    """Within the `with`, how many rows or prompts each request has; `end` in the request of that number, from 1."""
    from minitron_mcore.evaluation.harness.requests import Server

    answer: Any = Server.__call__
    asked: list[int] = []

    def counted(server: Any, request: Any) -> Any:
        asked.append(len(getattr(request, "rows", None) or request.prompts))
        if len(asked) == breaks_at:
            end()
        return answer(server, request)

    setattr(Server, "__call__", counted)  # noqa: B010
    try:
        yield asked
    finally:
        setattr(Server, "__call__", answer)  # noqa: B010


def main() -> int:
    from minitron_mcore import cli

    with counting(int(sys.argv[1]), kill):
        return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
