"""What a folder or file is, and whether it is whole, as a table or as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.folder import is_hugging_face, is_iteration, released, tokenizer_folder
from minitron_mcore.checkpoint.inspection import (
    describe_architecture,
    inspect_checkpoint,
    inspect_hugging_face,
    inspect_run,
    inspect_search,
    is_checkpoint,
    is_run,
    is_search,
)
from minitron_mcore.checkpoint.integrity import verify_checkpoint, verify_hugging_face
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.data.tokenizer_files import has_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.importance.scores import load_scores
from minitron_mcore.pruning.plan_file import load_plan
from minitron_mcore.runtime.progress import SILENT, Progress
from minitron_mcore.tables import table as columns

KINDS = {
    "checkpoint": "Megatron checkpoint of minitron_mcore",
    "megatron": "Megatron checkpoint of another project",
    "hugging_face": "Hugging Face folder",
    "scores": "scores of a teacher's axes",
    "plan": "pruning plan",
    "run": "folder of a run",
    "search": "folder of a search",
}
# Shown in groups of three digits.
COUNTS = ("parameters", "non_embedding_parameters", "stored_bytes", "bytes", "tokens")


def describe(path: Path) -> dict[str, Any]:
    """What `path` is, by its `kind`. Raises InputError if it is none of KINDS, or damaged. One process calls."""
    path = released(path)
    if path.is_dir() and (is_iteration(path) or is_checkpoint(path)):
        return _with_tokenizer(inspect_checkpoint(path), tokenizer_folder(path))
    if path.is_dir() and is_run(path):
        return inspect_run(path)
    if path.is_dir() and is_search(path):  # scores lie in it, as weights do in a Hugging Face folder
        return inspect_search(path)
    if path.is_dir() and is_hugging_face(path):
        found = inspect_hugging_face(path)
        try:
            return _with_tokenizer(found, path if has_tokenizer(path) else None)
        except InputError as error:  # the weights are useful without it
            return {**found, "tokenizer": None, "warnings": [*found["warnings"], str(error)]}
    if path.is_file():
        with path.open("rb") as stream:
            head = stream.read(9)
        # Safetensors: eight bytes say how long the header is, which is JSON.
        if head[5:] == b"\0\0\0{":
            return _scores(path)
        if head.lstrip().startswith(b"{"):
            return _plan(path)
    remedy = "name a checkpoint, a Hugging Face folder, a scores file, a plan, or the folder of a run or of a search"
    raise InputError("path", path, "is not recognised", remedy)


def verify_weights(found: dict[str, Any], path: Path, progress: Progress = SILENT) -> list[str]:
    """Read every tensor of a folder of weights; adds to `found` what was read and returns the faults."""
    if found["kind"] in ("scores", "plan", "run", "search"):
        found["warnings"] = [*found["warnings"], "verify=true has no effect: only folders of weights have checksums"]
        return []
    result = (verify_hugging_face if found["kind"] == "hugging_face" else verify_checkpoint)(path, progress)
    found["warnings"] = [*found["warnings"], *result.notes]
    found["verified"] = {"tensors": len(result.keys), "bytes": result.num_bytes, "faults": result.faults}
    return result.faults


def _with_tokenizer(found: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """`found` and its tokenizer; raises InputError if it is not the one that a checkpoint's lineage names."""
    if folder is None:
        return {**found, "tokenizer": None}
    tokenizer: Tokenizer = load_tokenizer(str(folder))
    stated = found["lineage"].get("tokenizer")
    if found["kind"] == "checkpoint" and isinstance(stated, str) and not tokenizer.is_named_by(stated):
        rule = f"is {tokenizer.fingerprint}, but lineage.yaml says that the checkpoint's tokenizer is {stated}"
        raise InputError("", folder, rule)
    about = {"type": tokenizer.type, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    return {**found, "tokenizer": about}


def _scores(path: Path) -> dict[str, Any]:
    try:
        scores = load_scores(path)
    except InputError as error:
        raise InputError("path", path, error.rule, error.remedy) from error
    except (KeyError, ValueError) as error:
        raise InputError("path", path, f"is a damaged scores file: its description cannot be read ({error})") from error
    axes = {
        axis: {"shape": list(values.shape), "smallest": float(values.min()), "largest": float(values.max())}
        for axis, values in scores.arrays()
        if not axis.startswith("variants/")
    }
    return {
        "path": str(path),
        "kind": "scores",
        **describe_architecture(scores.architecture),
        "scores": axes,
        "variants": list(scores.variants),
        "lineage": scores.settings,
        "warnings": [],
    }


def _plan(path: Path) -> dict[str, Any]:
    plan = load_plan(path)
    return {
        "path": str(path),
        "kind": "plan",
        "fingerprint": plan.fingerprint,
        "teacher": describe_architecture(plan.teacher),
        "student": describe_architecture(plan.student),
        "kept_layers": plan.layers,
        "lineage": plan.settings,
        "warnings": plan.warnings,
    }


def table(found: dict[str, Any]) -> str:
    """Names and values, one per line, sections indented; then warnings and faults, one per line."""
    verified = found.get("verified", {})
    shown = {name: value for name, value in found.items() if name not in ("path", "kind", "warnings")}
    if "lineage" in shown:
        shown["lineage"] = shown["lineage"] or "unknown"
    if found["kind"] == "search":
        shown["candidates"] = {name: _fared(row) for name, row in found["candidates"].items()}
    if verified:
        shown["verified"] = {**verified, "faults": len(verified["faults"])}
    rows = _rows(shown, "")
    lines = [columns(rows, left=(0, 1))]
    warnings = [f"WARNING: {warning}" for warning in found["warnings"]]
    warnings += [f"fault: {fault}" for fault in verified.get("faults", [])]
    return "\n".join([f"{found['path']}: {KINDS[found['kind']]}", *lines, *warnings])


def _fared(row: dict[str, Any]) -> str:
    """What became of a candidate of a search, in a line."""
    words = [f"{row['total_parameters']:,} parameters"] if row["total_parameters"] else []
    if row["tokens"] is None:
        return ", ".join([*words, "not tried"])
    words += [f"rank {row['rank']}"] if row["rank"] else []
    for name, loss in (("untrained loss", row["zero_shot"]), ("loss", row["loss"])):
        words += [f"{name} {loss:.4f}"] if loss is not None else []
    return ", ".join([*words, f"{'diverged before' if row['diverged'] else 'after'} {row['tokens']:,} tokens"])


def _rows(section: dict[str, Any], indent: str) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in section.items():
        if isinstance(value, dict) and value:
            rows += [(f"{indent}{name}", ""), *_rows(value, indent + "  ")]
        else:
            counts = isinstance(value, int) and not isinstance(value, bool) and name in COUNTS
            rows.append((f"{indent}{name}", f"{value:,}" if counts else _shown(value)))
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_shown(entry) for entry in value) or "none"
    return "none" if value is None or value == {} else str(value)
