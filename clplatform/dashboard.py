"""`clplatform dashboard PROJECT`: a W&B workspace and report that show runs of this platform, made from code.

Runs are grouped by strategy (their job type) and stream. `tracking=wandb` defines what the panels name: `evaluation/…` over
`experience`, `train/…` over `step`, `matrix` and `matrix_table`, and in the summary the final metrics and costs. Needs
`clplatform[dashboard]` (the package wandb-workspaces); only saving needs a login.
"""

from __future__ import annotations

import json
from typing import Any

from clplatform.tracking.credentials import has_key
from clplatform.types import ClplatformError

NAME = "Continual learning"
STRATEGY = "JobType"  # of a run: see `clplatform.tracking.wandb`
CURVES = {
    "Average accuracy": "average_accuracy",
    "Average forgetting": "average_forgetting",
    "Backward transfer": "backward_transfer",
    "Forward transfer": "forward_transfer",
}
FINAL = {**CURVES, "Learning accuracy": "learning_accuracy", "Worst accuracy": "worst_accuracy"}
COST = {
    "Seconds": "seconds",
    "Optimizer steps": "steps",
    "Samples trained on": "samples",
    "Floating-point operations": "flops",
    "Peak memory (bytes)": "peak_memory_bytes",
    "Parameters beside the model": "extra_parameters",
    "Bytes of stored samples and masks": "buffer_bytes",
}
WIDTH = 24  # of a report's grid


def dashboard(project: str, entity: str | None = None, *, dry_run: bool = False) -> str:
    """Create both. Returns their addresses, a line each; with `dry_run` their JSON, and nothing is sent.

    Raises:
        ClplatformError: the package or the login is missing, or W&B refuses.
    """
    library()
    if dry_run:
        # With an entity, the runs of a report are looked up on the server, even to be written down.
        spec = {"workspace": dump(workspace(project, entity or "")), "report": [dump(b) for b in blocks(project, "")]}
        return json.dumps(spec, indent=1)
    if not has_key():
        raise ClplatformError(
            "dashboard: there is no login: set WANDB_API_KEY, or run `wandb login` once; --dry-run shows what would be made"
        )
    try:
        import wandb

        owner = entity or str(wandb.Api().default_entity)
        saved = workspace(project, owner).save()
        _, wr = library()
        report = wr.Report(project=project, entity=owner, title=NAME, blocks=blocks(project, owner), width="fluid")
        report.save()
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClplatformError(
            f"dashboard: W&B has refused ({first}); is there a project {project!r}, and may you write to it? --entity names "
            "whose it is"
        ) from error
    return f"{saved.url}\n{report.url}"


def library() -> tuple[Any, Any]:
    """The two parts of wandb-workspaces: workspaces and reports.

    Raises:
        ClplatformError: it is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports  # pyright: ignore[reportMissingImports]  an extra
        import wandb_workspaces.workspaces as workspaces  # pyright: ignore[reportMissingImports]  an extra
    except ImportError as error:
        raise ClplatformError(
            f"dashboard: {error.name or 'wandb-workspaces'} is not installed; it comes with clplatform[dashboard] "
            "(pip install 'clplatform[dashboard]')"
        ) from None
    return workspaces, reports


def dump(thing: Any) -> Any:
    """What is sent to W&B for a workspace or a block of a report."""
    return json.loads(thing._to_model().model_dump_json(by_alias=True, exclude_none=True))


def workspace(project: str, entity: str) -> Any:
    """The workspace: a section for each question, open where it is asked first."""
    ws, _ = library()
    from wandb_workspaces import expr  # pyright: ignore[reportMissingImports]  an extra

    sections = [
        ws.Section(name=name, panels=panels, is_open=i < 2, pinned=i == 0)
        for i, (name, panels) in enumerate(panels_by_question().items())
    ]
    columns = [
        "run:displayName",
        "config:seed.value",
        *(f"summary:{FINAL[n]}" for n in list(FINAL)[:2]),
        "summary:seconds",
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Metric(STRATEGY), expr.Config("stream.name")], pinned_columns=columns
        ),
    )


def blocks(project: str, entity: str) -> list[Any]:
    """The report: the same panels, in the order in which they are read."""
    _, wr = library()
    runs = wr.Runset(project=project, entity=entity, groupby=[STRATEGY, "config.stream.name"])
    found: list[Any] = [
        wr.P("Means over the runs of a strategy, with standard deviations. Made by `clplatform dashboard`.")
    ]
    for name, panels in panels_by_question().items():
        for i, panel in enumerate(panels):
            wide = WIDTH // min(len(panels), 2)
            panel.layout = wr.Layout(x=(i % 2) * wide, y=(i // 2) * 8, w=wide, h=8)
        found += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=panels)]
    return found


def panels_by_question() -> dict[str, list[Any]]:
    """Panels under what they answer."""
    _, wr = library()
    by_strategy: dict[str, Any] = {
        "groupby": STRATEGY, "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev", "max_runs_to_show": 100,
    }  # fmt: skip
    ordered = {"x": "experience", "title_x": "experiences learned"}
    return {
        "Over experiences": [
            wr.LinePlot(title=title, y=[f"evaluation/{name}"], **ordered, **by_strategy)
            for title, name in CURVES.items()
        ],
        "Accuracy matrix": [
            wr.MediaBrowser(title="Heat map of each run", media_keys=["matrix"], num_columns=4),
            wr.WeavePanelSummaryTable(table_name="matrix_table"),
        ],
        "At the end": [bars(wr, title, name, by_strategy) for title, name in FINAL.items()],
        "Training": [
            wr.LinePlot(title="Loss", x="step", y=["train/loss"], **by_strategy),
            wr.LinePlot(title="Loss terms", x="step", metric_regex="train/(?!lr$|loss$).*", **by_strategy),
            wr.LinePlot(title="Validation", x="step", metric_regex="validation/.*", **by_strategy),
            wr.LinePlot(title="Learning rate", x="step", y=["train/lr"], **by_strategy),
        ],
        "Cost": [bars(wr, title, name, by_strategy) for title, name in COST.items()],
    }


def bars(wr: Any, title: str, name: str, grouping: dict[str, Any]) -> Any:
    """A bar for each strategy."""
    return wr.BarPlot(title=title, metrics=[name], **grouping)
