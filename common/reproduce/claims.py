"""What the paper says of NExt, and what the runs say: a verdict and its numbers for each claim.

A claim whose policies were not measured gets no verdict: the page names it as not measured.
"""

import statistics

from common.reproduce.estimates import Estimate, over_seeds
from common.reproduce.results import label_of, table_of
from common.reproduce.runs import Measured, Runs
from common.reproduce.tables import RECIPES, table

FIG6 = (0.5, 1.0, 1.5, 2.0, 2.5)  # the alphas of which Fig. 6 says that each gains
CHEAP = 0.05  # Fig. 5: the share of the wall time that is "next to nothing"


def page(runs: Runs) -> str:
    """All claims as markdown, and the names of those that were not measured."""
    columns = [column(runs, method) for method in RECIPES]
    rows = {claim: [cells[claim] for cells in columns] for claim in columns[0]}
    measured = [[claim, *(c or "–" for c in row)] for claim, row in rows.items() if any(row)]
    missing = "; ".join(claim for claim, row in rows.items() if not any(row))
    header = ["the paper's claim of NExt, or a control", *map(label_of, RECIPES)]
    text = [section3(runs), table(header, measured).replace("--:", "---")]
    text.append(f"Not measured: {missing}." if missing else "")
    return "\n\n".join(part for part in text if part) if any(text[:2]) else ""


def column(runs: Runs, method: str) -> dict[str, str]:
    """Claim -> verdict and numbers on the runs of `method`, or an empty cell."""
    longer, cells = f"GRPO at {runs.reference}" if runs.reference else "a longer run of GRPO", {}
    jump, later, grpo = runs.jump(method), runs.later(method), runs.at(runs.total)
    longest = runs.at(runs.reference)
    names = {
        **{"method": method, "jump": jump.policy, "later": later.policy, "grpo": grpo.policy},
        **{"before": runs.before.policy, "longest": longest.policy, "longer": longer},
        "end": f"step_{runs.total:04d}",
        "at": f"at {runs.total} steps" if runs.total else "after more RL",
    }
    for texts in table_of("claims.yaml"):
        claim, a, b, *names_of_runs = (text.format(**names) for text in texts)
        first, second = map(runs.of, names_of_runs or ("", ""))
        cells[claim] = judged(first.get(a) - second.get(b), "not worse" in claim)
    alphas = ", ".join(f"{alpha:g}" for alpha in FIG6)
    cells[f"Fig. 6: the jump gains at every alpha of {alphas}"] = every_alpha(runs, method)
    cells["Table 5: the jump gains more than w/o LoRA"] = judged(gain_over_full(runs, method))
    cells[f"Fig. 5: what is not RL takes under {CHEAP:.0%} of the time"] = overhead(later)
    saved = time_saved(later, longest)
    cells[f"Fig. 5: less time than {longer} (the paper: 37.5% less)"] = saved
    return dict(sorted(cells.items(), key=lambda cell: cell[0].startswith("(")))


def judged(found: Estimate, not_worse: bool = False) -> str:
    return f"**{found.verdict(not_worse)}**: {found.points()}" if found else ""


def every_alpha(runs: Runs, method: str) -> str:
    """Fig. 6 says something of every alpha: nothing is said unless all were measured."""
    gaps = {alpha: runs.jump(method, alpha) - runs.before for alpha in FIG6}
    if not all(gaps.values()):
        return ""
    verdicts = {gap.verdict() for gap in gaps.values()}
    worst = next(v for v in ("does not hold", "undecided", "holds") if v in verdicts)
    return f"**{worst}**: " + ", ".join(f"{gap.points()} at {a:g}" for a, gap in gaps.items())


def gain_over_full(runs: Runs, method: str) -> Estimate:
    """The gain of the jump with LoRA minus its gain with full parameters, seed by seed."""
    found = [m.by_seed for r in (runs, runs.of("full")) for m in (r.jump(method), r.at(r.prefix))]
    seeds = [seed for seed in runs.seeds if all(seed in by_seed for by_seed in found)]
    levels = [[by_seed[seed].accuracy for by_seed in found] for seed in seeds]
    return over_seeds([(lora - before) - (full - start) for lora, before, full, start in levels])


