"""The page of a run: what it says is what the files say, whatever is missing; it is one file, and always the same."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest

from minitron_mcore.cli import main
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.report import resolve
from minitron_mcore.recipe import load_recipe
from minitron_mcore.report.gather.report import gather
from minitron_mcore.report.page.render import render
from minitron_mcore.runtime.world import World
from tests.unit.report.run_folder import (
    ITERATIONS,
    LOSSES,
    STUDENTS,
    plan,
    scores,
    teacher,
    write_bench,
    write_evaluation,
    write_run,
    write_search,
    write_training,
)


class Page(HTMLParser):
    """Its headings, and the cells of its tables by their captions."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.headings, self.tables = text, [], {}  # type: ignore[var-annotated]
        self._open: list[str] = []
        self._caption, self._words = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._words = "" if tag in ("h1", "h2", "caption", "th", "td") else self._words
        if tag == "tr":
            self.tables[self._caption].append([])

    def handle_data(self, data: str) -> None:
        self._words += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h1", "h2"):
            self.headings.append(self._words)
        elif tag == "caption":
            self._caption = self._words
            self.tables[self._caption] = []
        elif tag in ("th", "td"):
            self.tables[self._caption][-1].append(self._words)

    def rows(self, caption: str) -> dict[str, list[str]]:
        """First cell -> the others, of the one table whose caption begins so."""
        (found,) = (rows for name, rows in self.tables.items() if name.startswith(caption))
        return {row[0]: row[1:] for row in found}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "small")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    """As the verb writes it."""
    target = run.parent / "new" / "page.html"
    assert main(["report", str(run), f"report.output={target}"]) == 0
    assert not (run / "report.html").exists()
    return Page(target.read_text())


def test_the_tables_say_what_the_files_say(page: Page) -> None:
    losses = page.rows("Held-out loss")
    assert [*losses] == ["model", *LOSSES]
    assert {label: losses[label][0] for label in LOSSES} == {label: f"{loss:.4f}" for label, loss in LOSSES.items()}
    assert losses["width distilled"][1] == f"+{3.5 - 3.25:.4f}"
    shapes = page.rows("A student is of one shape")
    assert [*shapes] == ["model", "teacher", *STUDENTS]
    assert shapes["teacher"][:5] == ["4", "48", "96", "6", "2"]
    for name in STUDENTS:
        share = plan(name).student.num_parameters / teacher().num_parameters
        assert shapes[name][6].endswith(f"({share:.0%})")
    trainings = page.rows("The trainings")
    assert trainings["width distilled"][:3] == ["distill", "20", f"{ITERATIONS * 4 * 32:,}"]
    assert trainings["width distilled"][4:6] == [f"{4.0 - 20 / 32:.4f}", "3.5000"]
    assert page.rows("Peak memory")["width distilled"] == ["1.000", "0.750"]
    assert page.rows("Medians")["teacher"] == ["95.0", "1,500", "0.020"]
    assert page.rows("As estimated for 2 GPUs (H100)")["distil width"][1:5] == ["36.0 s", "0.02", "0.06", "0.01"]
    assert page.rows("Versions") == {"package": ["version"], "minitron_mcore": ["0.1.0"], "torch": ["2.9"]}
    assert page.rows("Commands")["2023-11-14 22:13 UTC"] == ["minitron run --config r.yaml", "2", "cpu"]


def test_the_margins_are_those_of_the_scores(page: Page) -> None:
    """Worked out anew from the scores: hidden channels sorted, the gap after those that stay."""
    ordered = numpy.sort(scores().hidden)[::-1]
    kept, dropped = ordered[31], ordered[32]
    row = page.rows("The narrowest cut")["width: hidden channels"]
    assert row == ["32 of 48", "", f"{kept:.5g}", f"{dropped:.5g}", f"{100 * (kept - dropped) / kept:.2g}%"]
    layers = numpy.sort(scores().layers)[::-1]
    assert page.rows("The narrowest cut")["depth: layers"][2:4] == [f"{layers[1]:.5g}", f"{layers[2]:.5g}"]


