"""The repository itself: metadata, versions, sizes, the files that others rely on."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from minitron_mcore.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path for folder in ("minitron_mcore", "tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_STAGE_LINES = 119


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel holds, unpacked; it is built in a copy so that nothing is left in the tree."""
    copy = tmp_path_factory.mktemp("build")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    for name in ("minitron_mcore", "configs", "launch"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; print(build_meta.build_wheel('out'), build_meta.build_sdist('out'))"
    (copy / "out").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, sdist = done.stdout.split()[-2:]
    unpacked = tmp_path_factory.mktemp("installed")
    code = "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, copy / "out" / wheel, unpacked], check=True)
    with tarfile.open(copy / "out" / sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"configs/quickstart.yaml", "launch/slurm.sbatch", "setup.py", "minitron_mcore/py.typed"} <= {*names}
    return unpacked


@pytest.fixture(scope="module")
def distribution(installed: Path) -> Path:
    (folder,) = installed.glob("*.dist-info")
    return folder


@pytest.fixture(scope="module")
def package(distribution: Path) -> Message:
    return Parser().parsestr((distribution / "METADATA").read_text(encoding="utf-8"))


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]


def test_metadata(package: Message, distribution: Path) -> None:
    import minitron_mcore

    assert package["Name"] == "minitron-mcore"
    assert package["Version"] == minitron_mcore.__version__
    assert SpecifierSet(package["Requires-Python"]) == SpecifierSet(">=3.10,<3.14")
    assert set(package.get_all("Provides-Extra", [])) == {"gpu", "parquet", "eval", "docs", "resiliency", "dev"}
    lines = {
        extra: {line.split(";")[0] for line in package.get_all("Requires-Dist", []) if f'"{extra}"' in line}
        for extra in ("parquet", "docs", "dev")
    }
    assert lines["parquet"] | lines["docs"] < lines["dev"]
    scripts = configparser.ConfigParser()
    scripts.read(distribution / "entry_points.txt")
    assert scripts["console_scripts"]["minitron"] == "minitron_mcore.cli:main"


def files_below(place: Path, name: str) -> set[Path]:
    found = (path.relative_to(place) for path in (place / name).rglob("*") if path.is_file())
    return {path for path in found if "__pycache__" not in path.parts}


