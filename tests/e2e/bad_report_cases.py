"""The cases of test_bad_input.py for `report`, as in bad_input_cases.py."""

from __future__ import annotations

from tests.e2e.bad_input_cases import Case

REPORT: list[Case] = [
    ("report", ["path=null"], "path is not given: name the folder to report on"),
    ("report", ["path=@/none"], "path=@/none is not there: name the folder of a run, of a search, of a training or"),
    ("report", ["path=@/scores.safetensors"], "path=@/scores.safetensors is a file"),
    ("report", ["path=@/papers"], "path=@/papers is neither a run nor a part of one"),
    ("report", ["path=@/hf_one_layer"], "path=@/hf_one_layer is a Hugging Face folder"),
    ("report", ["report.output=@/papers"], "report.output=@/papers is a folder: name a file"),
    ("report", ["report.output=@/file/r.html"], "report.output=@/file/r.html"),
]
