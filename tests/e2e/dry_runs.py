"""Commands with --dry-run in one fresh process: `python -m tests.e2e.dry_runs ROOT < commands.json`, answers as JSON.

Nothing of megatron is imported and no process group is made, whatever the number of ranks that is planned for.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from minitron_mcore.cli import main
from tests.e2e.verbs import snapshot


def dry_run(arguments: list[str]) -> tuple[int, str]:
    """Exit code and what was shown on either stream."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            code = main([*arguments, "--dry-run"])
        except SystemExit as leaving:
            code = int(str(leaving.code))
    return code, shown.getvalue()


if __name__ == "__main__":
    root, results = Path(sys.argv[1]), []
    before = snapshot(root)
    for words in json.load(sys.stdin):
        results.append([*dry_run(words), (after := snapshot(root)) == before])
        before = after
    heavy: list[str] = [name for name in ("megatron", "wandb") if name in sys.modules]
    if torch := sys.modules.get("torch"):
        heavy += ["process group"] if torch.distributed.is_initialized() else []
    print(json.dumps({"results": results, "heavy": heavy}))
