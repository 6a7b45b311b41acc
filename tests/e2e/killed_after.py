"""`python -m tests.e2e.killed_after VERB ...`: minitron, killed as it touches a file for the n-th time.

In the environment: TOUCHES, a file that gets a line for each file of FOLDER that is opened to be written, made, renamed
or removed; KILLED_AT, `PATTERN COUNT SECONDS SIGNAL`: the signal comes SECONDS after the COUNT-th of those whose path
within FOLDER the regular expression PATTERN finds; BLOCK, the segments of a block of the reference.
"""

import os
import re
import signal
import sys
import threading
from typing import Any

from minitron_mcore import cli
from minitron_mcore.alignment import reference

PATH_AT = {"open": 0, "os.rename": 1, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "shutil.rmtree": 0}


def main() -> int:
    defaults: Any = reference.work_out_reference.__kwdefaults__
    defaults["block"] = int(os.environ["BLOCK"])
    pattern, count, seconds, name = os.environ["KILLED_AT"].split()
    folder, log = os.environ["FOLDER"] + "/", os.open(os.environ["TOUCHES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    process, found, seen = os.getpid(), re.compile(pattern), [0]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in PATH_AT or (event == "open" and not _writes(arguments)):
            return
        path = arguments[PATH_AT[event]]
        path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not path.startswith(folder):
            return
        path = path.removeprefix(folder)
        os.write(log, f"{path}\n".encode())
        if found.search(path):
            seen[0] += 1
            if seen[0] == int(count) and not float(seconds):
                os.kill(process, signal.Signals[name])
            elif seen[0] == int(count):
                threading.Timer(float(seconds), os.kill, (process, signal.Signals[name])).start()

    sys.addaudithook(watch)
    return cli.main(sys.argv[1:])


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


if __name__ == "__main__":
    sys.exit(main())
