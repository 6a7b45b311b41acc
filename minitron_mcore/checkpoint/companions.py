"""What lies beside a Hugging Face folder's weights and tokenizer, and travels with its checkpoints to the next export.

CHECKPOINT/hugging_face/config.json              as it was imported; never that of a pruned shape
                       /generation_config.json   as it was imported, byte for byte
                       /README.md, LICENSE …     the source's own card and terms
CHECKPOINT/plan.json                             of a pruned student, and of what is trained onward from it

One process calls; nothing here is a collective.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from minitron_mcore.checkpoint.folder import beside, read_lineage

FOLDER = "hugging_face"
TERMS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
KEPT = ("config.json", "generation_config.json", "README.md", *TERMS)
MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")


def keep_companions(source: Path, checkpoint: Path) -> None:
    """Copy what lies beside the weights of the Hugging Face folder `source` into the checkpoint made from it."""
    _copy(source, checkpoint / FOLDER, KEPT)


def carry_companions(source: Path, target: Path) -> None:
    """Copy a checkpoint's companions into the checkpoint `target` that is made from it; what has none gives none."""
    if source.resolve() == target.resolve():
        return
    _copy(beside(source, FOLDER), target / FOLDER, KEPT)
    _copy(beside(source, "plan.json").parent, target, ("plan.json",))


def token_ids(checkpoint: Path, ids: dict[str, Any]) -> dict[str, Any]:
    """The marks that config.json names: the source's where it says them (one id, several, or null), else `ids`."""
    config = _json(beside(checkpoint, FOLDER) / "config.json")
    return {**ids, **{name: config[name] for name in MARKS if name in config}}


def write_companions(checkpoint: Path, folder: Path, ids: dict[str, Any]) -> None:
    """Put generation_config.json, the source's or one that names `ids`, and the source's terms into a new `folder`."""
    _copy(beside(checkpoint, FOLDER), folder, ("generation_config.json", *TERMS))
    if not (folder / "generation_config.json").is_file():
        content = json.dumps({"_from_model_config": True, **ids}, indent=2)
        (folder / "generation_config.json").write_text(content + "\n", encoding="utf-8")


def source_card(checkpoint: Path) -> dict[str, Any]:
    """What the source says of itself, for the front matter of a derived model's card; what it does not say is absent.

    `base_model`: its name on the hub, as a hub cache's folder spells it or its config.json does, else the base that its
    own card names; `license`, `license_name`, `license_link` and `language` as its own card has them.
    """
    card = _front_matter(beside(checkpoint, FOLDER) / "README.md")
    name = _source_name(checkpoint) or card.get("base_model")
    found = {"base_model": name} if name else {}
    return found | {key: card[key] for key in ("license", "license_name", "license_link", "language") if key in card}


def _source_name(checkpoint: Path) -> str | None:
    imported = str(_find(read_lineage(checkpoint), "hf") or "")
    if cached := re.search(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)(?:/|$)", imported):
        return f"{cached[1]}/{cached[2]}"
    stated = str(_json(beside(checkpoint, FOLDER) / "config.json").get("_name_or_path") or "")
    # A path of somebody's machine is no name; one that is relative, and of one folder in another, looks like one.
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", stated) and not Path(stated).exists()
    return stated if is_name else None


def _find(lineage: Any, key: str) -> Any:
    """The first value of `key` in a lineage or in those within it."""
    if not isinstance(lineage, dict):
        return None
    if key in lineage:
        return lineage[key]
    return next((found for value in lineage.values() if (found := _find(value, key)) is not None), None)


def _front_matter(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        fields = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip("\ufeff\n ") else None
    except yaml.YAMLError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            target.mkdir(parents=True, exist_ok=True)
            partial = target / f"{name}.tmp"
            shutil.copyfile(source / name, partial)
            partial.replace(target / name)
