"""The cases of test_bad_input.py for what ranks exchange, and when, as in bad_input_cases.py."""

from __future__ import annotations

from tests.e2e.bad_input_cases import Case

OVERLAP: list[Case] = [
    (
        2,
        "train",
        ["parallel.tensor=2", "train.tp_comm_overlap=true"],
        "tp_comm_overlap=true needs sequence parallelism",
    ),
    (
        2,
        "train",
        ["parallel.tensor=2", "parallel.sequence=true", "train.tp_comm_overlap=true"],
        "train.tp_comm_overlap=true needs Transformer Engine's layers, which are in bf16, and precision=fp32",
    ),
    (
        2,
        "train",
        ["parallel.num_distributed_optimizer_instances=3"],
        "parallel.num_distributed_optimizer_instances=3 does not divide the number of data-parallel ranks, 2: set",
    ),
    (
        2,
        "train",
        ["parallel.context=2", "parallel.num_distributed_optimizer_instances=3"],
        "does not divide the number of ranks of a shard, 1 data-parallel x parallel.context=2 = 2: set",
    ),
]
for _verb in ("train", "distill"):
    OVERLAP += [
        (
            _verb,
            [f"{_verb}.tp_comm_overlap=true"],
            f"{_verb}.tp_comm_overlap=true has no effect with parallel.tensor=1, at which nothing is exchanged",
        ),
        (
            _verb,
            [f"{_verb}.overlap_grad_reduce=false", f"{_verb}.overlap_param_gather=true"],
            f"{_verb}.overlap_param_gather=true needs overlap_grad_reduce, which cuts the weights into the buckets",
        ),
        (
            _verb,
            [f"{_verb}.overlap_grad_reduce=false", f"{_verb}.ddp_bucket_size=1000"],
            f"{_verb}.ddp_bucket_size=1000 has no effect with overlap_grad_reduce=false, which reduces all gradients",
        ),
    ]
