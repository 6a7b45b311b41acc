"""The cases of test_bad_input.py for `estimate`, as in bad_input_cases.py."""

from __future__ import annotations

from tests.e2e.bad_input_cases import Case

ESTIMATE: list[Case] = [
    ("estimate", ["cluster.gpus=0"], "cluster.gpus=0 must be at least 1"),
    ("estimate", ["cluster.gpus=7"], "cluster.gpus=7 can be laid out in no way"),
    ("estimate", ["cluster.peak_tflops=1"], "cluster.peak_tflops_fp32 is not given, and no cluster.device says it"),
    ("estimate", ["cluster.device=A100 PCIe", "cluster.gpus_per_node=1"], "cluster.inter_node_bandwidth is not given"),
    ("estimate", ["cluster.gpus_per_node=0"], "cluster.gpus_per_node=0 must be at least 1"),
    ("estimate", ["cluster.device=H99"], "cluster.device=H99 is not in the table of devices"),
    ("estimate", ["cluster.gpu_memory=0"], "cluster.gpu_memory=0 must be at least 1"),
    ("estimate", ["estimate.layouts=0"], "estimate.layouts=0 must be at least 1"),
    ("estimate", ["teacher.checkpoint=@/none"], "teacher.checkpoint=@/none is not there"),
    ("estimate", ["teacher.checkpoint=@/papers"], "teacher.checkpoint=@/papers holds no finished checkpoint"),
    (
        "estimate",
        ["teacher.checkpoint=null", "model.num_layers=null"],
        "teacher.checkpoint is not given: name a checkpoint or a folder with architecture.yaml",
    ),
    ("estimate", ["teacher.checkpoint=null", "hf=@/none"], "hf=@/none"),
    ("estimate", ["student.num_layers=3"], "student.num_layers=3 is larger than the teacher's 2"),
    ("estimate", ["student.num_layers=null"], "student asks for nothing smaller than the teacher"),
    (
        "estimate",
        ["student.num_layers=null", "student.checkpoint=@/checkpoints/other_vocabulary"],
        "vocab_size is 301 in student.checkpoint and 300 in teacher.checkpoint",
    ),
    (
        "estimate",
        ["student.num_layers=null", "teacher.checkpoint=@/student", "student.checkpoint=@/teacher"],
        "the teacher is the larger one; swap the two",
    ),
    ("estimate", ["run.students.big.ffn_hidden_size=65"], "ffn_hidden_size=65 is larger than the teacher's 64"),
    ("estimate", ["data.sequence_length=65"], "is longer than the model's max_position_embeddings=64"),
    ("estimate", ["distill.lr_warmup_iters=9"], "distill.lr_warmup_iters"),
    ("estimate", ["distill.phases=[{tokens: 1},{tokens: 2}]"], "distill.phases have 3 tokens together"),
    ("estimate", ["estimate.curve=@/none"], "estimate.curve=@/none is not a file"),
    (
        "estimate",
        ["estimate.curve=@/file"],
        "estimate.curve=@/file is neither a training's metrics.jsonl nor a search's",
    ),
    (
        "estimate",
        ["estimate.curve=@/teacher/metrics.jsonl"],
        "metrics.jsonl has 1 point of a loss, and a curve needs 8",
    ),
    (
        "estimate",
        ["distill.tokens=0", "estimate.curve=@/file"],
        "is asked of a student, and distill.tokens says no budget",
    ),
    ("estimate", ["student.num_layers=null", "search.num_layers=[3]"], "search leaves none of 1 combination"),
    ("estimate", ["align.samples=8"], "align.load is not given: name the folder of the model to align"),
    ("estimate", ["align.samples=8", "align.load=@/none"], "align.load=@/none is not there"),
    ("estimate", ["align.load=@/student", "align.stages={sft: {lr: 1e-5}}"], "align.stages.sft.epochs are not given"),
    ("estimate", ["align.load=@/student", "align.stages={sft: {beat: 1}}"], "align.stages.sft.beat"),
    ("estimate", ["align.load=@/student", "align.samples=8", "chat.train=@/file"], "chat.train=@/file is plain text"),
    ("estimate", ["estimate.output=@/papers"], "estimate.output=@/papers is a folder"),
    ("estimate", ["estimate.output=@/file"], "estimate.output=@/file is there, and is no estimate"),
    ("estimate", ["estimate.output=@/file/estimate.json"], "estimate.output=@/file/estimate.json"),
    ("estimate", ["estimate.output=null", "output=@/file"], "estimate.output=@/file/estimate.json"),
]
