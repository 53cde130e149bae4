"""The paper's tables and claims, from what the stages left in a run directory. Every number here comes out of a file of the run."""

import dataclasses
import json
import math
import pathlib
import re

import torch

from common import plots, run_dir

MAIN_ALPHA = 1.5  # the paper's extending coefficient: the alpha of the tables
NAMES = {
    "next-aligned": "NExt, aligned recipe",
    "next-paper": "NExt, published recipe",
    "repeat-last": "repeat-last (control)",
    "rl-extra": "RL-Extra",
    "none": "restart without a jump (control)",
    "oracle": "oracle (true next delta, rank 1)",
}


@dataclasses.dataclass
class Result:
    """One evaluated policy. accuracy and error in 0..1; by_problem [problems] holds each problem's mean score, all tasks in a row."""

    policy: str  # the path below the run directory
    method: str  # backbone, grpo, or a key of NAMES, with "_merged" where stage 5 was told so
    steps: int  # RL steps it took
    alpha: float | None
    accuracy: float
    error: float
    n: int
    length: float
    by_problem: list[torch.Tensor]  # a tensor a task
    seconds: float | None = None  # RL, SVD, predictor and jump, wall

    @property
    def label(self) -> str:
        name = {"backbone": "Backbone", "grpo": "GRPO with LoRA"}.get(self.method) or NAMES.get(
            self.method.removesuffix("_merged"), self.method
        )
        name += ", merged restart" if self.method.endswith("_merged") else ""
        return name + (", right after the jump" if self.policy.startswith("extrapolated/") and self.method != "none" else "")


def load_results(run: pathlib.Path) -> dict[str, Result]:
    """Every evaluated policy of the run, by its path; the accuracy of several tasks is their plain mean, as in the paper."""
    found = {}
    for folder in sorted((run / "eval").glob("*")):
        tasks = [run_dir.read_json(path, "06_eval.py") for path in sorted(folder.glob("*.json"))]
        if not tasks:
            continue
        policy = tasks[0]["policy"]
        method, alpha, steps = "grpo", None, 0
        if policy != "backbone":
            steps = run_dir.read_json(run / policy / "checkpoint.json", "the stage that wrote this checkpoint")["step"]
            if match := re.fullmatch(r"(?:extrapolated|continued)/([^/]+?)(?:_alpha([\d.]+))?(_merged)?(?:/step_\d+)?", policy):
                method, alpha = match[1] + (match[3] or ""), float(match[2]) if match[2] else None
        else:
            method = "backbone"
        found[policy] = Result(
            policy,
            method,
            steps,
            alpha,
            accuracy=sum(t["accuracy"] for t in tasks) / len(tasks),
            error=math.sqrt(sum((t["standard_error"] or math.nan) ** 2 for t in tasks)) / len(tasks),
            n=sum(t["n"] for t in tasks),
            length=sum(t["response_length"] for t in tasks) / len(tasks),
            by_problem=[torch.tensor(t["by_problem"], dtype=torch.float64) for t in tasks],
        )
        found[policy].seconds = wall_seconds(run, found[policy])
    return found


def difference(a: Result, b: Result) -> tuple[float, float]:
    """Accuracy of a minus that of b and its standard error, paired by problem (both were sampled with the same seeds)."""
    gaps = [x - y for x, y in zip(a.by_problem, b.by_problem, strict=True)]
    return (sum(float(g.mean()) for g in gaps) / len(gaps), math.sqrt(sum(float(g.var()) / len(g) for g in gaps)) / len(gaps))


def rl_seconds(folder: pathlib.Path, last_step: int) -> float:
    """Wall seconds of the RL steps logged in `folder` up to `last_step`."""
    return sum(row["seconds"] for row in run_dir.read_jsonl(folder / "metrics.jsonl") if row["step"] <= last_step)


def overhead(run: pathlib.Path, recipe: str) -> dict[str, float]:
    """Wall seconds of what NExt adds to RL: the SVDs, the predictor's training (without its backtest), the jump."""
    jump = run / "extrapolated" / f"next-{recipe}_alpha{MAIN_ALPHA:g}" / "checkpoint.json"
    return {
        "SVD": run_dir.read_json(run / "deltas" / "done.json", "02_extract_deltas.py")["seconds"],
        "predictor": run_dir.read_json(run / "predictor" / recipe / "done.json", "03_train_predictor.py")["training_seconds"],
        "extrapolation": run_dir.read_json(jump, "04_extrapolate.py")["seconds"],
    }


def cost_bars(run: pathlib.Path, results: dict[str, Result]) -> dict[str, list[float]]:
    """Fig. 5's bars, label -> wall seconds of [RLVR, SVD, predictor, extrapolation]: NExt by each recipe, and the longest plain GRPO."""
    bars = {}
    for recipe in ("aligned", "paper"):
        for after in [r for r in results.values() if r.policy.startswith(f"continued/next-{recipe}_alpha{MAIN_ALPHA:g}/")][-1:]:
            extra = list(overhead(run, recipe).values())
            bars[f"NExt ({recipe}), {after.steps} steps"] = [after.seconds - sum(extra), *extra]
    plain = max((r for r in results.values() if r.method == "grpo"), key=lambda r: r.steps, default=None)
    if plain:
        bars[f"GRPO, {plain.steps} steps"] = [plain.seconds, 0.0, 0.0, 0.0]
    return bars