def test_a_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    """Its recipes and launch scripts are the repository's; `init` copies from them, and `submit` finds its template."""
    for name in ("configs", "launch"):
        inside, here = (files_below(place, name) for place in (installed / "minitron_mcore", ROOT))
        assert inside == here
    code = (
        "import sys; from minitron_mcore import cli, files; from minitron_mcore.runtime.slurm import read_template; "
        "assert files.shipped('launch').parent.name == 'minitron_mcore'; read_template(None); sys.exit(cli.main())"
    )
    env = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code, "init", "reproduce/losses"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("configs/reproduce/losses.yaml", "configs/reproduce/cpu.yaml", "launch/torchrun.sh"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()


def test_every_requirement_is_bounded_on_both_sides(package: Message) -> None:
    for line in package.get_all("Requires-Dist", []):
        operators = {specifier.operator for specifier in Requirement(line).specifier}
        assert operators == {">=", "<"}, line


def test_installed_and_pinned_versions_are_in_range(package: Message) -> None:
    """What the tests run on is what pyproject.toml allows, and constraints.txt fixes every direct requirement."""
    for line in package.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if 'extra == "gpu"' in line:
            continue
        pinned = [pin for pin in pins() if canonicalize_name(pin.name) == canonicalize_name(requirement.name)]
        assert pinned, f"{requirement.name} is not in constraints.txt: make lock"
        for pin in pinned:
            (version,) = pin.specifier
            assert version.operator == "==" and requirement.specifier.contains(version.version), f"{pin} is not {line}"
        if "extra ==" not in line:
            installed = metadata.version(requirement.name)
            assert requirement.specifier.contains(installed, prereleases=True), f"{installed} is not {line}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    is_stage = path.is_relative_to(ROOT / "minitron_mcore" / "stages")
    assert len(text.splitlines()) <= (MAX_STAGE_LINES if is_stage else MAX_FILE_LINES)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name


def test_every_refusal_keeps_key_value_and_rule_apart() -> None:
    """`InputError("whole sentence")` would leave nothing to assert, to prefix with a section, or to put into words."""
    with pytest.raises(TypeError):
        InputError("train.lr=0 must be above 0")  # type: ignore[call-arg]
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("InputError", "StorageError"):
                is_complete = len(node.args) >= 3 or any(isinstance(each, ast.Starred) for each in node.args)
                assert is_complete or path == Path(__file__), f"{path}:{node.lineno}"


def test_nothing_is_left_unfinished() -> None:
    unfinished = re.compile("TODO|FIXME|XXX|NotImplemented" + "Error")
    package_files = [path for path in SOURCES if path.is_relative_to(ROOT / "minitron_mcore")]
    assert [path for path in package_files if unfinished.search(path.read_text(encoding="utf-8"))] == []


EXPECTED = """
    .ci/run .github/workflows/ci.yml .pre-commit-config.yaml CHANGELOG.md CITATION.cff CONTRIBUTING.md Dockerfile
    LICENSE Makefile README.md SECURITY.md constraints.txt
    configs/quickstart.yaml docs/conf.py docs/index.md docs/log.md
    launch/README.md launch/slurm.sbatch launch/torchrun.sh
"""


@pytest.mark.parametrize("name", EXPECTED.split())
def test_file_exists(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def test_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


SCRIPTS = """
    .ci/run .ci/python.sh .ci/venv.sh .ci/matrix.sh
    launch/torchrun.sh launch/slurm.sbatch launch/docker.sh launch/pipeline.sbatch launch/smoke.sh
"""


@pytest.mark.parametrize("name", SCRIPTS.split())
def test_scripts_can_be_run_and_parsed(name: str) -> None:
    path = ROOT / name
    assert path.stat().st_mode & 0o111 == 0o111, "not executable"
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", path], check=True)


def dry_run(target: str) -> str:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    command = [make, "--no-print-directory", "--dry-run", "VENV=no-such-environment", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_targets_do_their_own_set_up() -> None:
    for target in (
        "demo",
        "docs",
        "docs-links",
        "test",
        "coverage",
        "test-slow",
        "test-matrix",
        "lint",
        "bench",
        "bench-check",
        "venv",
        "lock",
    ):
        assert ".ci/venv.sh" in dry_run(target), target
    assert "launch/torchrun.sh run --config configs/quickstart.yaml" in dry_run("demo")
    test = dry_run("test")
    assert test.index("ruff check") < test.index("mypy") < test.index("-m pytest")
    dry_run("clean")


def test_ci_runs_make_test() -> None:
    assert re.search(r"^exec make .*\btest$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_matrix_knows_what_an_environment_lacks() -> None:
    """This one has everything that pyproject.toml asks for, but perhaps the newer megatron-core."""
    command = [sys.executable, str(ROOT / ".ci" / "lacking.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    newer = metadata.version("megatron-core") in SpecifierSet(">=0.19")
    assert done.stdout.strip() == ("" if newer else "megatron-core>=0.19")


def test_the_two_commands_stand_together_under_install() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Install\n(.*?)^## ", readme, flags=re.MULTILINE | re.DOTALL)
    commands = [
        line.split("#")[0].strip() for line in re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0].splitlines()
    ]
    assert commands == ["make demo", "make test"]


def test_the_hosted_workflow_runs_what_developers_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in workflow["jobs"].items()}
    assert runs["lint"] == ["make PYTHON=python lint"] and runs["test"] == ["make PYTHON=python test"]
    assert runs["matrix"][-1] == ".ci/matrix.sh quick"
    assert runs["docs"] == ["make PYTHON=python docs"]


def test_the_citation_names_this_version_and_both_papers() -> None:
    import minitron_mcore

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == minitron_mcore.__version__ and citation["license"] == "Apache-2.0"
    papers = {reference["url"] for reference in citation["references"]}
    assert papers == {"https://arxiv.org/abs/2407.14679", "https://arxiv.org/abs/2408.11796"}
    assert all(author["family-names"] for reference in citation["references"] for author in reference["authors"])


def test_the_tour_names_files_and_functions_that_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## A tour of the code")[1].split("\n## ")[0]
    found = re.findall(r"`([a-z_]+/[a-z_/]+\.py)(?::\s+(?:[A-Z]\w+\.)?(\w+))?`", text)
    assert len(found) > 15
    for name, function in found:
        source = (ROOT / "minitron_mcore" / name).read_text(encoding="utf-8")
        assert f"def {function}(" in source or not function, f"{name} has no {function}"


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            assert "://" in target or (document.parent / target).exists(), f"{document.name} → {target}"
