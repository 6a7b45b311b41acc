"""The table behind test_bad_input.py: (verb, what is wrong in a command that is right, what must be said).

`@` stands for the folder of the test. A number in front of the verb is the number of ranks, where it is not one.
"""

from __future__ import annotations

from typing import Union

Case = Union[tuple[str, list[str], str], tuple[int, str, list[str], str]]

EXISTS = "name a folder that does not, or move that one away"
LENGTH = "data.sequence_length=65 is longer than the model's max_position_embeddings=64"

RECIPES: list[Case] = [
    ("train", ["--config=@/none.yaml"], "--config @/none.yaml is not a file"),
    ("train", ["--config=@/recipes/list.yaml"], "--config @/recipes/list.yaml holds a list"),
    ("train", ["--config=@/recipes/torn.yaml"], "--config @/recipes/torn.yaml is not YAML"),
    ("train", ["train.lrr=1"], "train.lrr is not a key of a recipe: the nearest is train.lr"),
    ("run", ["run.students.width.hiden_size=8"], "the nearest is run.students.width.hidden_size"),
    (
        "evaluate",
        ["evaluate.samples=all"],
        "evaluate.samples=all must be a whole number",
    ),
    ("train", ["precision=bf61"], "precision=bf61 must be one of fp32, bf16: did you mean bf16?"),
    (
        "score",
        ["importance.batch_aggregation=l3"],
        "importance.batch_aggregation=l3 must be one of mean, l2, var",
    ),
    ("prune", ["prune.layers=middle"], "prune.layers=middle must be one of scattered, contiguous"),
    ("export", ["hf"], "hf is not an override: write key=value"),
]

