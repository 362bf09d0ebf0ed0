"""Published results, run again: the paper's number, the peers' reproduction, ours over seeds.

    uv run python benchmarks/reproduce/run.py                      # everything whose data are there
    uv run python benchmarks/reproduce/run.py learn_or_recall      # recipes whose name begins so
    uv run python benchmarks/reproduce/run.py --report             # only write results.md again

What a recipe needs is looked for under CLPLATFORM_DATA (MNIST's IDX files in `mnist`, CLINC150 in `clinc150`); what is not
there is said in the table, not left out. Runs are kept in `multirun/reproduce` and are not made twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
Recipe = dict[str, Any]
STEP = 5.0  # points by which two results must differ to have an order


def run(recipe: Recipe, folder: Path) -> str | None:
    """Make the runs that are missing; returns what stood in the way."""
    seeds = ",".join(map(str, recipe["seeds"]))
    command = [sys.executable, "-m", "clplatform.cli", "-m", *recipe["settings"], f"seed={seeds}", "tracking=local"]
    done = subprocess.run([*command, f"hydra.sweep.dir={folder}"], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.startswith("clplatform: ")]
    return lines[0].removeprefix("clplatform: ") if lines else done.stderr[-300:]


def measured(folder: Path) -> list[dict[str, Any]]:
    """The completed runs of a recipe."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))]
    return [results for results in found if results["status"] == "completed"]


def accuracy(runs: list[dict[str, Any]]) -> float | None:
    return 100 * statistics.mean(r["metrics"]["average_accuracy"] for r in runs) if runs else None


def verdict(recipe: Recipe, ours: dict[str, float | None], recipes: list[Recipe]) -> str:
    """✅ where ours is not below what was published or reproduced (less the tolerance), or where it is above and below the
    others of its order as published, by more than `STEP`."""
    own = ours[recipe["name"]]
    if own is None:
        return "–"
    if order := recipe.get("order"):
        others = [r for r in recipes if r.get("order") == order and r is not recipe]
        known = [(r["paper"] < recipe["paper"], value) for r in others if (value := ours[r["name"]]) is not None]
        if len(known) < len(others):
            return "–"
        return "✅" if all(own - v > STEP if below else v - own > STEP for below, v in known) else "❌"
    published = [v for v in (recipe["paper"], recipe["peers"]) if v is not None]
    if not published:
        return "–"
    return "✅" if own >= min(published) - recipe["tolerance"] else "❌"


def table(recipes: list[Recipe], root: Path, problems: dict[str, str]) -> str:
    """Markdown."""
    runs = {r["name"]: measured(root / r["name"]) for r in recipes}
    ours = {name: accuracy(found) for name, found in runs.items()}
    lines = [
        "Final average accuracy in %. Peers: the targets of Avalanche's continual-learning-baselines. ✅: not below what was",
        "published or reproduced, less the tolerance of the recipe; for Zheng et al., whose backbone is another: above and below",
        f"the others as published, by more than {STEP:.0f} points.",
        "",
        "| recipe | what | source | paper | peers | ours | seeds | |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    for r in recipes:
        found, value = runs[r["name"]], ours[r["name"]]
        spread = (
            f" ± {100 * statistics.stdev(x['metrics']['average_accuracy'] for x in found):.1f}"
            if len(found) > 1
            else ""
        )
        cell = f"{value:.1f}{spread}" if value is not None else problems.get(r["name"], "not run")
        numbers = [f"{v:.1f}" if v is not None else "–" for v in (r["paper"], r.get("peers"))]
        cells = [f"`{r['name']}`", r["what"], r["source"], *numbers, cell, str(len(found)), verdict(r, ours, recipes)]
        lines.append(f"| {' | '.join(cells)} |")
    if notes := [f"- `{r['name']}`: {r['note']}." for r in recipes if "note" in r]:
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="only recipes whose names begin so")
    parser.add_argument("--report", action="store_true", help="only write results.md again")
    parser.add_argument("--runs", type=Path, default=Path("multirun/reproduce"), help="folder of the runs")
    options = parser.parse_args()
    recipes = yaml.safe_load((HERE / "recipes.yaml").read_text())
    problems = {}
    for recipe in recipes:
        if options.report or not (not options.names or recipe["name"].startswith(tuple(options.names))):
            continue
        print(recipe["name"], *recipe["settings"], flush=True)
        problem = run(recipe, options.runs / recipe["name"])
        if problem is not None:
            problems[recipe["name"]] = "needs MNIST" if "mnist" in problem.lower() else problem
            print("  ", problem, flush=True)
    text = table(recipes, options.runs, problems)
    (HERE / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
