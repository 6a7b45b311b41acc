"""A workspace of Weights & Biases with the project's own charts, for the runs of `log.wandb`.

    pip install wandb-workspaces
    python launch/wandb_workspace.py ENTITY [PROJECT]     saves it, and prints where it is
    python launch/wandb_workspace.py ENTITY --print       what would be saved, as JSON, without a network

The charts are those of minitron_mcore/training/charts.py. Each run, a stage of a recipe, is a line of its own; all runs
of a recipe have one group.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from minitron_mcore.training.charts import CHARTS


def workspace(entity: str, project: str) -> Any:
    """A `wandb_workspaces.workspaces.Workspace`, not saved yet."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(
            name=name,
            panels=[
                reports.LinePlot(title=chart.title, x="Step", y=[*chart.names], log_y=chart.is_logarithmic or None)
                for chart in charts
            ],
            is_open=number < 2,
        )
        for number, (name, charts) in enumerate(CHARTS.items())
    ]
    return workspaces.Workspace(entity=entity, project=project, name="minitron", sections=sections)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A workspace of Weights & Biases with the project's own charts.")
    parser.add_argument("entity", help="the user or team on Weights & Biases")
    parser.add_argument("project", nargs="?", default="minitron", help="as log.wandb_project: minitron")
    parser.add_argument("--print", action="store_true", help="print what would be saved, as JSON")
    options = parser.parse_args(arguments)
    os.environ.setdefault("WANDB_SILENT", "true")
    made = workspace(options.entity, options.project)
    if options.print:
        print(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2))
    else:
        made.save()
        print(made.url)


if __name__ == "__main__":
    main()
