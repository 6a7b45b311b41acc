"""Recipes and folders of strangers: what a recipe may not ask for, and what no module of this project does."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from minitron_mcore import cli
from minitron_mcore.errors import InputError
from minitron_mcore.reading import MOST_NODES, load_text
from minitron_mcore.recipe import load_recipe, refuse_code
from tests.e2e.launchers import FAKE_SCONTROL, ROOT, environment, write_tool

PACKAGE = ROOT / "minitron_mcore"
BEHIND = "write it, or trust=true, behind the command"


def refusal(config: Path, *overrides: str) -> str:
    recipe = load_recipe(str(config), [*overrides])
    try:
        refuse_code(recipe, str(config), [*overrides])
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("trust: true", "trust=true"),
        ("json: true\ntrust: ${json}", "trust=true"),
        ("evaluate: {tasks: [x], task_folder: tasks}", "evaluate.task_folder=tasks"),
        ("bench: {converter: convert.py}", "bench.converter=convert.py"),
        ("bench: {python: {vllm: python}}", "bench.python.vllm=python"),
        ("trust: false\nbench: {python: {}, converter: null}", ""),
    ],
)
def test_a_file_has_no_code_run(text: str, refused: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(text + "\n")
    said = refusal(config)
    assert said.startswith(f"{refused} may have a stranger's code run") and BEHIND in said if refused else not said
    assert not refusal(config, "trust=true"), "the command says it"
    if refused:
        assert not refusal(config, refused), "the command says this"
        assert cli.main(["estimate", "--config", str(config), "--dry-run"]) == 2
        assert capsys.readouterr().err == f"minitron estimate: {said}\n"


def test_one_of_several_is_not_all_of_them(tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text("bench: {python: {vllm: a, llama_cpp: b}}\n")
    assert refusal(config, "bench.python.vllm=c").startswith("bench.python.llama_cpp=b may have")
    assert refusal(config, "bench={python: {llama_cpp: c}}").startswith("bench.python.vllm=a may have")
    assert refusal(config, "trust=false").startswith("bench.python.vllm=a may have")


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "https_proxy"])
def test_a_path_names_no_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "hunter2")
    for text in (f"output=runs/${name}", f"output=runs/${{{name}}}", f"data.train=[0.5, $HOME/a, 0.5, ${name}]"):
        with pytest.raises(InputError, match=f"names {name}, which may be a secret") as caught:
            load_recipe(None, [text])
        assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("TOKENIZERS", "t")
    assert load_recipe(None, ["output=$TOKENIZERS/$HOME"]).output


def test_aliases_cannot_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 40)]
    with pytest.raises(ValueError, match=f"aliases stand for more than {MOST_NODES:,} values"):
        load_text("\n".join(lines))


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [touch x]", "!!python/name:os.system", "!evil x"])
def test_yaml_makes_no_objects(tag: str) -> None:
    with pytest.raises(ValueError, match="could not determine a constructor for the tag"):
        load_text(f"name: {tag}\n")


def test_a_sentence_is_one_line_without_a_terminals_commands() -> None:
    said = str(InputError("hf", "a\nb\x1b[2J\u202e", "is\tné"))
    assert said == r"hf=a\nb\x1b[2J\u202e is\tné"


def calls() -> Iterator[tuple[str, str, dict[str | None, str], ast.Call]]:
    """(module, function's dotted name, its keywords, the call) of what this test is about, in the package."""
    last = {name.rpartition(".")[2] for name in NEVER} | {"loads", "load", "from_pretrained"}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in last or {"shell", "allow_pickle"} & {each.arg for each in node.keywords}:
                words = {each.arg: ast.unparse(each.value) for each in node.keywords}
                yield str(path.relative_to(PACKAGE)), ast.unparse(node.func), words, node


NEVER = {"eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput", "pickle.load", "yaml.unsafe_load"}
NEVER |= {"subprocess.getstatusoutput", "os.execl", "os.execlp", "yaml.full_load", "runpy.run_path", "marshal.loads"}
# Between processes of a job, over the store that made its process group.
OWN_PICKLES = {"runtime/subsets.py"}


def test_no_module_runs_what_it_reads() -> None:
    found = set()
    for module, name, words, call in calls():
        assert name not in NEVER, (module, name)
        assert words.get("shell", "False") == "False" and "allow_pickle" not in words, (module, name)
        if name == "pickle.loads":
            assert module in OWN_PICKLES
        elif name == "torch.load":
            assert words.get("weights_only") == "True" or module == "checkpoint/unpickle.py", module
        elif name == "yaml.load":
            assert [ast.unparse(each) for each in call.args[1:]] == ["_LOADER"], module
        elif name.endswith(".from_pretrained"):
            assert words[None] in ("AS_DATA", "MODEL_AS_DATA") or module == "bench/worker.py", module
        found.add(name.rpartition(".")[2])
    assert {"loads", "load", "from_pretrained"} <= found, "they are seen"


HOSTILE = ["$(touch x)", "`touch x`", "; touch x", "a\nb; touch x", "' touch x", '" && touch x', "${IFS}", "*"]


def test_launchers_hand_words_on_as_they_are(tmp_path: Path) -> None:
    """No shell reads them again."""
    write_tool(tmp_path, "python", '#!/usr/bin/env bash\nprintf "%s\\0" "$@" > "$FAKE_SLURM/python.arguments"\n')
    write_tool(tmp_path, "srun", '#!/usr/bin/env bash\nprintf "%s\\0" "$@" > "$FAKE_SLURM/srun.arguments"\n')
    write_tool(tmp_path, "scontrol", FAKE_SCONTROL)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]", "FAKE_SLURM": str(tmp_path)}
    images = {"CONTAINER_IMAGE": "; touch x", "CONTAINER_MOUNTS": "$(touch x):/a", "MINITRON_MODULE": "m; touch x"}
    env = environment(**job, **images)
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    (tmp_path / "empty").mkdir()
    for script, written in (("torchrun.sh", "python.arguments"), ("slurm.sbatch", "srun.arguments")):
        words = ["bash", str(ROOT / "launch" / script), "train", *HOSTILE]
        subprocess.run(words, cwd=tmp_path / "empty", env=env, check=True)
        given = (tmp_path / written).read_bytes().decode().split("\0")[:-1]
        assert given[-len(HOSTILE) :] == HOSTILE and "m; touch x" in given
    assert not list((tmp_path / "empty").iterdir())
