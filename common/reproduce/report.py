"""The paper's tables and claims, from what the stages left in a run directory. Every number here comes out of a file of the run."""

import dataclasses
import json
import math
import pathlib

from common.files import deltas as delta_files
from common.files import write as run_dir
from common.predictor import RECIPES
from common.reproduce import plots
from common.reproduce.results import MAIN_ALPHA, NAMES, TESTED, Result, cost_bars, difference, load_results, overhead, read_predictor_report


def table_rows(results: dict[str, Result]) -> list[Result]:
    """The rows of the main table: backbone, plain GRPO, then every method after the jump and after the RL that follows it."""
    last = max((r.steps for r in results.values() if r.policy.startswith("continued/")), default=0)
    order = {name: i for i, name in enumerate(["backbone", "grpo", *(x for n in NAMES for x in (n, n + "_merged"))])}
    rows = [
        r
        for r in results.values()
        if r.method in ("backbone", "grpo")
        or (r.jumped and r.alpha in (MAIN_ALPHA, None) and r.method != "none")
        or (r.policy.startswith("continued/") and r.steps == last)
    ]
    return sorted(rows, key=lambda r: (r.policy.startswith("continued/"), r.jumped, order.get(r.method, 99), r.steps))


def main_table(results: dict[str, Result]) -> str:
    """Markdown: policy, RL steps, accuracy in % with standard error, n, ICER, response length, wall seconds (Tables 3 and 4)."""
    base = results.get("backbone")
    lines = ["| policy | RL steps | accuracy % ± s.e. | n | ICER ↓ | response length | wall s |", "|---|--:|--:|--:|--:|--:|--:|"]
    for r in table_rows(results):
        gain = 100 * (r.accuracy - base.accuracy) if base else math.nan
        icer = f"{r.steps / gain:.1f}" if r.steps and gain > 0 else "–"
        seconds = "–" if r.seconds is None else f"{r.seconds:.0f}"
        lines.append(
            f"| {r.label} | {r.steps} | {100 * r.accuracy:.1f} ± {100 * r.error:.1f} | {r.n} | {icer} | {r.length:.1f} | {seconds} |"
        )
    return "\n".join(lines)


def verdict(gap: float, error: float, not_worse: bool = False) -> str:
    """More than two standard errors above zero, below, or neither; `not_worse` is content with no difference seen."""
    if gap < -2 * error:
        return "does not hold"
    return "holds" if gap > 2 * error or not_worse else "undecided"


def compare(results: dict[str, Result], a: str, b: str, not_worse: bool = False) -> str:
    """A cell of the claims table for "policy a is better than policy b" (or, with `not_worse`, "not worse")."""
    if a not in results or b not in results:
        return "–"
    gap, error = difference(results[a], results[b])
    levels = f"{100 * results[a].accuracy:.1f} against {100 * results[b].accuracy:.1f}"
    return f"**{verdict(gap, error, not_worse)}**: {levels}, {100 * gap:+.1f} ± {100 * error:.1f}"


def fig6(results: dict[str, Result], method: str, before: str) -> str:
    """Fig. 6's claim: every alpha in [0.5, 2.5] is better than before the jump."""
    sweep = sorted(
        (r for r in results.values() if r.method == method and r.policy.startswith("extrapolated/") and r.alpha <= 2.5),
        key=lambda r: r.alpha,
    )
    if not sweep or before not in results:
        return "–"
    gaps = [(r.alpha, *difference(r, results[before])) for r in sweep]
    verdicts = {verdict(gap, error) for _, gap, error in gaps}
    overall = "does not hold" if "does not hold" in verdicts else "holds" if verdicts == {"holds"} else "undecided"
    return f"**{overall}**: " + ", ".join(f"{100 * g:+.1f} ± {100 * e:.1f} at {a:g}" for a, g, e in gaps)