def wall_seconds(run: pathlib.Path, result: Result) -> float | None:
    """What it took to get this policy: the shared RL prefix, the method's own computing, the RL after the jump."""
    if result.method in ("backbone", "grpo"):
        return rl_seconds(run / "train", result.steps) if result.steps else 0.0
    jumped = result.policy.split("/")[1].removesuffix("_merged")
    info = run_dir.read_json(run / "extrapolated" / jumped / "checkpoint.json", "04_extrapolate.py")
    if info["method"] == "oracle":
        return None  # it looked into the future: no fair cost
    seconds = rl_seconds(run / "train", info["step"])
    if info["method"].startswith("next-"):
        seconds += sum(overhead(run, info["method"].removeprefix("next-")).values())
    if result.policy.startswith("continued/"):
        seconds += rl_seconds(run / "continued" / result.policy.split("/")[1], result.steps)
    return seconds


def table_rows(results: dict[str, Result]) -> list[Result]:
    """The rows of the main table: backbone, plain GRPO, then every method after the jump and after the RL that follows it."""
    last = max((r.steps for r in results.values() if r.policy.startswith("continued/")), default=0)
    order = {name: i for i, name in enumerate(["backbone", "grpo", *(x for n in NAMES for x in (n, n + "_merged"))])}
    rows = [
        r
        for r in results.values()
        if r.method in ("backbone", "grpo")
        or (r.alpha == MAIN_ALPHA and r.policy.startswith("extrapolated/"))
        or (r.policy.startswith("continued/") and r.steps == last)
    ]
    return sorted(
        rows, key=lambda r: (r.policy.startswith("continued/"), r.policy.startswith("extrapolated/"), order.get(r.method, 99), r.steps)
    )


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
    found = run_dir.read_json(run / "deltas" / "spectrum.json", "02_extract_deltas.py")
    energy, steps, fits = found["energy_ratio"], found["steps"], found["linear_fit"]
    early = next((i for i, step in enumerate(steps) if step >= steps[-1] / 3), len(steps) - 1)
    rises = "holds" if energy[early] > energy[0] else "does not hold"
    below = sum(row["held_out"] < 0 for row in fits) / len(fits)
    error = math.sqrt(below * (1 - below) / len(fits))
    in_sample = sorted(row["in_sample"] for row in fits)[len(fits) // 2]
    return [
        f"* Fig. 2, the rank-1 share of the update rises early in training: **{rises}**. E_1 is {energy[0]:.3f} at step {steps[0]}, "
        f"{energy[early]:.3f} at step {steps[early]} and {energy[-1]:.3f} at step {steps[-1]} "
        f"(mean of {len(found['energy_ratio_by_module'])} matrices).",
        f"* Fig. 3, a straight line fails on over half of the vectors: **{verdict(below - 0.5, error)}**. On checkpoints it was not "
        f"fitted on, {below:.0%} ± {error:.0%} of {len(fits)} vectors have an R² below 0; on those it was fitted on, the median R² is "
        f"{in_sample:.2f}.",
    ]


def claims(run: pathlib.Path, results: dict[str, Result]) -> list[tuple[str, ...]]:
    """What Sec. 5 says of NExt: (claim, cell for each recipe). Errors are over test problems, paired; there is one training seed."""
    before = f"train/step_{run_dir.read_json(run / 'deltas' / 'index.json', '02_extract_deltas.py')['steps'][-1]:04d}"
    longest = max((key for key in results if key.startswith("train/")), default="")
    total = max((r.steps for r in results.values() if r.policy.startswith("continued/")), default=0)
    rows: dict[str, list[str]] = {}
    for recipe in ("paper", "aligned"):
        name = f"next-{recipe}_alpha{MAIN_ALPHA:g}"
        after = f"continued/{name}/step_{total:04d}"
        cells = {
            "Table 5: the jump itself gains": compare(results, f"extrapolated/{name}", before),
            "Fig. 6: so does every alpha from 0.5 to 2.5": fig6(results, f"next-{recipe}", before),
            f"Tables 3, 4: at {total} steps better than GRPO": compare(results, after, f"train/step_{total:04d}"),
            f"Tables 3, 4: at {total} steps not worse than GRPO at {results[longest].steps if longest else '?'}": compare(
                results, after, longest, not_worse=True
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
            small, saved = extra / seconds, 1 - seconds / reference
            *_, cost_key, time_key = cells
            cells[cost_key] = f"**{'holds' if small < 0.05 else 'does not hold'}**: {extra:.1f} of {seconds:.0f} s, {small:.1%}"
            cells[time_key] = (
                f"**{'holds' if saved >= 0.35 else 'does not hold'}**: {seconds:.0f} against {reference:.0f} s, {saved:.1%} less"
            )
        for claim, cell in cells.items():
            rows.setdefault(claim, []).append(cell)
    return [(claim, *cells) for claim, cells in rows.items()]


def backtests(run: pathlib.Path) -> str:
    """Markdown: what each recipe's predictor is worth on a target it has not seen, beside the controls."""
    columns = ("predictor", "copy-global", "repeat-last", "linear-fit", "oracle")
    lines = ["| recipe | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for path in sorted((run / "predictor").glob("*/report.json")):
        tested = run_dir.read_json(path, "03_train_predictor.py")["backtest"]
        lines.append(
            f"| {path.parent.name} ({tested['at_step']} → {tested['predicts_step']}) | "
            + " | ".join(f"{tested[c]['cosine']:.3f}" for c in columns)
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
    if not (run / "deltas" / "done.json").is_file():
        run_dir.atomic_write_text(run / "report.md", f"# Results of {run.name}\n\n{table}\n")
        return f"\n{table}\n\nreport: {run / 'report.md'} (no figures before stage 2 has run)"
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
        "Accuracy in %, differences in points ± their paired standard error; a verdict needs two of them.",
        "",
        "| NExt, says the paper, is ... | published recipe | aligned recipe |",
        "|---|---|---|",
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
