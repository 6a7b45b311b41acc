"""Where a model's answers are kept, so that an evaluation which was cut off goes on, and none asks twice.

The harness keeps them by the text of the question alone. So the file's name tells models apart. Pure.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from minitron_mcore import __version__
from minitron_mcore.checkpoint.folder import identify_weights
from minitron_mcore.checkpoint.manifest import MANIFEST

FORMAT = "JSON"  # of an answer; before, it was a pickle, which is not read


def answers_file(
    folder: Path, name: str, model: Path, iteration: int | None, tokenizer: str | None, precision: str
) -> Path:
    """The file in `folder` for the weights in `model`: of a checkpoint's iteration, or of a Hugging Face folder (None);
    with the fingerprint of the tokenizer, and the precision."""
    told = json.dumps(
        [str(model.resolve()), iteration, weights_of(model, iteration), tokenizer, precision, __version__, FORMAT]
    )
    return folder / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.db"


def weights_of(model: Path, iteration: int | None) -> str | None:
    """Which weights these are: a checksum, or None for a checkpoint without a manifest. Of a Hugging Face folder it is
    one of its files' names, sizes and times. One process calls."""
    if iteration is not None:
        return identify_weights(model, iteration)["weights"]  # type: ignore[no-any-return]
    files = [path for path in sorted(model.iterdir()) if path.name == MANIFEST or path.suffix == ".safetensors"]
    told = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