def test_figures_are_inline_named_and_themed(page: Page) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page.text, re.DOTALL)
    assert len(drawings) == 13
    ids = re.findall(r'\bid="([^"]+)"', page.text)
    assert len(ids) == len({*ids})
    for drawing in drawings:
        root = ET.fromstring(drawing)
        title, described, *_ = root
        assert (
            root.attrib["role"] == "img"
            and root.attrib["aria-labelledby"] == f"{title.get('id')} {described.get('id')}"
        )
        assert title.text and re.search(r"\d", described.text or "")
        assert "#0102" not in drawing and "var(--" in drawing and "font-family" not in drawing
        for place in re.findall(r'(?:href="|url\()#([^")]+)', drawing):
            assert drawing.count(f'id="{place}"') == 1
    # Names of XML, which nothing opens.
    links = {*re.findall(r'https?://[^\s"<]+', page.text)}
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert len(page.text) < 1_000_000


def test_the_heat_maps_tell_which_score_is_largest(page: Page) -> None:
    values = scores().heads
    layer, head = numpy.unravel_index(values.argmax(), values.shape)
    said = f"The largest score is {values.max():.4g}, of query heads {head} in layer {layer}"
    assert said in page.text


def test_the_same_files_give_the_same_page(run: Path, page: Page) -> None:
    """All that the recipe names is done but what the folder lacks."""
    steps = resolve(load_recipe(None, [f"path={run}"]), World()).steps
    assert render(gather(run, steps)) == page.text
    done = page.rows("The steps")
    assert [*done] == ["step", *(title for _, title in steps)] and len(steps) == 15
    assert done["evaluate depth distilled"] == ["done", "–"] and done["evaluate teacher"] == ["done", "2.5 s"]
    assert done["export width"] == ["not yet", "–"]


def test_a_run_that_was_cut_off(run: Path, tmp_path: Path) -> None:
    """The teacher is half trained, a line is torn; nothing is scored yet."""
    folder = tmp_path / "a<b>&c"
    (folder / "done").mkdir(parents=True)
    shutil.copy(run / "recipe.yaml", folder)
    (folder / "done" / "preprocess.json").write_text("[]")
    write_training(folder / "teacher", teacher(), "train", start=4.2, until=8)
    with (folder / "teacher" / "metrics.jsonl").open("a") as stream:
        stream.write('{"iteration": 9, "kind": "tr')
    steps = (("preprocess", "text to tokens"), ("train-teacher", "train the teacher"))
    page = Page(render(gather(folder, steps)))
    assert page.headings[0] == "a<b>&c" and "a<b>&c" not in page.text
    assert "1 of 2 steps are done" in page.text and "teacher has not ended: 8 of 20 iterations" in page.text
    assert page.rows("The steps")["train the teacher"][0] == "not yet"
    assert page.rows("The trainings")["teacher"][1] == "8 of 20"
    assert {"held-out losses", "importance and the depth scan"} <= {*page.rows("Shown here once")}


@pytest.mark.parametrize(
    ("part", "there", "missing"),
    [
        ("students/width", {"How close the cuts were", "Training"}, "The road walked"),
        ("students/depth/pruned", {"Shapes before and after", "How close the cuts were"}, "Training"),
    ],
)
def test_parts_of_a_run(run: Path, part: str, there: set[str], missing: str) -> None:
    headings = Page(render(gather(run / part))).headings
    assert there <= {*headings} and missing not in headings
    assert headings[0] == Path(part).name and headings[-1] == "What is not here"


def test_a_search(tmp_path: Path) -> None:
    page = Page(render(gather(write_search(tmp_path / "search"))))
    assert "4 candidates fit the budgets (total_parameters 10k to any); 3 were tried" in page.text
    rows = page.rows("Candidates, the best first")
    assert rows["l3-h48-f96-q6-g2"] == ["1", "3", "3", "48", "96", "6", "2", "60k", "4.5000", "3.5000", "1,024", "yes"]
    assert rows["l1-h48-f96-q6-g2"][8] == "4.5000" and rows["l1-h48-f96-q6-g2"][9] == "–"
    assert rows["l4-h32-f96-q6-g2"][:2] == ["–", "–"]
    assert page.text.count("<svg") == 2
    name = "l3-h48-f96-q6-g2"
    said = "4.25 at 256 tokens; 3.5 in the last validation, at 1.02k tokens"
    assert f"{name}: {said}." in page.text


