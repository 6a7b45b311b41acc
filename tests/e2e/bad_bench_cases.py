"""The cases of test_bad_input.py for `bench`, as in bad_input_cases.py."""

from __future__ import annotations

from tests.e2e.bad_input_cases import Case

BENCH: list[Case] = [
    ("bench", ["checkpoint=null"], "checkpoint is not given: name the folder of a checkpoint, or several as"),
    ("bench", ["checkpoint=@/none"], "checkpoint=@/none is not there"),
    ("bench", ["checkpoints.teacher=@/teacher"], "checkpoint=@/teacher is given beside checkpoints"),
    (
        "bench",
        ["checkpoint=null", "checkpoints.a/b=@/teacher"],
        "checkpoints=a/b names folders of results, and can hold",
    ),
    ("bench", ["bench.engines=[vlm]"], "bench.engines[0]=vlm must be one of minitron, transformers, vllm, llama.cpp"),
    ("bench", ["bench.engines=[vlm]"], "did you mean vllm?"),
    ("bench", ["bench.engines=[minitron,minitron]"], "bench.engines=[minitron, minitron] holds minitron twice"),
    (
        "bench",
        ["bench.engines=[vllm]"],
        "bench.engines[0]=vllm is not installed here: pip install vllm, or name the Python that has it as "
        "bench.python.vllm",
    ),
    ("bench", ["bench.engines=[llama.cpp]"], "or name the Python that has it as bench.python.llama_cpp"),
    ("bench", ["bench.python.vllm=@/none"], "bench.python.vllm=@/none is not a file"),
    ("bench", ["bench.python.vlm=@/file"], "bench.python.vlm=@/file is of vlm, which is not an engine with a Python"),
    ("bench", ["bench.python.vlm=@/file"], "did you mean vllm?"),
    ("bench", ["bench.engines=[vllm]", "bench.python.vllm=@/file"], "bench.python.vllm=@/file is no Python: "),
    ("bench", ["bench.engines=[vllm]", "bench.python.vllm=/bin/false"], "bench.python.vllm=/bin/false is no Python: "),
    ("bench", ["bench.hf.teacher=@/hf_one_layer"], "bench.hf.teacher=@/hf_one_layer is another model: num_layers is 1"),
    ("bench", ["bench.hf.teacher=@/papers"], "bench.hf.teacher=@/papers is no Hugging Face folder"),
    (
        "bench",
        ["bench.hf.techer=@/papers"],
        "bench.hf.techer=@/papers is of techer, which is not a model of",
    ),
    ("bench", ["bench.converter=@/none.py"], "bench.converter=@/none.py is not a file: name convert_hf_to_gguf.py in"),
    ("bench", ["bench.batch_size=0"], "bench.batch_size"),
    ("bench", ["bench.batch_size=[]"], "bench.batch_size=[] is empty"),
    ("bench", ["bench.batch_size=[2,2]"], "bench.batch_size=[2, 2] holds 2 twice"),
    ("bench", ["bench.output_tokens=1"], "bench.output_tokens"),
    ("bench", ["bench.repeats=0"], "bench.repeats=0 must be at least 1"),
    ("bench", ["bench.time_limit=0"], "bench.time_limit=0"),
    ("bench", ["bench.prompt=8"], "bench.prompt is not a key of a recipe: the nearest is bench.prompt_tokens"),
    (
        "bench",
        ["bench.prompt_tokens=[8,61]"],
        "bench.prompt_tokens=61 with bench.output_tokens=4 makes 65 tokens, and checkpoint has "
        "max_position_embeddings=64: shorten one of them",
    ),
    ("bench", ["bench.output=@/papers"], "bench.output=@/papers is a folder: name a file"),
    (
        "bench",
        ["checkpoint=null", "checkpoints.theirs=@/hf_one_layer"],
        "bench.engines[0]=minitron reads no Hugging Face folder, and checkpoints.theirs=@/hf_one_layer is one: convert",
    ),
    ("bench", ["parallel.tensor=2"], "parallel.tensor=2 x parallel.pipeline=1 = 2 ranks for one copy of the model"),
    (2, "bench", ["parallel.context=2"], "parallel.context=2 is not possible in `bench`, which needs"),
    (
        2,
        "bench",
        ["parallel.tensor=2", "bench.engines=[minitron,llama.cpp]"],
        "bench.engines[1]=llama.cpp is measured in one process, and parallel.tensor=2 lays the model over 2 ranks: "
        "leave it out, or start one rank without parallel.*",
    ),
    ("search", ["serving.engine=vllm"], "serving.engine=vllm has no effect without measured"),
]