LAYOUTS: list[Case] = [
    (
        verb,
        ["parallel.tensor=2"],
        "parallel.tensor=2 x parallel.pipeline=1 = 2 ranks for one copy of the model, but 1 was",
    )
    for verb in ("import", "train", "score", "prune", "distill", "evaluate", "run")
]
LAYOUTS += [
    (verb, ["parallel.context=2"], "parallel.pipeline=1 x parallel.context=2 = 2 ranks for one copy of the model")
    for verb in ("train", "score", "prune", "distill", "evaluate")
]
LAYOUTS += [
    (
        "distill",
        ["teacher.placement=sharded", "distill.correct_teacher=true"],
        "teacher.placement=sharded does not go with distill.correct_teacher=true",
    ),
    ("plan", ["parallel.tensor=0"], "parallel.tensor=0 must be at least 1"),
    ("train", ["parallel.pipeline=-1"], "parallel.pipeline=-1 must be at least 1"),
    ("train", ["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline=2 needs pipeline of at least 2"),
    ("train", ["parallel.virtual_pipeline=1"], "parallel.virtual_pipeline=1 must be at least 2"),
    ("train", ["parallel.sequence=true"], "parallel.sequence=true cuts the sequence over tensor-parallel ranks"),
    (
        2,
        "train",
        ["parallel.tensor=3"],
        "= 3 ranks for one copy of the model, but 2 were started: start a multiple of 3",
    ),
    (
        2,
        "train",
        ["parallel.tensor=2", "model.num_query_groups=1"],
        "parallel.tensor=2 does not divide num_query_groups=1 (1 / 2 = 0.5)",
    ),
    (
        2,
        "train",
        ["parallel.tensor=2", "model.ffn_hidden_size=63"],
        "parallel.tensor=2 does not divide ffn_hidden_size=63 (63 / 2 = 31.5)",
    ),
    (
        2,
        "train",
        ["parallel.tensor=2", "model.vocab_size=301", "model.make_vocab_size_divisible_by=1"],
        "parallel.tensor=2 does not divide padded_vocab_size=301",
    ),
    (
        2,
        "run",
        ["parallel.tensor=2", "model.ffn_hidden_size=63"],
        "parallel.tensor=2 does not divide ffn_hidden_size=63",
    ),
    (
        2,
        "train",
        ["parallel.pipeline=2", "model.num_layers=1"],
        "num_layers=1 is fewer than the 2 stages of parallel.pipeline=2",
    ),
    (
        2,
        "train",
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
        "num_layers=2 is fewer than the 4 stages of parallel.pipeline=2 x parallel.virtual_pipeline=2",
    ),
    (
        2,
        "train",
        ["parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=15"],
        "data.sequence_length=15 is not a multiple of parallel.tensor=2 (15 / 2 = 7.5)",
    ),
    (
        2,
        "train",
        ["parallel.context=2", "data.sequence_length=18"],
        "data.sequence_length=18 is not a multiple of 2 x parallel.context=2 = 4 (18 / 4 = 4.5)",
    ),
    (2, "score", ["parallel.context=2"], "parallel.context=2 is not possible in `score`, which needs a whole sequence"),
    (2, "run", ["parallel.context=2"], "parallel.context=2 is not possible in `run`, which needs a whole sequence"),
    (
        2,
        "train",
        ["train.global_batch_size=6", "train.micro_batch_size=2"],
        "train.global_batch_size=6 is not a multiple of train.micro_batch_size=2 x 2 data-parallel ranks = 4",
    ),
    (2, "evaluate", ["parallel.tensor=2", "checkpoint=@/checkpoints/one_group"], "does not divide num_query_groups=1"),
    (
        2,
        "score",
        ["parallel.tensor=2", "teacher.checkpoint=@/checkpoints/odd_ffn"],
        "does not divide ffn_hidden_size=63",
    ),
    (2, "distill", ["parallel.pipeline=2"], "num_layers=1 is fewer than the 2 stages"),
    (2, "prune", ["parallel.tensor=2", "student.ffn_hidden_size=33"], "student.ffn_hidden_size=33 is not a multiple"),
    (2, "import", ["parallel.pipeline=2", "hf=@/hf_one_layer"], "num_layers=1 is fewer than the 2 stages"),
]

TEXT: list[Case] = [
    ("tokenizer", ["tokenizer.input=@/none"], "tokenizer.input=@/none does not exist"),
    ("tokenizer", ["tokenizer.input=null"], "input is not given: name the text to train on"),
    ("tokenizer", ["tokenizer.input=@/blank.txt"], "tokenizer.input=@/blank.txt holds no text"),
    ("tokenizer", ["tokenizer.input=@/empty.txt"], "tokenizer.input=@/empty.txt holds no text"),
    ("tokenizer", ["tokenizer.input=@/empty_folder"], "tokenizer.input"),
    ("tokenizer", ["tokenizer.vocab_size=9999"], "tokenizer.vocab_size=9999 is too large for this text"),
    ("tokenizer", ["tokenizer.vocab_size=-1"], "tokenizer.vocab_size=-1 must be at least 1"),
    ("tokenizer", ["tokenizer.character_coverage=2"], "tokenizer.character_coverage=2.0 must be above 0 and at most 1"),
    ("tokenizer", ["tokenizer.num_threads=0"], "tokenizer.num_threads=0 must be at least 1"),
    ("tokenizer", ["tokenizer.model=@/other.model"], "tokenizer.model=@/other.model exists"),
    ("tokenizer", ["tokenizer.model=@/file/t.model"], "cannot be written, because @/file is not a folder"),
    ("tokenizer", ["tokenizer.model=@/papers"], "tokenizer.model=@/papers"),
    ("preprocess", ["input=@/none"], "input=@/none does not exist"),
    ("preprocess", ["input=@/empty.txt"], "input=@/empty.txt holds no text"),
    ("preprocess", ["input=@/broken.jsonl"], "@/broken.jsonl, line 2, is not JSON"),
    ("preprocess", ["preprocess.json_keys=[body]"], "has no key 'body'"),
    ("preprocess", ["tokenizer.model=@/none.model"], "tokenizer.model=@/none.model does not exist"),
    ("preprocess", ["tokenizer.model=@/file"], "tokenizer.model=@/file is not a SentencePiece model"),
    ("preprocess", ["output_prefix=null"], "output_prefix is not given: name the path"),
    ("preprocess", ["output_prefix=@/data/tokens"], "would overwrite @/data/tokens_text_document.idx"),
    ("preprocess", ["output_prefix=@/file/tokens"], "cannot be written, because @/file is not a folder"),
    ("preprocess", ["preprocess.valid_fraction=1.5"], "preprocess.valid_fraction=1.5 must be at least 0 and below 1"),
    ("preprocess", ["preprocess.workers=0"], "preprocess.workers=0 must be at least 1"),
]

TRAINING: list[Case] = []
for _verb in ("train", "distill"):
    TRAINING += [
        (_verb, ["data.train=null"], "data.train is not set"),
        (_verb, ["data.train=@/none"], "data.train=@/none lacks its .bin or its .idx"),
        (_verb, ["data.train=@/data/tokens"], "did you mean @/data/tokens_text_document?"),
        (_verb, ["data.sequence_length=65"], LENGTH),
        (_verb, ["data.sequence_length=0"], "data.sequence_length=0 must be"),
        (_verb, ["data.num_workers=-1"], "data.num_workers=-1 must be at least 0"),
        (_verb, ["data.split=0,50,50"], "data.split=0,50,50 leaves no documents for train"),
        (_verb, [f"{_verb}.tokens=0"], f"{_verb}.tokens=0 must be at least 1: it is the budget"),
        (_verb, [f"{_verb}.global_batch_size=0"], f"{_verb}.global_batch_size=0 must be at least 1"),
        (
            _verb,
            [f"{_verb}.global_batch_size=3"],
            f"{_verb}.global_batch_size=3 is not a multiple of {_verb}.micro_batch_size=2",
        ),
        (_verb, [f"{_verb}.micro_batch_size=-2"], f"{_verb}.micro_batch_size=-2 must be at least 1"),
        (_verb, [f"{_verb}.lr=-1"], f"{_verb}.lr=-1.0 must be finite and at least 0"),
        (_verb, [f"{_verb}.lr=nan"], f"{_verb}.lr=nan must be finite"),
        (_verb, [f"{_verb}.min_lr=1"], f"{_verb}.min_lr=1.0 must lie between 0 and lr=0.0003"),
        (_verb, [f"{_verb}.lr_warmup_iters=1"], f"{_verb}.lr_warmup_iters=1 must be less than the 1 iteration"),
        (_verb, [f"{_verb}.adam_beta2=1"], f"{_verb}.adam_beta2=1.0 must be at least 0 and below 1"),
        (_verb, [f"{_verb}.save_interval=-1"], f"{_verb}.save_interval=-1 must be at least 0"),
        (_verb, [f"{_verb}.keep_last=0"], f"{_verb}.keep_last=0 must be at least 1"),
        (_verb, [f"{_verb}.keep_best=1"], f"{_verb}.keep_best=1 compares validation losses, but with eval_interval=0"),
        (_verb, [f"{_verb}.eval_iters=-1"], f"{_verb}.eval_iters=-1 must be at least 0"),
        (_verb, [f"{_verb}.loss_chunk_tokens=0"], f"{_verb}.loss_chunk_tokens=0 must be at least 1"),
        (
            _verb,
            [f"{_verb}.recompute_granularity=ful"],
            f"{_verb}.recompute_granularity=ful must be one of full, selective: did you mean full?",
        ),
        (
            _verb,
            [f"{_verb}.recompute_num_layers=1"],
            f"{_verb}.recompute_num_layers=1 has no effect with recompute_granularity=null",
        ),
        (
            _verb,
            [f"{_verb}.lr_decay_style=cosin"],
            "must be one of cosine, linear, constant, WSD: did you mean cosine?",
        ),
        (_verb, [f"{_verb}.lr_decay_style=WSD"], f"{_verb}.lr_wsd_decay_tokens=0 must lie between 1 and the 64 tokens"),
        (
            _verb,
            [f"{_verb}.tokens=640", f"{_verb}.rampup_batch_size=[1,1,9]"],
            f"{_verb}.rampup_batch_size=[1, 1, 9] passes a batch size of 1, which is not a multiple of",
        ),
        (
            _verb,
            [f"{_verb}.phases=[{{tokens: 32}},{{sequence_length: 65}}]"],
            f"{_verb}.phases[1].sequence_length=65 is longer than the model's max_position_embeddings=64",
        ),
        (_verb, [f"{_verb}.phases=[{{token: 32}}]"], f"{_verb}.phases[0].token"),
        (_verb, [f"{_verb}.phases=[{{tokens: 32}}]"], f"{_verb}.phases have 32 tokens together"),
        (_verb, [f"{_verb}.checkpoint=null"], f"{_verb}.checkpoint is not given"),
        (_verb, [f"{_verb}.checkpoint=@/file"], f"{_verb}.checkpoint=@/file is a file: name a folder"),
        (
            _verb,
            [f"{_verb}.checkpoint=@/file/inner"],
            f"{_verb}.checkpoint=@/file/inner cannot be written, because @/file is not a folder",
        ),
        (
            _verb,
            [f"{_verb}.checkpoint=@/other_run"],
            f"{_verb}.checkpoint=@/other_run holds another run: data.sequence_length is 17 there and 16 here",
        ),
        (_verb, [f"{_verb}.checkpoint=@/checkpoints/no_recipe"], "holds checkpoints but no recipe.yaml"),
        (_verb, ["log.interval=0"], "log.interval=0 must be at least 1"),
    ]
TRAINING += [
    ("train", ["tokenizer.model=null"], "tokenizer.model is not set"),
    ("train", ["tokenizer.model=@/other.model"], "was made with another tokenizer"),
    ("train", ["model.vocab_size=290"], "has 300 ids and the model vocab_size=290"),
    ("train", ["model.hidden_size=0"], "model.hidden_size=0 must be a whole number of at least 1"),
    ("train", ["model.num_layers=null"], "model.num_layers is missing"),
    ("train", ["model.num_attention_heads=3"], "model.num_attention_heads=3 must be a multiple of num_query_groups=2"),
    (
        "train",
        ["model.family=lama"],
        "family=lama is not known: choose one of llama, mistral, nemotron",
    ),
    ("train", ["model.kv_channels=7"], "kv_channels=7"),
    ("train", ["model.rope_scaling.factors=7"], "rope_scaling.factors is not a field"),
    ("train", ["model.make_vocab_size_divisible_by=0"], "model.make_vocab_size_divisible_by=0 must be at least 1"),
    ("train", ["train.load=@/none"], "train.load=@/none is not there"),
    ("train", ["train.load=@/papers"], "train.load=@/papers holds no finished checkpoint"),
    (
        "train",
        ["train.checkpoint=@/teacher", "train.lr=1e-3"],
        "train.checkpoint=@/teacher holds another run: train.lr is 0.0003 there and 0.001 here",
    ),
    (
        "train",
        ["train.checkpoint=@/teacher", "model.hidden_size=48"],
        "holds another run: model.hidden_size is 32 there and 48 here",
    ),
    (
        "train",
        ["train.checkpoint=@/checkpoints/same_recipe"],
        "@/checkpoints/same_recipe is a checkpoint of another architecture: ffn_hidden_size is 63 there and 64 here",
    ),
    (
        "train",
        ["train.checkpoint=@/checkpoints/cut_off"],
        "holds no checkpoint that is whole: @/checkpoints/cut_off/iter_0000001/metadata.json is missing",
    ),
]

CHECKPOINTS: list[Case] = [
    (
        "score",
        ["teacher.checkpoint=@/checkpoints/torn_tracker"],
        "instead of a number: write that of the newest finished iteration into it",
    ),
    ("score", ["teacher.checkpoint=@/none"], "teacher.checkpoint=@/none is not there"),
    ("score", ["scores=null"], "scores is not given"),
    ("score", ["scores=@/papers"], "scores=@/papers is a folder: name a file"),
    ("score", ["scores=@/file"], "scores=@/file exists and is not a scores file: name another file"),
    ("score", ["scores=@/file/scores.safetensors"], "cannot be written, because @/file is not a folder"),
    (
        "score",
        ["scores=@/scores.safetensors", "importance.num_samples=3"],
        "scores=@/scores.safetensors was made in another way: importance.num_samples",
    ),
    ("score", ["importance.num_samples=0"], "importance.num_samples=0 must be at least 1"),
    ("score", ["importance.num_samples=99999"], "importance.num_samples=99999 is more than the"),
    ("score", ["importance.micro_batch_size=0"], "importance.micro_batch_size=0 must be at least 1"),
    *(
        (
            verb,
            ["importance.depth_metrics=[lm_loss]", "importance.block_lengths=[2]"],
            "importance.block_lengths=[2] holds 2, but the model has 2 layers: choose lengths from 1 to 1",
        )
        for verb in ("score", "run")
    ),
    (
        "run",
        ["importance.depth_metrics=[accuracy]", "importance.multiple_choice=@/file"],
        "importance.multiple_choice=@/file, line 1 is not JSON",
    ),
    ("score", ["data.sequence_length=65"], LENGTH),
    ("score", ["tokenizer.model=@/other.model"], "tokenizer"),
    ("plan", ["plan=null"], "plan is not given"),
    ("plan", ["plan=@/papers"], "plan=@/papers is a folder: name a file"),
    ("plan", ["plan=@/file/plan.json"], "cannot be written, because @/file is not a folder"),
    ("plan", ["scores=@/none"], "scores=@/none does not exist"),
    ("plan", ["scores=@/file"], "scores=@/file cannot be read"),
    ("plan", ["student.num_layers=3"], "student.num_layers=3 is larger than the teacher's 2"),
    ("plan", ["student.hidden_size=0"], "student.hidden_size=0 must be at least 1"),
    ("prune", ["student.ffn_hidden_size=65"], "student.ffn_hidden_size=65 is larger than the teacher's 64"),
    ("prune", ["student.checkpoint=@/student"], "student.checkpoint=@/student exists already"),
    ("prune", ["student.checkpoint=@/papers", "prune.overwrite=true"], "holds something other than a checkpoint"),
    ("prune", ["student.checkpoint=@/file"], "student.checkpoint=@/file is a file"),
    ("prune", ["plan=@/file"], "plan=@/file is not JSON"),
    ("prune", ["teacher.checkpoint=@/student"], "was made for another model than this teacher"),
    ("evaluate", ["checkpoint=null"], "checkpoint is not given"),
    ("evaluate", ["checkpoint=@/checkpoints/unfinished"], "holds no finished checkpoint"),
    (
        "evaluate",
        ["checkpoint=@/checkpoints/short"],
        "data.sequence_length=16 is longer than the model's max_position_embeddings=15",
    ),
    ("evaluate", ["checkpoint=@/checkpoints/torn_architecture"], "architecture.yaml is not YAML"),
    ("evaluate", ["checkpoint=@/checkpoints/damaged"], "@/checkpoints/damaged"),
    ("evaluate", ["data.train=null"], "data.valid is not given"),
    ("evaluate", ["evaluate.micro_batch_size=0"], "evaluate.micro_batch_size=0 must be at least 1"),
    ("evaluate", ["evaluate.samples=-3"], "evaluate.samples=-3 must be at least 1"),
    ("train", ["train.load=@/teacher", "train.checkpoint=@/teacher"], "is train.load's own folder"),
    ("evaluate", ["results=@/papers"], "results=@/papers is a folder: name a file"),
    ("evaluate", ["results=@/file/results.json"], "results=@/file"),
    ("evaluate", ["tokenizer.model=@/other.model"], "is not the tokenizer that @/teacher was trained with"),
    ("export", ["checkpoint=@/none"], "checkpoint=@/none is not there"),
    ("export", ["hf=null"], "hf is not given"),
    ("export", ["hf=@/papers"], f"hf=@/papers exists: {EXISTS}"),
    ("export", ["hf=@/file/inner"], "hf=@/file/inner cannot be written"),
    ("import", ["hf=@/none"], "hf=@/none is not there"),
    ("import", ["hf=@/papers"], "hf=@/papers holds no config.json"),
    ("import", ["hf=@/hf_one_layer", "checkpoint=@/teacher"], f"checkpoint=@/teacher exists: {EXISTS}"),
    (
        "import",
        ["hf=@/hf_one_layer", "checkpoint=@/file/inner"],
        "checkpoint=@/file/inner cannot be written, because @/file is not a folder",
    ),
]

RUN: list[Case] = [
    ("run", ["output=null"], "output is not given"),
    ("run", ["output=@/file"], "output=@/file is a file"),
    ("run", ["output=@/papers"], "output=@/papers holds something other than a run"),
    (
        "run",
        ["output=@/other_run"],
        "output=@/other_run holds another run: data.sequence_length is 17 there and 16 here",
    ),
    (
        "run",
        ["tokenizer.model=null", "data.train=null", "tokenizer.input=@/none"],
        "tokenizer.input=@/none does not exist",
    ),
    ("run", ["data.train=null"], "input is not given: name the text"),
    ("run", ["data.train=null", "input=@/none"], "input=@/none does not exist"),
    ("run", ["tokenizer.model=null"], "holds token ids: name the tokenizer's tokenizer.model too"),
    ("run", ["tokenizer.model=@/none"], "tokenizer.model=@/none does not exist"),
    ("run", ["data.valid=@/none"], "data.valid=@/none lacks its .bin or its .idx"),
    ("run", ["data.sequence_length=65"], LENGTH),
    ("run", ["model.hidden_size=null"], "model.hidden_size is missing"),
    ("run", ["train.global_batch_size=3"], "train.global_batch_size=3 is not a multiple of"),
    ("run", ["distill.min_lr=1"], "distill.min_lr=1.0 must lie between 0 and lr="),
    ("run", ["distill.tokens=0"], "distill.tokens=0 must be at least 1"),
    ("run", ["distill.temperature=-1"], "distill.temperature=-1.0 must lie between 0.001 and 100"),
    ("run", ["importance.num_samples=0"], "importance.num_samples=0 must be at least 1"),
    ("run", ["evaluate.samples=0"], "evaluate.samples=0 must be at least 1"),
    ("run", ["log.interval=0"], "log.interval=0 must be at least 1"),
    ("run", ["run.students.wide.hidden_size=33"], "student.hidden_size=33 is larger than the teacher's 32"),
    (
        "run",
        ["run.students.odd.hidden_size=30"],
        "is not a multiple of num_attention_heads=4",
    ),
    ("run", ["run.students={a b: {num_layers: 1}}"], "run.students=a b is to be a folder's name"),
    ("run", ["run.baselines=[radnom]"], "run.baselines[0]=radnom must be one of next_token, random"),
    ("run", ["teacher.checkpoint=@/none"], "teacher.checkpoint=@/none is not there"),
    ("run", ["teacher.checkpoint=@/teacher", "tokenizer.model=null"], "name it as tokenizer.model"),
]

CASES = [*RECIPES, *LAYOUTS, *TEXT, *TRAINING, *CHECKPOINTS, *RUN]
