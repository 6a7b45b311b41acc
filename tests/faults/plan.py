"""Which faults a campaign does, to which stage and when, from a seed; and the table of what became of them. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from minitron_mcore.tables import table
from tests.faults.stages import STAGES, TOKENS, Stage

ALL = -1  # every rank at once, as where a node goes
TRAININGS = ("train", "correct", "distill", "distill-cached", "align", "search", "run")
MOVING = (*TRAININGS, "export", "import", "preprocess", "cache", "prune")  # write much


@dataclass(frozen=True)
class Kind:
    """share: of a whole campaign's faults. ways: of doing it, one of which is drawn; where `victims`, it happens to a
    rank, or to all of them."""

    share: int
    what: str
    ways: tuple[str, ...] = ("",)
    victims: bool = False
    fits: Callable[[Stage], bool] = lambda stage: True


def _named(*names: str) -> Callable[[Stage], bool]:
    return lambda stage: stage.name in names


DAMAGED = ("own", "own", "input")
KINDS = {
    "kill": Kind(48, "kill -9", victims=True),
    "term": Kind(34, "SIGTERM", victims=True),
    "stop": Kind(17, "SIGSTOP, and SIGCONT a while later"),
    "hang": Kind(22, "SIGSTOP for good", fits=lambda stage: stage.ranks > 1),
    "cut": Kind(14, "a file is cut off", DAMAGED, fits=lambda stage: bool(stage.reads or stage.trains)),
    "flip": Kind(14, "a bit of a file turns over", DAMAGED, fits=lambda stage: bool(stage.reads or stage.trains)),
    "remove": Kind(14, "a file is removed", DAMAGED, fits=lambda stage: bool(stage.reads or stage.trains)),
    "full": Kind(12, "the disk is full", ("stop", "continue"), fits=_named(*MOVING)),
    "read-only": Kind(8, "the disk is read-only", ("stop", "continue"), fits=_named(*MOVING)),
    "lost": Kind(6, "the disk is not mounted any more", ("stop",), fits=_named(*MOVING)),
    "clock": Kind(12, "the clock jumps", ("-10 years", "-1 hour", "+1 hour", "+10 years"), victims=True),
    "wandb": Kind(4, "wandb", ("refuses", "is silent", "is killed"), fits=_named("train", "distill")),
    "data": Kind(
        10,
        "a data file changes",
        ("renamed over", "written over", "cut off", "removed"),
        fits=lambda stage: TOKENS in stage.reads and stage.name != "search",
    ),
}
WHOLE = sum(kind.share for kind in KINDS.values())


@dataclass(frozen=True)
class Fault:
    """moment: when, as a share of the time in which the stage is at work undisturbed. victim: a rank, or ALL."""

    number: int
    kind: str
    stage: str
    way: str
    victim: int
    moment: float
    seed: int

    @property
    def in_words(self) -> str:
        kind, stage = KINDS[self.kind], STAGES[self.stage]
        whom = "" if not kind.victims or stage.ranks == 1 else " of all" if self.victim == ALL else f" of {self.victim}"
        way = f" ({self.way})" if self.way else ""
        when = "" if self.kind in ("cut", "flip", "remove") or self.way == "refuses" else f" at {self.moment:.2f}"
        return f"{self.kind}{whom}{way}{when}"


def plan(
    seed: int, count: int, *, kinds: Iterable[str] = (), stages: Iterable[str] = (), but: Sequence[str] = ()
) -> tuple[list[Fault], list[str]]:
    """(the faults, the kinds that are left out, of those named in `but`). `kinds`, `stages`: these alone; none: all."""
    asked = {name: KINDS[name] for name in kinds or KINDS}
    left_out = [name for name in asked if name in but]
    asked = {name: kind for name, kind in asked.items() if name not in left_out}
    wanted = [STAGES[name] for name in stages or STAGES]
    fitting = {name: [stage for stage in wanted if kind.fits(stage)] for name, kind in asked.items()}
    asked = {name: kind for name, kind in asked.items() if fitting[name]}
    draw = random.Random(seed)
    faults: list[Fault] = []
    for name, share in shares({name: kind.share for name, kind in asked.items()}, count).items():
        # Every stage before one comes twice.
        order = [stage for _ in range(-(-share // len(fitting[name]))) for stage in shuffled(fitting[name], draw)]
        ways = [way for _ in range(share) for way in shuffled(asked[name].ways, draw)]
        for stage, way in zip(order[:share], ways, strict=False):
            if way == "input" and not stage.reads:
                way = "own"
            elif way == "own" and not stage.trains:
                way = "input"
            victim = draw.choice([*range(stage.ranks), *([ALL] if asked[name].victims and stage.ranks > 1 else [])])
            # Nobody watches a rank that has done its work.
            moment = draw.uniform(0.05, 0.8 if name == "hang" else 1.0)
            faults.append(Fault(0, name, stage.name, way, victim, moment, draw.randrange(1 << 30)))
    draw.shuffle(faults)
    return [Fault(number, *_fields(fault)[1:]) for number, fault in enumerate(faults, start=1)], left_out


def _fields(fault: Fault) -> tuple:
    return tuple(fault.__dict__.values())


def shares(wanted: dict[str, int], count: int) -> dict[str, int]:
    """`count` in the proportions of `wanted`, by the largest remainders."""
    whole = sum(wanted.values())
    found = {name: count * share // whole for name, share in wanted.items()}
    rest = sorted(wanted, key=lambda name: -(count * wanted[name] % whole))
    for name in rest[: count - sum(found.values())]:
        found[name] += 1
    return found


def shuffled(values: Sequence, draw: random.Random) -> list:
    return draw.sample(list(values), len(values))


@dataclass
class Result:
    """What became of a fault. seconds: from it to the end of the disturbed start; steps: of training that were done
    again; again: how often the command was started once more; taken: a source was taken as it was then, which nobody
    could tell from what it may have been, or its change was told, and the end is another one."""

    fault: Fault
    happened: str = ""
    seconds: float = 0.0
    steps: int = 0
    again: int = 0
    is_missed: bool = False
    problems: list[str] = field(default_factory=list)
    equal: bool = False
    taken: bool = False

    @property
    def end(self) -> str:
        return "missed" if self.is_missed else "; ".join(self.problems) or ("taken" if self.taken else "equal")


def row(result: Result) -> list[str]:
    """Of a line that is printed when the fault is done."""
    fault = result.fault
    steps = str(result.steps) if STAGES[fault.stage].trains else "-"
    return [str(fault.number), fault.stage, fault.in_words, result.happened, f"{result.seconds:.1f}", steps, result.end]


def summary(results: Sequence[Result]) -> str:
    """A row for each kind, and one for all."""
    header = [
        "fault",
        "done",
        "missed",
        "started again",
        "steps lost",
        "most",
        "slowest end (s)",
        "equal",
        "taken",
        "bad",
    ]
    rows = []
    for name in [*KINDS, "all"]:
        found = [each for each in results if name in ("all", each.fault.kind)]
        met = [each for each in found if not each.is_missed]
        if not found:
            continue
        steps = [each.steps for each in met if STAGES[each.fault.stage].trains]
        rows.append(
            [
                name if name == "all" else KINDS[name].what,
                *(str(number) for number in (len(met), len(found) - len(met), sum(each.again > 0 for each in met))),
                *(str(sum(steps)), str(max(steps, default=0)), f"{max((each.seconds for each in met), default=0):.1f}"),
                str(sum(each.equal for each in met)),
                str(sum(each.taken and not each.problems for each in met)),
                str(sum(bool(each.problems) for each in met)),
            ]
        )
    return table(rows, header, left=(0,))