def overhead(found: Measured) -> str:
    """The share of the wall time that a method adds to RL."""
    results = [r for r in found.by_seed.values() if r.seconds]
    if not results:
        return ""
    own = statistics.fmean(r.seconds - r.spent["RL"] for r in results)
    whole = statistics.fmean(r.seconds for r in results)
    verdict = "holds" if own < CHEAP * whole else "does not hold"
    return f"**{verdict}**: {own:.1f} of {whole:.0f} s, {own / whole:.1%}"


def time_saved(found: Measured, plain: Measured) -> str:
    """The wall time of a method beside that of the longest plain run."""
    times = [{s: r.seconds for s, r in m.by_seed.items() if r.seconds} for m in (found, plain)]
    seeds = times[0].keys() & times[1].keys()
    if not seeds:
        return ""
    seconds, reference = (statistics.fmean(by_seed[s] for s in seeds) for by_seed in times)
    verdict, word = ("holds", "less") if seconds < reference else ("does not hold", "more")
    share = abs(1 - seconds / reference)
    return f"**{verdict}**: {seconds:.0f} against {reference:.0f} s, {share:.1%} {word}"


def level(by_seed: list[list[float]]) -> Estimate:
    """The mean of one list of values a seed; of one seed alone with the error over its values."""
    # A matrix that did not move has no E_1: nan. At a first step without a reward none moves.
    by_seed = [[value for value in values if value == value] for values in by_seed]
    by_seed = [values for values in by_seed if values] or [[float("nan")]]
    if len(by_seed) > 1:
        return over_seeds([statistics.fmean(values) for values in by_seed])
    (values,) = by_seed
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(statistics.fmean(values), error, 2 * error)


def section3(runs: Runs) -> str:
    """What Sec. 3 says of the trajectory. Of one seed the errors are over matrices, and vectors."""
    lora, full = runs.spectra(), runs.of("full").spectra()
    if not lora:
        return ""
    steps = next(iter(lora.values()))["steps"]
    early = next((i for i, step in enumerate(steps) if step >= steps[-1] / 3), len(steps) - 1)

    def ratios(found: dict[int, dict], i: int) -> dict[int, list[float]]:
        return {s: [e[i] for e in x["energy_ratio_by_module"].values()] for s, x in found.items()}

    def verdict(a: dict[int, list[float]], b: dict[int, list[float]]) -> str:
        pairs = [zip(a[seed], b[seed], strict=True) for seed in a if seed in b]
        return level([[x - y for x, y in pair] for pair in pairs]).verdict()

    def shown(found: dict[int, dict]) -> str:
        levels = {steps[i]: level([*ratios(found, i).values()]) for i in (0, early, -1)}
        return ", ".join(f"{one.plain()} at step {step}" for step, one in levels.items())

    rise = verdict(ratios(lora, early), ratios(lora, 0))
    text = "* Fig. 2, the rank-1 share E_1 of the update rises early in training: "
    text += f"**{rise}**. It is {shown(lora)}.\n"
    if full:
        higher = verdict(ratios(lora, -1), ratios(full, -1))
        text += f"* Fig. 2, it is higher with LoRA: **{higher}**. Without, {shown(full)}.\n"
    lines = [one["linear_fit"] for one in lora.values()]
    share = level([[float(row["held_out"] < 0) for row in rows] for rows in lines])
    half = Estimate(share.mean - 0.5, share.error, share.half).verdict()
    inside = statistics.median(row["in_sample"] for rows in lines for row in rows)
    text += f"* Fig. 3, a straight line fails on over half of the vectors: **{half}**. "
    text += f"On checkpoints that it was not fitted on, {share.plain(100, 1)}% of the vectors "
    text += "have an R² below 0: worse than a constant, their mean. "
    return f"{text}On those that it was fitted on, the median R² is {inside:.2f}."