def claims_section_3(run: pathlib.Path) -> list[str]:
    """What Sec. 3 says of the trajectory itself, as markdown lines."""
    found = delta_files.read_spectrum(run / "deltas")
    energy, steps, fits = found["energy_ratio"], found["steps"], found["linear_fit"]
    early = next((i for i, step in enumerate(steps) if step >= steps[-1] / 3), len(steps) - 1)
    rises = "holds" if energy[early] > energy[0] else "does not hold"
    below = sum(row["held_out"] < 0 for row in fits) / len(fits)
    in_sample = sorted(row["in_sample"] for row in fits)[len(fits) // 2]
    return [
        f"* Fig. 2, the rank-1 share of the update rises early in training: **{rises}**. E_1 is {energy[0]:.3f} at step {steps[0]}, "
        f"{energy[early]:.3f} at step {steps[early]} and {energy[-1]:.3f} at step {steps[-1]} "
        f"(mean of {len(found['energy_ratio_by_module'])} matrices).",
        f"* Fig. 3, a straight line fails on over half of the vectors: **{'holds' if below > 0.5 else 'does not hold'}**. On checkpoints "
        f"it was not fitted on, {below:.0%} of {len(fits)} vectors have an R² below 0, which is worse than the mean of those few "
        f"neighbouring points; on the checkpoints it was fitted on, the median R² is {in_sample:.2f}.",
    ]


def recipes(run: pathlib.Path) -> list[str]:
    """The predictors that stage 3 made in this run."""
    return [name for name in RECIPES if (run / "predictor" / name / "report.json").is_file()]


def claims(run: pathlib.Path, results: dict[str, Result]) -> list[tuple[str, ...]]:
    """What Sec. 5 says of NExt: (claim, cell for each recipe). Errors are over test problems, paired; there is one training seed."""
    before = f"train/step_{max(delta_files.checkpoint_paths(run)):04d}"
    longest = max((key for key in results if key.startswith("train/")), default="")
    total = max((r.steps for r in results.values() if r.policy.startswith("continued/")), default=0)
    rows: dict[str, list[str]] = {}
    for recipe in recipes(run):
        name = f"next-{recipe}_alpha{MAIN_ALPHA:g}"
        after = f"continued/{name}/step_{total:04d}"
        cells = {
            "Table 5: the jump itself gains": compare(results, f"extrapolated/{name}", before),
            "Fig. 6: so does every alpha from 0.5 to 2.5": fig6(results, f"next-{recipe}", before),
            f"Tables 3, 4: at {total} steps better than GRPO": compare(results, after, f"train/step_{total:04d}"),
            f"Tables 3, 4: at {total} steps not worse than GRPO at {results[longest].steps if longest else '?'}": compare(
                results, after, longest, not_worse=True
            ),
            f"at {total} steps better than GRPO, with a merged restart": compare(
                results, f"continued/{name}_merged/step_{total:04d}", f"train/step_{total:04d}"
            ),
            "Tables 3, 4: better than RL-Extra": compare(results, after, f"continued/rl-extra_alpha{MAIN_ALPHA:g}/step_{total:04d}"),
            "(control) better than a restart without a jump": compare(results, after, f"continued/none/step_{total:04d}"),
            "(control) the predictor is better than repeating the last target": compare(
                results, after, f"continued/repeat-last_alpha{MAIN_ALPHA:g}/step_{total:04d}"
            ),
            "Fig. 5: SVD, predictor and jump cost next to nothing (under 5%)": "–",
            f"Fig. 5: about 37.5% less time than GRPO at {results[longest].steps if longest else '?'}": "–",
        }
        if after in results and longest:
            extra, seconds, reference = sum(overhead(run, recipe).values()), results[after].seconds, results[longest].seconds
            *_, cost_key, time_key = cells
            cells[cost_key] = f"{extra:.1f} of {seconds:.0f} s, {extra / seconds:.1%}"
            cells[time_key] = f"{seconds:.0f} against {reference:.0f} s, {1 - seconds / reference:.1%} less"
        for claim, cell in cells.items():
            rows.setdefault(claim, []).append(cell)
    return [(claim, *cells) for claim, cells in rows.items() if set(cells) != {"–"}]


def backtests(run: pathlib.Path) -> str:
    """Markdown: what each recipe's predictor is worth on a target it has not seen, beside the controls."""
    lines = ["| recipe | " + " | ".join(TESTED) + " |", "|---|" + "--:|" * len(TESTED)]
    for path in sorted((run / "predictor").glob("*/report.json")):
        tested = read_predictor_report(path)["backtest"]
        if not tested:
            continue  # too few checkpoints for one
        lines.append(
            f"| {path.parent.name} ({tested['at_step']} → {tested['predicts_step']}) | "
            + " | ".join(f"{tested[c]['cosine']:.3f}" for c in TESTED)
            + " |"
        )
    return "\n".join(lines)


def write(run: pathlib.Path) -> str:
    """Writes results.json, the figures and report.md; returns the table and the paths for the console."""
    results = load_results(run)
    run_dir.write_json(
        run / "eval" / "results.json",
        [{k: v for k, v in dataclasses.asdict(r).items() if k != "by_problem"} | {"label": r.label} for r in table_rows(results)],
    )
    table = main_table(results)
    if not all((run / name).is_file() for name in ("deltas/done.json", "train/metrics.jsonl")):
        run_dir.atomic_write_text(run / "report.md", f"# Results of {run.name}\n\n{table}\n")
        return f"\n{table}\n\nreport: {run / 'report.md'} (no figures without stages 1 and 2)"
    figures = plots.draw_all(run, results, cost_bars(run, results))
    versions = json.dumps(run_dir.versions()).strip("{}").replace('"', "")
    parts = [
        f"# Results of {run.name}",
        "",
        "Accuracy is over test problems answered repeatedly at temperature 1; its standard error is over problems. All methods share "
        "the same first RL steps. One training seed: the errors do not cover what another seed would change.",
        "",
        table,
        "",
        "## The paper's claims, on this run",
        "",
        *claims_section_3(run),
        "",
        "Accuracy in %, differences in points ± their paired standard error, both before rounding; a verdict needs two standard errors.",
        "",
        f"| the paper's claim of NExt | {' | '.join(NAMES[f'next-{name}'].removeprefix('NExt, ') for name in recipes(run))} |",
        "|---|" + "---|" * len(recipes(run)),
        *(f"| {' | '.join(row)} |" for row in claims(run, results)),
        "",
        "## Is the predictor worth its place?",
        "",
        "Cosine between the predicted rank-1 delta and the whole true one, mean over matrices, with everything later hidden.",
        "",
        backtests(run),
        "",
        *(f"## {title}\n\n![{title}](figures/{path.name})\n" for title, path in figures.items()),
        f"Made with {versions}.",
        "",
    ]
    run_dir.atomic_write_text(run / "report.md", "\n".join(parts))
    return f"\n{table}\n\nreport: {run / 'report.md'}\nfigures: " + " ".join(str(path) for path in figures.values())