def test_tasks_and_speed(tmp_path: Path) -> None:
    folder = write_bench(write_evaluation(tmp_path / "measured"))
    texts = {"teacher": {"text": " return <x>\n  y", "tokens": 4}, "width": {"text": "pass", "tokens": 1}}
    asked: list[dict[str, object]] = [{"prompt": "def f():"}, {"messages": [{"role": "user", "content": "Hello?"}]}]
    prompts = [{**each, "continuations": texts} for each in asked]
    (folder / "generated.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts))
    page = Page(render(gather(folder)))
    tasks = [row for name, rows in page.tables.items() if name.startswith("Scores on tasks") for row in rows]
    head, right, normalised, words = tasks
    difference = "width distilled − teacher"
    assert head[3:] == ["teacher", "teacher, published", "width distilled", "width distilled, published", difference]
    assert right[:6] == ["arc_easy", "acc", "25", "0.8000 ± 0.0200", "0.7500", "0.6000 ± 0.0200"]
    assert right[6:] == ["0.7500", "-0.2000 ± 0.0125"] and normalised[3:] == ["0.5000", "–", "0.5000", "–", "–"]
    assert words[:4] == ["passages", "word_perplexity", "0", "12.5000"]
    (speeds,) = (rows for name, rows in page.tables.items() if name.startswith("Medians on a CPU"))
    sizes = "4 × 128 + 64"
    assert speeds[2] == ["width", "minitron", sizes, "12.50", "40,960", "180.0 ± 2.5", "1.80×", "2.0"]
    assert "Not measured: vllm, width: head_dim 8 is too small." in page.text
    assert "Not measured: minitron, width, 64 × 2,048 + 16: out of memory." in page.text
    assert "width 1.80. teacher: 1.00. paper, depth: 2.70. paper, width: 1.80." in page.text
    assert page.text.count("<svg") == 2
    assert page.rows("After: def f():") == {"model": ["goes on"], "teacher": [" return <x>\n  y"], "width": ["pass"]}
    assert page.rows("After: Hello?")["width"] == ["pass"]


def test_a_recipe_of_another_version(run: Path, tmp_path: Path) -> None:
    """Keys that there are no more are passed over."""
    shutil.copytree(run, tmp_path / "old")
    path = tmp_path / "old" / "recipe.yaml"
    path.write_text(path.read_text() + "gone: {key: 1}\n")
    path.write_text(path.read_text().replace("preprocess:\n", "preprocess:\n  log_interval: 1000\n"))
    found = gather(tmp_path / "old").place.recipe
    assert found is not None and found.run.students.keys() == STUDENTS.keys()


def test_commands_have_the_ranks_that_the_model_needs(run: Path, page: Page, tmp_path: Path) -> None:
    assert page.rows("The same again")["the whole run"] == [f"minitron run --config {run / 'recipe.yaml'}"]
    folder = tmp_path / "sharded"
    shutil.copytree(run, folder)
    (folder / "recipe.yaml").write_text("parallel: {tensor: 2, pipeline: 2, virtual_pipeline: null}\n")
    command = f"torchrun --nproc-per-node 4 -m minitron_mcore run --config {folder / 'recipe.yaml'}"
    assert Page(render(gather(folder))).rows("The same again")["the whole run"] == [command]


def test_damaged_files_are_left_out(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(run, folder)
    for name in ("results.json", "estimate.json", "scores.safetensors", "students/width/pruned/plan.json"):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    (folder / "recipe.yaml").write_text("nothing: here\n")
    (folder / "journal.jsonl").write_text('{"kind": "start", "command": 1}\n[]\nnot json\n{"kind": "step"}\n')
    (folder / "teacher" / "lineage.yaml").write_text("[")
    (folder / "students" / "depth" / "distilled" / "metrics.jsonl").write_text("null\n{}\n")
    headings = Page(render(gather(folder))).headings
    assert "Training" in headings and not {"Cost", "Importance, and what was kept"} & {*headings}


def test_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    write_bench(tmp_path / "far" / "from")
    for name, rule in {
        "empty": "neither a run",
        "far": "neither a run",
        "hf": "Hugging Face",
        "file": "a file",
        "none": "not there",
    }.items():
        with pytest.raises(InputError, match=rule):
            gather(tmp_path / name)
