"""The page: report.md of one run directory, tables.md of a grid of them."""

import pathlib

from common.files import stage, write
from common.reproduce import claims, figures, tables
from common.reproduce.runs import Runs

OVER_PROBLEMS = (
    "One training seed: errors are standard errors over test problems, whose answers were sampled "
    "repeatedly. Differences are paired by problem, with two standard errors on either side. They do "
    "not cover what another training seed would change. A verdict needs the whole interval."
)
OVER_SEEDS = (
    "Means over training seeds {} (or as many as the column says) ± standard error over seeds. "
    "Differences are paired by seed, with Student's 95% interval. The test problems are the same for "
    "all seeds. A verdict needs the whole interval."
)


def page(runs: Runs, made_with: str) -> str:
    """The whole page as markdown; draws the figures."""
    total = f"what {runs.total} RL steps come to" if runs.total else "what was measured"
    parts = {
        f"Tables 3 and 4: {total}": tables.main_table(runs),
        "Right after the jump": tables.jumps_table(runs),
        "Every task": tables.by_task(runs),
        "The paper's claims": claims.page(runs),
        "Table 5: what the jump needs": tables.table5(runs),
        "Table 6: other algorithms": tables.table6(runs),
        "Other settings": tables.settings_table(runs),
        "Is the predictor worth its place?": tables.backtests(runs),
    }
    notes = {
        "Is the predictor worth its place?": "Cosine of the predicted rank-1 delta with the whole true "
        "one, mean over matrices, with everything later hidden.",
    }
    seeds = ", ".join(map(str, runs.seeds))
    text = [f"# Results of {runs.root.name}", made_with]
    text.append(OVER_PROBLEMS if len(runs.seeds) == 1 else OVER_SEEDS.format(seeds))
    text.append(
        f"Accuracy is {'the plain mean of' if len(runs.tasks) > 1 else 'on'} {', '.join(runs.tasks)}."
    )
    if runs.left_out:
        lines = "\n".join(f"* {line}" for line in runs.left_out)
        text.append(f"Left out of the tables, as only what was made alike compares:\n\n{lines}")
    for title, body in parts.items():
        if body:
            text += [f"## {title}", *([notes[title]] if title in notes else []), body]
    text += [
        f"## {title}\n\n![{title}](figures/{path.name})"
        for title, path in figures.draw_all(runs).items()
    ]
    return "\n\n".join(text) + "\n"


def write_page(runs: Runs, name: str, made_with: str, results: pathlib.Path) -> str:
    """Writes the page, and what was measured as JSON; returns the main table for the console."""
    rows = []
    for seed, run, r in runs.all():
        row = {
            "seed": seed,
            "run": run,
            "policy": r.policy,
            "label": r.label,
            "method": r.method,
            "alpha": r.alpha,
        }
        row |= {
            "steps": r.steps,
            "accuracy": r.accuracy,
            "error": r.error,
            "n": r.n,
            "length": r.length,
        }
        rows.append({**row, "seconds": r.seconds})
    write.write_json(results, rows)
    text = page(runs, made_with)
    write.write_text(runs.root / name, text)
    left_out = (
        f"\n{len(runs.left_out)} policies are left out; the report says why\n"
        if runs.left_out
        else ""
    )
    return f"\n{tables.main_table(runs)}\n{left_out}\nreport: {runs.root / name}, figures beside it"


def write_run(run: pathlib.Path) -> str:
    """The report of one run directory: report.md, eval/results.json, figures/."""
    versions = ", ".join(f"{name} {version}" for name, version in stage.versions().items())
    return write_page(
        Runs(run), "report.md", f"Made with {versions}.", run / "eval" / "results.json"
    )


def write_grid(root: pathlib.Path, seeds: list[int], made_with: str) -> str:
    """The page of a grid: tables.md, results.json, figures/."""
    return write_page(Runs(root, seeds), "tables.md", made_with, root / "results.json")
