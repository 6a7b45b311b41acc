"""Which weights an iteration holds, wherever it lies. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.folder import iteration_folder
from minitron_mcore.checkpoint.manifest import MANIFEST, bytes_checksum


def identity(folder: Path, iteration: int) -> dict[str, Any]:
    """The iteration, and the checksum of the manifest of its tensors; None where there is no manifest."""
    manifest = iteration_folder(folder, iteration) / MANIFEST
    return {"iteration": iteration, "weights": bytes_checksum(manifest) if manifest.is_file() else None}
