"""How each kind of fault is done: what happens to a stage, and what must become of it."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tests.faults import damage as damaging
from tests.faults.outcome import differences, finished
from tests.faults.plan import Fault, Result
from tests.faults.stages import TOKENS, Stage
from tests.faults.starts import Ending, Script, Start, descendants

if TYPE_CHECKING:
    from tests.faults.campaign import Campaign, Place

WATCH = ("watch.hang_minutes=0.1", "watch.quiet_minutes=0.25")
# Within which ranks of which one hangs must have ended, as the keys above state it; those that have not met yet within
# three times MINITRON_TIMEOUT_MINUTES, since torch connects a second time, and torchrun's half minute.
STATED = 240.0
SHIFTS = {"-10 years": -3.2e8, "-1 hour": -3600.0, "+1 hour": 3600.0, "+10 years": 3.2e8}
ROOM = 1 << 28
D = TypeVar("D", damaging.Disk, damaging.Image)


def killed(campaign: Campaign, fault: Fault, place: Place, result: Result) -> None:
    start = place.start()
    script: Script = [(campaign.seconds(fault), lambda: start.signal(signal.SIGKILL, fault.victim))]
    ending = campaign.disturb(place, start, script, result)
    if not result.is_missed:
        campaign.end(place, result, ending)


def terminated(campaign: Campaign, fault: Fault, place: Place, result: Result) -> None:
    start = place.start()
    script: Script = [(campaign.seconds(fault), lambda: start.signal(signal.SIGTERM, fault.victim))]
    ending = campaign.disturb(place, start, script, result)
    if result.is_missed:
        return
    victims = range(place.stage.ranks) if fault.victim < 0 else [fault.victim]
    result.problems += [f"rank {rank} prints a traceback" for rank in victims if "Traceback" in start.shown(rank)]
    campaign.end(place, result, ending)


def stopped(campaign: Campaign, fault: Fault, place: Place, result: Result) -> None:
    start, begins = place.start(), campaign.seconds(fault)
    lasts = random.Random(fault.seed).uniform(0.3, 2.0)
    script: Script = [
        (begins, lambda: start.signal(signal.SIGSTOP, fault.victim)),
        (begins + lasts, lambda: start.signal(signal.SIGCONT, fault.victim)),
    ]
    ending = campaign.disturb(place, start, script, result)
    if result.is_missed:
        return
    if not ending.ended_well:
        result.problems.append(f"ended with {ending.codes}: {start.told()}")
    campaign.end(place, result, ending)


def hung(campaign: Campaign, fault: Fault, place: Place, result: Result) -> None:
    start = place.start(*WATCH)
    script: Script = [(campaign.seconds(fault), lambda: start.signal(signal.SIGSTOP, fault.victim))]
    ending = campaign.disturb(place, start, script, result, limit=STATED)
    others = [code for rank, code in enumerate(ending.codes) if rank != fault.victim]
    if ending.hung and not any(others) and not campaign.differ(place):
        result.is_missed, result.problems = True, []  # it was about to end: the others leave when all is done
    if result.is_missed:
        return
    campaign.end(place, result, ending, *WATCH)


def damaged(campaign: Campaign, fault: Fault, place: Place, result: Result) -> None:
    draw = random.Random(fault.seed)
    if fault.way == "own":
        start = place.start()
        when = campaign.seconds(replace(fault, moment=max(0.35, fault.moment)))
        start.finish(campaign.limit, [(when, lambda: start.signal(signal.SIGKILL, -1))])
        folder, path = place.folder, damaging.choose(place.folder, ["."], draw)
    else:
        place.inputs = folder = place.root / "inputs"
        damaging.copy_linked(campaign.inputs, folder)
        path = damaging.choose(folder, place.stage.reads, draw)
    if path is None:
        result.is_missed = True
        return
    name = str(path.relative_to(folder))
    before = place.steps
    content = damaging.damage(path, fault.kind, draw)
    start = place.start()
    ending = start.finish(campaign.limit)
    result.seconds, words = ending.since, start.told()
    result.happened = f"{name}: {', '.join(map(str, ending.codes))}"
    if ending.hung:
        result.problems.append(f"hangs: {ending.forced}")
    if ending.ended_well:
        differ = campaign.differ(place)
        is_source = (damaging.TOLD if fault.kind == "remove" else damaging.SOURCES).search(name)
        result.taken = bool(differ and (is_source or differ == [name]))  # the second: it is not read any more
        if not result.taken:
            campaign.compare(place, result, [name] if damaging.LOGS.search(name) else [])
        return
    if ending.codes[0] not in (1, 2) or "Traceback" in start.shown():
        result.problems.append(f"{name}: ended with {ending.codes}: {words}")
    elif not any(str(each) in start.shown() for each in (path, *path.parents) if folder in each.parents):
        result.problems.append(f"{name} is not named: {words}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    campaign.go_on(place, result)
    result.steps -= before if fault.way == "own" and not place.stage.trains else 0


@contextmanager
def on_disk(place: Place, size: int, kind: type[D]) -> Iterator[D]:
    disk = kind(place.root / "disk", size)
    place.folder = place.root / "disk" / "out"
    place.folder.mkdir()
    try:
        yield disk
    finally:
        disk.close()


def sections_that_save(stage: Stage, way: str) -> list[str]:
    sections = ("train", "correct", "distill", "align") if stage.trains else ()
    return [f"{section}.on_save_error={way}" for section in sections]


def filled(campaign: Campaign, fault: Fault, place: Place, result: Result) -> None:
    whole, keys = campaign.whole[fault.stage], sections_that_save(place.stage, fault.way)
    with on_disk(place, int(fault.moment * whole.size), damaging.Disk) as disk:
        start = place.start(*keys)
        ending = campaign.disturb(place, start, [(0.0, lambda: True)], result)
        if ending.ended_well and "cannot be written" not in start.shown():
            result.is_missed = True
            return
        refuse_traceback(ending, start, result)
        disk.grow(ROOM)
        campaign.end(place, result, ending, *keys)


def forbidden(campaign: Campaign, fault: Fault, place: Place, result: Result) -> None:
    keys = sections_that_save(place.stage, fault.way)
    with on_disk(place, ROOM, damaging.Image) as disk:
        start = place.start(*keys)
        ending = campaign.disturb(place, start, [(campaign.seconds(fault), disk.forbid)], result)
        if result.is_missed:
            return
        refuse_traceback(ending, start, result)
        disk.allow()
        campaign.end(place, result, ending, *keys)


def unmounted(campaign: Campaign, fault: Fault, place: Place, result: Result) -> None:
    with on_disk(place, ROOM, damaging.Disk) as disk:
        start = place.start()
        before: dict[str, Any] = {}

        def lose() -> bool:
            before.update(finished(place.folder))
            return disk.lose()

        ending = start.finish(campaign.limit, [(campaign.seconds(fault), lose)])
        # What has nothing there yet cannot tell the disk below from it.
        ending.met[0] = ending.met[0] and bool(before)
        result.is_missed, result.seconds = not ending.met[0], ending.since
        result.happened = ", ".join(map(str, ending.codes))
        if result.is_missed:
            return
        if ending.hung:
            result.problems.append(f"hangs: {ending.forced}")
        refuse_traceback(ending, start, result)
        if below := disk.bring_back():
            result.problems.append(f"wrote below what is not mounted any more: {below[0]}")
        result.problems += campaign.lost(place, before)
        if ending.ended_well and campaign.differ(place):
            result.problems.append("ended well, and has not written all")
        campaign.end(place, result, ending)


def refuse_traceback(ending: Ending, start: Start, result: Result) -> None:
    if not ending.ended_well and "Traceback" in start.shown():
        result.problems.append(f"a traceback: {start.shown().splitlines()[-1]}")


def shifted(campaign: Campaign, fault: Fault, place: Place, result: Result) -> None:
    when = campaign.seconds(fault)
    first = [str(fault.victim), f"{when:.3f}", str(SHIFTS[fault.way])]
    start = place.start(module="tests.faults.shifted", first=first)
    ending = campaign.disturb(place, start, [(when, lambda: True)], result)
    if not ending.ended_well:
        result.problems.append(f"ended with {ending.codes}: {start.told()}")
    campaign.end(place, result, ending)


def without_wandb(campaign: Campaign, fault: Fault, place: Place, result: Result) -> None:
    mode = "offline" if fault.way == "is killed" else "online"
    keys = (f"log.wandb={mode}", "log.wandb_timeout=4")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if fault.way == "is silent":
            silent.listen(64)  # connections are taken, and nobody answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = place.start(*keys, WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40, WANDB_DIR=str(place.root))

        def kill() -> bool:
            others = descendants({each.pid for each in start.processes})
            for pid in others:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return bool(others)

        when = campaign.seconds(fault) if fault.way == "is killed" else 0.0
        act = kill if fault.way == "is killed" else lambda: True
        ending = campaign.disturb(place, start, [(when, act)], result)
        if result.is_missed:
            return
        if not ending.ended_well:
            result.problems.append(f"ended with {ending.codes}: {start.told()}")
        campaign.end(place, result, ending)


def with_other_data(campaign: Campaign, fault: Fault, place: Place, result: Result) -> None:
    draw, place.inputs = random.Random(fault.seed), place.root / "inputs"
    damaging.copy_linked(campaign.inputs, place.inputs)
    path, held = place.inputs / TOKENS / "tokens_text_document.bin", []
    damaging.own_copy(path)
    start = place.start()

    def change() -> bool:
        held.append(damaging.change_data(path, fault.way, draw))
        return True

    ending = campaign.disturb(place, start, [(campaign.seconds(fault), change)], result)
    if result.is_missed:
        return
    changed = path.read_bytes() if path.exists() else b""
    path.write_bytes(held[0])
    if not ending.ended_well:
        result.happened += f": {start.told()}"
        campaign.go_on(place, result)
    elif not campaign.differ(place):
        campaign.compare(place, result)
    elif f"{path.name} was written over" in start.shown():
        result.happened, result.taken = f"{result.happened}, told", True
    else:
        result.taken = _is_of_other_data(campaign, place, path, changed)
        if not result.taken:
            campaign.compare(place, result)


def _is_of_other_data(campaign: Campaign, place: Place, path: Path, changed: bytes) -> bool:
    """Whether the stage, which has ended well, had read only what the file holds now."""
    found, folder, place.folder = place.outcome(), place.folder, place.root / "other"
    path.write_bytes(changed)
    place.folder.mkdir()
    ended_well = place.start().finish(campaign.limit).ended_well
    other, place.folder = place.outcome(), folder
    return ended_well and not differences(found, other)


HOW: dict[str, Callable[[Campaign, Fault, Place, Result], None]] = {
    "kill": killed,
    "term": terminated,
    "stop": stopped,
    "hang": hung,
    "cut": damaged,
    "flip": damaged,
    "remove": damaged,
    "full": filled,
    "read-only": forbidden,
    "lost": unmounted,
    "clock": shifted,
    "wandb": without_wandb,
    "data": with_other_data,
}
