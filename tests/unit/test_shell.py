"""Completion: what a shell is answered, by the console script itself, as bash asks."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace

import pytest

from minitron_mcore.shell import words
from minitron_mcore.verbs import VERBS, keys_of


def answered(line: str) -> list[str]:
    code = "import os, sys; from minitron_mcore.cli import main; sys.argv = ['minitron']; main()"
    env = {**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    env |= {"_ARGCOMPLETE_IFS": "\v", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    shell = ["bash", "-c", '"$@" 8>&1 9>/dev/null >/dev/null', "-", sys.executable, "-c", code]
    done = subprocess.run(shell, env=env, capture_output=True, text=True)
    return [word.strip() for word in done.stdout.split("\v") if word.strip()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("minitron dis", ["distill"]),
        ("minitron distill --config recipe.yaml distill.logit_loss=f", ["distill.logit_loss=forward_kl"]),
        ("minitron --dry-run train train.async_save=", ["train.async_save=true", "train.async_save=false"]),
        ("minitron init quick", ["quickstart"]),
    ],
)
def test_the_shell_is_answered(line: str, expected: list[str]) -> None:
    assert answered(line) == expected


@pytest.mark.parametrize("verb", VERBS)
def test_every_key_of_a_verb_is_offered(verb: str) -> None:
    offered = words("", Namespace(verb=verb))
    assert {f"{path}=" for path, _ in keys_of(verb)} <= {*offered}
    assert words("no.such", Namespace(verb=verb)) == []
