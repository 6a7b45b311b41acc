"""What `generate` refuses, for test_bad_input.py; the form of bad_input_cases.py."""

from __future__ import annotations

from tests.e2e.bad_input_cases import Case

FILE = "generate.prompt=null"  # in place of the right command's text

GENERATE: list[Case] = [
    ("generate", [FILE], "generate.prompts is not given: name a file"),
    (
        "generate",
        [FILE, "generate.prompts=@/none.txt"],
        "generate.prompts=@/none.txt cannot be read: no such file or directory: name another",
    ),
    ("generate", [FILE, "generate.prompts=@/blank.txt"], "generate.prompts=@/blank.txt holds no prompt: write"),
    (
        "generate",
        [FILE, "generate.prompts=@/broken.jsonl"],
        "generate.prompts=@/broken.jsonl, line 1 is not a prompt",
    ),
    ("generate", [FILE, "generate.prompts=@/torn.jsonl"], "generate.prompts=@/torn.jsonl, line 2 is not JSON"),
    ("generate", ["generate.prompts=@/blank.txt"], "generate.prompt=prune1 is given beside generate.prompts: add it"),
    (
        "generate",
        ["checkpoint=@/checkpoints/short", "generate.prompt=a prompt of other letters"],
        " tokens, and short takes max_position_embeddings=15, of which one must be new: shorten it",
    ),
    ("generate", ["generate.chat=true"], "is a chat, and the tokenizer in @/teacher/tokenizer"),
    ("generate", ["generate.temperature=-1"], "generate.temperature=-1.0 must be finite and at least 0"),
    ("generate", ["generate.temperature=1", "generate.top_p=0"], "generate.top_p=0.0 must be above 0"),
    (
        "generate",
        ["generate.temperature=1", "generate.top_p=1.5"],
        "generate.top_p=1.5 must be above 0 and at most 1",
    ),
    ("generate", ["generate.top_p=0.5"], "generate.top_p=0.5 has no effect with generate.temperature=0: raise that"),
    ("generate", ["generate.stop=[a,'']"], "holds an empty text, which is everywhere"),
    (
        "generate",
        ["generate.max_tokens=3"],
        "generate.max_tokens is not a key of a recipe: the nearest is generate.max",
    ),
    ("generate", ["checkpoint=@/none"], "checkpoint=@/none"),
    ("generate", ["checkpoint=@/hf_one_layer"], "checkpoint=@/hf_one_layer is a Hugging Face folder: make a"),
    ("generate", ["checkpoints.a=@/teacher"], "checkpoint=@/teacher is given beside checkpoints"),
    ("generate", ["tokenizer.model=null", "checkpoint=@/checkpoints/no_tokenizer"], "tokenizer.model is not set"),
    ("generate", ["generate.output=@/papers"], "generate.output=@/papers is a folder: name a file"),
    ("generate", ["parallel.tensor=2"], "= 2 ranks for one copy of the model, but 1 was"),
]
GENERATE.append(
    (2, "generate", ["parallel.context=2"], "parallel.context=2 is not possible in `generate`, which needs")
)
