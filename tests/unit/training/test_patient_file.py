"""A log whose disk fails keeps its lines until it can be written again, and stops nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_mcore.training import patient_file
from minitron_mcore.training.patient_file import PatientFile

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="Linux has /dev/full")


def test_lines_wait_for_a_disk_that_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, kept = tmp_path / "metrics.jsonl", tmp_path / "kept"
    log = PatientFile(file)
    log.write("1\n")
    file.rename(kept)
    file.symlink_to(FULL)
    log._descriptor = patient_file.os.open(FULL, patient_file.os.O_WRONLY)
    for number in (2, 3):
        log.write(f"{number}\n")
    warning = f"WARNING: {file} cannot be written, and its lines wait: No space left on device\n"
    assert capsys.readouterr().out == warning, "once"
    kept.replace(file)
    log.write("4\n")  # which fails, and opens what is there now
    assert file.read_text() == "1\n"
    log.write("5\n")
    log.close()
    assert file.read_text() == "1\n2\n3\n4\n5\n"
    assert capsys.readouterr().out == f"{file} can be written again, and has the lines that waited\n"


def test_what_cannot_be_written_to_the_end_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = PatientFile(FULL)
    for _ in range(3):
        log.write("x\n")
    log.close()
    assert "WARNING: /dev/full lacks its last 3 lines" in capsys.readouterr().out


def test_a_file_that_has_gone_is_not_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a disk is not mounted any more, another one lies."""
    file = tmp_path / "metrics.jsonl"
    log, real, is_away = PatientFile(file), patient_file.os.write, [True]

    def write(descriptor: int, line: bytes) -> int:
        if is_away[0]:
            raise OSError(116, "Stale file handle")
        return real(descriptor, line[:2])  # as much as there is room for

    monkeypatch.setattr(patient_file.os, "write", write)
    file.unlink()
    log.write("12345\n")
    assert not file.exists()
    file.touch()
    log.write("67\n")
    is_away[0] = False
    log.write("89\n")
    assert file.read_text() == "12345\n67\n89\n"
    log.close()
