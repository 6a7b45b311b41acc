"""Verb `report`: one page of a run, or of a part of one. Needs neither ranks nor torch."""

from __future__ import annotations

from pathlib import Path

from minitron_mcore.data.corpus import make_parent
from minitron_mcore.files import write_whole, writing
from minitron_mcore.jobs.report import ReportJob
from minitron_mcore.report.gather.report import Report, gather
from minitron_mcore.report.page import aligned
from minitron_mcore.report.page.parts import in_words
from minitron_mcore.report.page.render import render


def run(job: ReportJob, runtime: None) -> None:
    """Write `job.target`, whole or not at all; the first process calls."""
    found = gather(job.folder, job.steps)
    write(job, found)
    for table in aligned.tables(found):
        print(in_words(table))
    print(f"report: {job.folder} -> {job.target}", flush=True)


def write(job: ReportJob, found: Report | None = None) -> Path:
    page = render(found or gather(job.folder, job.steps))
    make_parent(str(job.target), "report.output")
    with writing(f"report.output={job.target}"):
        write_whole(job.target, page)
    return job.target
