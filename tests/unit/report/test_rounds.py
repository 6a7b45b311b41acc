"""The rounds of an alignment on a report's page and on the terminal: what the files say, in the order of the rounds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from minitron_mcore.cli import main
from minitron_mcore.report.gather.report import gather
from minitron_mcore.report.page.render import render
from tests.unit.report.run_folder import BATCH, LENGTH, ROUNDS, SAMPLES, write_rounds
from tests.unit.report.test_page import Page

TABLES = ("The rounds of alignment", "What each round learnt from", "Held-out samples")


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rounds(tmp_path_factory.mktemp("rounds") / "aligned")


@pytest.fixture(scope="module")
def page(rounds: Path) -> Page:
    return Page(render(gather(rounds)))


def cells(page: Page, caption: str) -> list[list[str]]:
    (found,) = (rows for name, rows in page.tables.items() if name.startswith(caption))
    return found[1:]


def test_the_rounds_stand_in_their_order(page: Page) -> None:
    """Not in that of their names; each with where it starts, its loss, its budget, and how far it is."""
    assert "rounds of alignment" in page.text and page.headings[0] == "aligned"
    rows = cells(page, TABLES[0])
    assert [row[:3] for row in rows] == [
        ["sft", "/models/distilled", "sft"],
        ["rpo-1", "sft", "rpo_bwd_kl"],
        ["again", "rpo-1", "dpo"],
    ]
    assert rows[0][3] == "mean tokens, lr 1e-05, packing no"
    assert rows[1][3] == "beta 0.1, eta 2, log_probs sum, reference resident, lr 1e-05, packing no"
    assert "label_smoothing 0.1, reference precomputed" in rows[2][3]
    assert [row[4] for row in rows] == ["2 epochs", "1.5 epochs", f"{20 * LENGTH * BATCH:,} tokens"]
    # 20 samples twice, 20 preferences one and a half times, in batches of 4; of a preference each side has a row.
    assert [row[5] for row in rows] == ["10", "5 of 8", "5 of 10"]
    assert [row[6] for row in rows] == [f"{10 * BATCH * LENGTH:,}", *[f"{5 * BATCH * 2 * LENGTH:,}"] * 2]
    assert "again has not ended: 5 of 10 iterations" in page.text


def test_what_each_learnt_from(page: Page) -> None:
    """By the digest that the training was saved with: other samples lie beside them."""
    rows = cells(page, TABLES[1])
    assert [row[0] for row in rows] == [title for name in ROUNDS for title in (name, f"{name}, held out")]
    kinds = ["chats", "preferences", "preferences"]
    for name, kind, train, valid in zip(ROUNDS, kinds, rows[::2], rows[1::2], strict=True):
        tokens = 8 * SAMPLES * (1 if kind == "chats" else 2)
        assert train[1:] == [kind, "21", "20", "2", "1", "0", f"{tokens:,}", "25.0%", f"{name}.jsonl"]
        assert valid[2:4] == ["3", "3"] and valid[-1] == ""


def test_the_first_and_last_held_out_values(page: Page) -> None:
    rows = cells(page, TABLES[2])
    named = {(row[0], row[1]): row[2:] for row in rows}
    assert len(named) == len(rows)
    assert named["sft", "loss"] == ["1.9375", "1.3750", "-0.5625"] and ("sft", "lm loss") not in named
    assert named["rpo-1", "rewards/margins"] == ["0.1250", "0.6250", "+0.5000"]
    assert named["again", "rewards/accuracies"] == ["0.1000", "0.5000", "+0.4000"]
    assert [name for label, name in named if label == "rpo-1"][:3] == ["loss", "rewards/accuracies", "rewards/margins"]


def test_the_curves(page: Page) -> None:
    """Of both sides in one figure; values of any sign; the held-out ones as dots."""
    said = f"from -0.875 at {BATCH * 2 * LENGTH} to -0.375 at 1.28k tokens; -0.375 in the last validation"
    assert f"rpo-1 chosen: {said}" in page.text
    for title in ("Loss", "Rewards of both answers", "Margins of the rewards", "Log-probabilities of both answers"):
        assert f">{title}, of each round over its own tokens; dots are validations on held-out samples" in page.text
    assert page.text.count("rpo-1 rejected: from") == 3 and "sft answers: from 12" in page.text
    # The loss is drawn here, and not once more among the trainings.
    assert "Next-token loss" not in page.text and "Gradient norm of each training" in page.text
    assert page.rows("The trainings")["sft"][4:6] == ["1.3750", "1.3750"]


def test_the_terminal_shows_the_same_tables(rounds: Path, page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(rounds), f"report.output={rounds.parent / 'r.html'}"]) == 0
    shown = capsys.readouterr().out
    for caption in TABLES:
        for row in cells(page, caption):
            assert "".join(row).replace(" ", "") in shown.replace(" ", "")
    assert (rounds.parent / "r.html").read_text() == page.text


def test_one_round_and_rounds_within_another_folder(rounds: Path, tmp_path: Path) -> None:
    """Moved, so that no path in a lineage is there any more; without a line on its samples; with them left out."""
    place = tmp_path / "moved"
    shutil.copytree(rounds, place / "aligned")
    alone = Page(render(gather(place / "aligned" / "rpo-1")))
    assert cells(alone, TABLES[0])[0][:3] == ["rpo-1", str(rounds / "sft"), "rpo_bwd_kl"]
    shutil.rmtree(place / "aligned" / "rpo-1" / "chats")
    lineage = place / "aligned" / "sft" / "lineage.yaml"
    lineage.write_text(lineage.read_text().replace("samples: sft\n", ""))
    shutil.rmtree(place / "aligned" / "sft" / "chats" / "older")
    page = Page(render(gather(place / "aligned")))
    assert [row[1] for row in cells(page, TABLES[0])] == ["/models/distilled", "sft", "rpo-1"]
    assert [row[5] for row in cells(page, TABLES[0])] == ["10", "5", "5 of 10"]
    assert {row[0].partition(",")[0] for row in cells(page, TABLES[1])} == {"sft", "again"}


def test_damaged_files_of_a_round_are_left_out(rounds: Path, tmp_path: Path) -> None:
    place = tmp_path / "damaged"
    shutil.copytree(rounds, place)
    facts = place / "rpo-1" / "chats" / "rpo-1" / "facts.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "parts": {"train": [1], "valid": {"read": "x"}}}))
    (place / "sft" / "chats" / "sft" / "train" / "starts.npy").write_bytes(b"no")
    (place / "again" / "lineage.yaml").write_text("stage: align\nload: [1]\nlineage: 3\nsamples: {}\n")
    page = Page(render(gather(place)))
    assert {"sft", "rpo-1", "again"} == {row[0] for row in cells(page, TABLES[0])}
