"""Of the table behind test_bad_input.py: what is wrong with teacher, student, and what is distilled between them."""

from __future__ import annotations

from tests.e2e.bad_input_cases import Case

DISTILL: list[Case] = [
    ("distill", ["teacher.checkpoint=null"], "teacher.checkpoint is not given"),
    ("distill", ["student.checkpoint=null"], "student.checkpoint is not given"),
    (
        "distill",
        ["teacher.checkpoint=@/checkpoints/unfinished"],
        "teacher.checkpoint=@/checkpoints/unfinished holds no finished",
    ),
    (
        "distill",
        ["student.checkpoint=@/checkpoints/other_vocabulary"],
        "vocab_size is 301 in student.checkpoint and 300 in teacher.checkpoint",
    ),
    ("distill", ["distill.checkpoint=@/student"], "is the student's or the teacher's own folder"),
    ("distill", ["distill.checkpoint=@/teacher"], "is the student's or the teacher's own folder"),
    ("distill", ["teacher.parallel.sequence=true"], "teacher.parallel.sequence=true cuts the sequence over"),
    ("distill", ["teacher.precision=fp16"], "teacher.precision=fp16 must be one of fp32, bf16, fp8"),
    (
        "distill",
        ["teacher.parallel.num_distributed_optimizer_instances=2"],
        "teacher.parallel.num_distributed_optimizer_instances=2 has no effect on a teacher that lies by itself",
    ),
    ("distill", ["teacher.precision=fp8"], "teacher.precision=fp8 needs Transformer Engine and a CUDA device"),
    (
        "distill",
        ["precision=bf16", "distill.fp8_format=hybrid"],
        "distill.fp8_format=hybrid needs Transformer Engine and a CUDA device, which are not here: leave it out",
    ),
    (
        "distill",
        ["distill.use_precision_aware_optimizer=true"],
        "distill.use_precision_aware_optimizer=true needs bf16 weights, and precision=fp32",
    ),
    ("distill", ["distill.exp_avg_dtype=bf16"], "distill.exp_avg_dtype=bf16 has no effect with use_precision_aware"),
    ("distill", ["distill.temperature=0"], "distill.temperature=0.0 must lie between 0.001 and 100"),
    ("distill", ["distill.temperature=1e4"], "distill.temperature=10000.0 must lie between 0.001 and 100"),
    ("distill", ["distill.adam_eps=0"], "distill.adam_eps=0.0 must be finite and at least 1e-30"),
    ("distill", ["seed=99999999999999999999"], "seed=99999999999999999999 must lie between 0 and 9223372036854775807"),
    ("distill", ["seed=-1"], "seed=-1 must lie between 0 and 9223372036854775807"),
    (
        "distill",
        ["distill.tokens=9000000000000000000"],
        "distill.tokens=9000000000000000000 takes 562,500,000,000,000,000 samples of 16 tokens, and no index holds",
    ),
    (
        "distill",
        ["distill.eval_iters=100000000"],
        "distill.eval_iters=100000000 takes 400,000,000 samples",
    ),
    (
        "distill",
        ["distill.hidden_states.weight=2"],
        "distill.hidden_states.weight=2.0 has no effect without distill.hidden_states.sites: leave it out, or name",
    ),
    (
        "distill",
        ["distill.jensen_shannon_mix=0.3"],
        "distill.jensen_shannon_mix=0.3 has no effect with distill.logit_loss=forward_kl: leave it out, or set",
    ),
    ("distill", ["distill.kd_weight=-1"], "distill.kd_weight=-1.0 must be finite and at least 0"),
    ("distill", ["distill.kd_weight=0"], "leave no loss for the output head"),
    (
        "distill",
        ["distill.hidden_states.sites=[logits]"],
        "distill.hidden_states.sites[0]=logits must be one of embedding",
    ),
    (
        "distill",
        ["distill.hidden_states.loss=kl"],
        "distill.hidden_states.loss=kl must be one of mse, cosine",
    ),
    (
        "distill",
        ["distill.hidden_states.sites=[mlp_input]", "distill.hidden_states.layers=[[1,1]]"],
        "distill.hidden_states.layers pairs teacher layer 1 with student layer 1, but the student has layers 0 to 0",
    ),
    (
        "distill",
        ["distill.hidden_states.sites=[mlp_input]", "distill.hidden_states.layers=[[1]]"],
        "distill.hidden_states.layers[0]=[1] must be a pair",
    ),
    (
        "distill",
        ["distill.hidden_states.layers=[1,1]"],
        "distill.hidden_states.layers[0]=1 must be a list",
    ),
    ("distill", ["distill.jensen_shannon_mix=1"], "distill.jensen_shannon_mix=1.0 must be above 0 and below 1"),
    (
        "distill",
        ["distill.teacher=cache:@/papers"],
        "distill.teacher=cache:@/papers holds no teacher's targets: cache.json is missing",
    ),
    (
        "distill",
        ["teacher.checkpoint=@/student", "student.checkpoint=@/teacher"],
        "the teacher is the larger one; swap the two",
    ),
    *(
        ("distill", ["distill.correct_teacher=true", "correct.checkpoint=@/new/corrected", wrong], said)
        for wrong, said in (
            ("correct.lr=-1", "correct.lr=-1.0 must be finite and at least 0"),
            ("correct.min_lr=1", "correct.min_lr=1.0 must lie between 0 and lr="),
            (
                "correct.lr_warmup_iters=9",
                "correct.lr_warmup_iters=9 must be less than the 1 iteration of distill.tokens",
            ),
            ("correct.keep_last=2", "correct.keep_last=2 does not go with distill.correct_teacher=true"),
            ("correct.load=@/student", "correct.load=@/student does not go with distill.correct_teacher=true"),
            ("distill.checkpoint=@/new/corrected", "corrected is distill.checkpoint's own folder: name another"),
        )
    ),
    (
        "run",
        ["distill.correct_teacher=true", "correct.adam_beta1=1"],
        "correct.adam_beta1=1.0 must be at least 0 and below 1",
    ),
    ("run", ["correct.tokens=64", "correct.load=@/student"], "correct.load=@/student is not read"),
    ("run", ["distill.teacher=cache:@/papers"], "distill.teacher=cache:@/papers holds no teacher's targets"),
    (
        "run",
        [
            "student.num_layers=1",
            "distill.hidden_states.sites=[mlp_input]",
            "distill.hidden_states.layers=[[1,1]]",
        ],
        "distill.hidden_states.layers pairs teacher layer 1 with student layer 1, but the student has layers 0 to 0",
    ),
    (
        "distill",
        ["tokenizer.model=@/other.model"],
        "tokenizer.model=@/other.model is not the tokenizer that @/teacher was trained",
    ),
    (
        2,
        "distill",
        ["teacher.parallel.tensor=3"],
        "teacher.parallel.tensor=3 x teacher.parallel.pipeline=1 = 3 ranks for one copy of the model, but 2 were",
    ),
    (2, "distill", ["teacher.parallel.context=2"], "teacher.parallel.context=2 is not parallel.context=1"),
    (
        2,
        "distill",
        ["teacher.parallel.pipeline=2", "teacher.parallel.virtual_pipeline=2"],
        "num_layers=2 is fewer than the 4 stages of teacher.parallel.pipeline=2 x teacher.parallel.virtual_pipeline=2",
    ),
    (
        2,
        "run",
        ["teacher.parallel.tensor=2", "teacher.parallel.sequence=true", "data.sequence_length=15"],
        "data.sequence_length=15 is not a multiple of teacher.parallel.tensor=2 (15 / 2 = 7.5)",
    ),
]
