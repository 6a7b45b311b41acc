"""`minitron VERB --config RECIPE.yaml [key=value …]`: parse, start this rank, run one stage, say what went wrong.

Exit code 0: done. 2: wrong input, one sentence, no traceback; a file that is closed to this user too, whenever it is
met. 1: a failure while running; one sentence where the memory or the disk is full. 75: ranks hang
(runtime/watchdog.py); 201: the same after a save. 130: Ctrl-C; 143: SIGTERM; 138: SIGUSR1; 129: SIGHUP, as of a
terminal that is closed. 141: nobody reads what is printed any more, as behind `| head`. 200: stopped in good order by
SIGTERM, SIGUSR1 or a limit, and not done yet: to be started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import os
import re
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from minitron_mcore import __version__
from minitron_mcore.errors import DivergedError, InputError, MemoryExhaustedError
from minitron_mcore.runtime.interrupt import Ending, exit_code, name_of, say_at_once
from minitron_mcore.runtime.notice import say_failure
from minitron_mcore.runtime.world import read_world
from minitron_mcore.verbs import VERBS, help_of, listed

# Verbs whose one bare word is the key `path`.
BARE = ("inspect", "report", "init")


class Parser(argparse.ArgumentParser):
    """Flags of other projects are answered with our key, a misspelt verb with the nearest."""

    def error(self, message: str) -> NoReturn:
        if flag := re.search(r"unrecognized arguments: (?:.*? )?(-\S+)", message):
            from minitron_mcore.recipe import flag_help

            self.exit(2, f"minitron: {InputError('', flag[1], 'is not a flag', flag_help(flag[1]))}\n")
        if verb := re.search(r"VERB: invalid choice: '(.*?)'", message):
            near = difflib.get_close_matches(verb[1], VERBS, 1)
            remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(VERBS)}"
            self.exit(2, f"minitron: {InputError('', verb[1], 'is not a verb', remedy)}\n")
        super().error(message)


def build_parser() -> Parser:
    parser = Parser(
        prog="minitron",
        description="Prune and distil large language models on sharded Megatron checkpoints.",
        epilog=f"{listed()}\n\nminitron VERB --help shows the verb's keys. Start several ranks with torchrun or srun: "
        "torchrun --nproc-per-node 8 -m minitron_mcore VERB …",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", choices=sorted(VERBS), metavar="VERB", help="what to do, see below")
    parser.add_argument("--config", metavar="RECIPE.yaml", help="the recipe; defaults where left out")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    parser.add_argument("--json", action="store_true", help="inspect: print JSON, not a table (the key json=true)")
    parser.add_argument("--verify", action="store_true", help="inspect: read every tensor too (the key verify=true)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be read, made and needed; the ranks by cluster.gpus=N"
    )
    parser.add_argument("--version", action="version", version=f"minitron_mcore {__version__}")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Exits where help is asked for, which is the verb's own where one is named."""
    verb = next((word for word in arguments if word in VERBS), None)
    if verb and {"-h", "--help"} & {*arguments}:
        try:
            print(help_of(verb), flush=True)
        except BrokenPipeError:
            print_no_more()
        sys.exit(0)
    return build_parser().parse_intermixed_args(arguments)


def keys_of(options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """(overrides, values that are taken as they stand): the flags of `inspect`, and the one bare word of the verbs that
    look at a path.

    Raises InputError where another verb has one of the flags.
    """
    taken: dict[str, Any] = {name: True for name in ("json", "verify") if getattr(options, name)}
    if taken and options.verb != "inspect":
        remedy = "leave it out, or write a key as key=value"
        raise InputError("", f"--{next(iter(taken))}", "is a flag of inspect alone", remedy)
    bare = [word for word in options.overrides if "=" not in word]
    if len(bare) != 1 or options.verb not in BARE:
        return options.overrides, taken
    return [word for word in options.overrides if word != bare[0]], {**taken, "path": bare[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    if "_ARGCOMPLETE" in os.environ:
        from minitron_mcore.shell import complete

        complete(build_parser())
    options = parse(sys.argv[1:] if arguments is None else arguments)
    with Ending() as ending:
        try:
            try:
                return carry_out(options, ending)
            except BaseException:
                ending.settle()
                raise
        except BaseException as error:
            # What a signal broke off may show as any failure, as that of a rank whose peers have gone.
            if not ending.number or isinstance(error, SystemExit):
                raise
        if rank_told() == 0:
            # A training that has saved says more, and is none of them.
            left = "what was finished stays, and the same command goes on from there"
            say_at_once(f"\nminitron {options.verb}: stopped by {name_of(ending.number)}; {left}")
        print_no_more()
        return ending.code


def carry_out(options: argparse.Namespace, ending: Ending) -> int:
    """Run the verb; returns the exit code. What a user has to see of a failure is told here, unless the first signal
    that `ending` met is the reason."""
    recipe: Any = None
    try:
        from minitron_mcore import commands
        from minitron_mcore.recipe import load_recipe, refuse_code

        overrides, taken = keys_of(options)
        recipe = load_recipe(options.config, overrides, **taken)
        refuse_code(recipe, options.config, overrides)
        if options.dry_run:
            shown = commands.foresee(options.verb, recipe)
            if rank_told() == 0:
                print(shown, flush=True)
            return 0
        commands.carry_out(options.verb, recipe)
        commands.leave()
    except (InputError, OSError) as error:
        if ending.number:
            raise
        if isinstance(error, BrokenPipeError) and nobody_reads():
            print_no_more()
            return exit_code(signal.SIGPIPE)
        told = error if isinstance(error, InputError) else explained(error, recipe)
        if told is None:
            raise
        if rank_told() > 0:
            # The launcher ends every rank once one has ended. The first rank is to say it, and says it at once; a rank
            # that is still here after this was alone in finding the fault.
            time.sleep(8)
        say_failure(f"minitron {options.verb}: {told}")
        return told.exit_code
    except (DivergedError, MemoryExhaustedError) as error:
        if ending.number:
            raise
        say_failure(f"minitron {options.verb}: {error}")
        return 1
    return 0


def rank_told() -> int:
    """This process's rank as the launcher says, 0 where it says none that could be."""
    try:
        return read_world(os.environ).rank
    except InputError:
        return 0


def print_no_more() -> None:
    """What is left to print where nobody reads would fail once more when Python leaves."""
    if nobody_reads():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explained(error: OSError, recipe: Any) -> InputError | None:
    """What is said of a system's error that nobody below has put into words: of a closed file, or of a disk that is
    full or read-only, else None. `recipe` names the key where one of its paths leads there; None: it is not read."""
    from minitron_mcore.files import FULL, not_read, not_written
    from minitron_mcore.keys import flat

    path = str(error.filename or "")
    texts = flat(dataclasses.asdict(recipe)) if recipe else {}
    called = next((f"{key}={value}" for key, value in texts.items() if is_below(path, value)), path)
    if error.errno in FULL or error.errno == errno.EROFS:
        return not_written(called or "a file", error, "; make room, and run the command again")
    return not_read(called, error) if isinstance(error, PermissionError) else None


def is_below(path: str, value: Any) -> bool:
    """Whether `path` is, or lies below, what the recipe's `value` names."""
    folder = value.removeprefix("cache:").rstrip("/") if isinstance(value, str) else ""
    return bool(folder) and (path == folder or path.startswith(folder + "/"))


def nobody_reads() -> bool:
    """Whether the other end of the pipe that is printed to is closed."""
    try:
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & select.POLLERR for _, event in pipe.poll(0))


if __name__ == "__main__":
    sys.exit(main())
