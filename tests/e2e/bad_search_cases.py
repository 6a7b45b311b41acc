"""The cases of test_bad_input.py for `search`, as in bad_input_cases.py."""

from __future__ import annotations

from tests.e2e.bad_input_cases import Case

SEARCH: list[Case] = [
    ("search", ["output=null"], "output is not given"),
    ("search", ["output=@/file"], "output=@/file is a file"),
    ("search", ["output=@/teacher"], "output=@/teacher is a checkpoint: name another folder"),
    ("search", ["teacher.checkpoint=@/none"], "teacher.checkpoint=@/none is not there"),
    ("search", ["teacher.checkpoint=@/papers"], "teacher.checkpoint=@/papers"),
    ("search", ["search.num_layers=[]"], "search.num_layers=[] is empty"),
    ("search", ["search.num_layers=null", "search.ffn_ratio=null"], "search is an empty grid, which names no sizes"),
    ("search", ["search.num_layers=[2-1]"], "search.num_layers[0]=2-1 must go up from at least 1"),
    ("search", ["search.num_layers=[one]"], "search.num_layers[0]=one must be a whole number or a range"),
    ("search", ["search.hidden_size=[16-32:5]"], "search.hidden_size[0]=16-32:5 does not end at 32 in steps of 5"),
    ("search", ["search.num_layers=1"], "search.num_layers=1 must be a list"),
    ("search", ["search.ffn_ratio=[0]"], "search.ffn_ratio[0]=0.0 must be finite and above 0"),
    ("search", ["search.ffn_hidden_size=[32]"], "search.ffn_ratio=[1.0, 1.5] and ffn_hidden_size=[32] are both given"),
    ("search", ["search.num_layers=[3]"], "search leaves none of 2 combinations: 2 because search.num_layers=3 is"),
    ("search", ["search.num_query_groups=[3]"], "2 because search.num_query_groups=3 is larger than the teacher's 2"),
    ("search", ["parallel.tensor=3"], "search leaves none of 2 combinations: 2 because parallel.tensor=3 does not"),
    ("search", ["parallel.pipeline=2"], "num_layers=1 is fewer than the 2 stages of parallel.pipeline=2"),
    ("search", ["search.budget.total_parameters=[2,1]"], "search.budget.total_parameters=[2, 1] must be above 0, and"),
    ("search", ["search.budget.total_parameters=[1,2,3]"], "must be a target, or [least, most]"),
    ("search", ["search.budget.tolerance=1"], "search.budget.tolerance=1.0 must be at least 0 and below 1"),
    (
        "search",
        ["search.budget.total_parameters=1M"],
        "search.budget.total_parameters=1000000 is met by none of 2 shapes (950,000 to 1,050,000): the nearest are "
        "l1-h32-f48-q4-g2 with total_parameters ",
    ),
    ("search", ["search.budget.latency=1"], "cluster.peak_tflops"),
    ("search", ["search.budget.latency=1", "cluster.device=H99"], "cluster.device=H99 is not in the table of devices"),
    ("search", ["search.most=1"], "search.most=1 keeps the candidates nearest to the middle of the budgets"),
    ("search", ["search.budget.parameters=1"], "the nearest is search.budget.total_parameters"),
    (
        "run",
        ["search.num_layers=[1]", "search.train=false"],
        "search.train=false leaves `run` without a student: set search.train=true, or name a student as student.*",
    ),
    ("run", ["search.num_layers=[1]", "prune.steps=2"], "prune.steps=2 prunes in steps, and a search cuts each"),
    ("run", ["search.num_layers=[1]"], "search.tokens is not given"),
    (
        "run",
        ["search.num_layers=[1]", "search.tokens=32", "search.budget.total_parameters=1M"],
        "search.budget.total_parameters=1000000 is met by none of 1 shape",
    ),
    ("run", ["search.num_layers=[1]", "search.tokens=128"], "search.tokens=128 is more than distill.tokens=64"),
]
