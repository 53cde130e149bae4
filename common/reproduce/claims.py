"""What the paper says of NExt, and what the runs say: a verdict and its numbers for each claim.

A claim whose policies were not measured gets no verdict: the page names it as not measured.
"""

import statistics

from common.reproduce.estimates import Estimate, over_seeds
from common.reproduce.results import label_of, table_of
from common.reproduce.runs import Measured, Runs
from common.reproduce.tables import RECIPES, table

FIG6 = (0.5, 1.0, 1.5, 2.0, 2.5)  # the alphas of which Fig. 6 says that each gains
VERDICTS = ("holds", "undecided", "does not hold")  # the worst last
CHEAP = 0.05  # Fig. 5: the share of the wall time that is "next to nothing"
NOISE = 0.1  # the share by which wall times differ from one run to the next


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
    cells, later, longest = {}, runs.later(method), runs.at(runs.reference)
    longer = f"GRPO at {runs.reference}" if runs.reference else "a longer run of GRPO"
    names = {"method": method, "jump": runs.jump(method).policy, "later": later.policy}
    names |= {"before": runs.before.policy, "grpo": runs.at(runs.total).policy}
    names |= {"longest": longest.policy, "longer": longer, "end": f"step_{runs.total:04d}"}
    names["at"] = f"at {runs.total} steps" if runs.total else "after more RL"
    for texts in table_of("claims.yaml"):
        claim, a, b, *names_of_runs = (text.format(**names) for text in texts)
        first, second = map(runs.of, names_of_runs or ("", ""))
        cells[claim] = judged(first.get(a) - second.get(b), "not worse" in claim)
    # Nothing is said unless all were measured. The worst verdict counts.
    gaps = [runs.jump(method, alpha) - runs.before for alpha in FIG6]
    worst = lambda gap: (-VERDICTS.index(gap.verdict()), gap.mean)  # noqa: E731
    least = min(gaps, key=worst) if all(gaps) else Estimate()
    alphas = ", ".join(f"{alpha:g}" for alpha in FIG6)
    cells[f"Fig. 6: the jump gains at every alpha of {alphas}; the least"] = judged(least)
    cells[f"Fig. 5: what is not RL takes under {CHEAP:.0%} of the time"] = overhead(later)
    saved = time_saved(later, longest)
    cells[f"Fig. 5: less time than {longer} (the paper: 37.5% less)"] = saved
    return dict(sorted(cells.items(), key=lambda cell: cell[0].startswith("(")))


def judged(found: Estimate, not_worse: bool = False) -> str:
    return f"**{found.verdict(not_worse)}**: {found.points()}" if found else ""


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
    verdict = verdict if share > NOISE else "undecided"
    return f"**{verdict}**: {seconds:.0f} against {reference:.0f} s, {share:.1%} {word}"


def section3(runs: Runs) -> str:
    """What Sec. 3 says of the trajectory. E_1 is a mean over matrices. One seed has no verdict."""
    lora, full = runs.spectra(), runs.of("full").spectra()
    if not lora:
        return ""
    steps = next(iter(lora.values()))["steps"]
    early = next(i for i, step in enumerate(steps) if step >= steps[-1] / 3)
    ratios = {seed: one["energy_ratio"] for seed, one in lora.items()}
    others = {seed: one["energy_ratio"] for seed, one in full.items()}

    def verdict(values: list[float]) -> str:
        return f" **{over_seeds(values).verdict()}**:" if len(values) > 1 else ""

    def shown(by_seed: dict[int, list[float]]) -> str:
        levels = {steps[i]: over_seeds([e[i] for e in by_seed.values()]) for i in (0, early, -1)}
        return ", ".join(f"{one.plain()} at step {step}" for step, one in levels.items())

    rise = verdict([e[early] - e[0] for e in ratios.values()])
    text = "* Fig. 2, the rank-1 share E_1 of the update rises early in training:"
    text += f"{rise} it is {shown(ratios)}.\n"
    if gaps := [ratios[seed][-1] - e[-1] for seed, e in others.items() if seed in ratios]:
        text += f"* Fig. 2, it is higher with LoRA:{verdict(gaps)} without, {shown(others)}.\n"
    lines = [one["linear_fit"] for one in lora.values()]
    shares = [statistics.fmean(row["held_out"] < 0 for row in rows) for rows in lines]
    half = verdict([share - 0.5 for share in shares])
    inside = statistics.median(row["in_sample"] for rows in lines for row in rows)
    below = over_seeds(shares).plain(100, 1)
    text += f"* Fig. 3, a straight line fails on over half of the vectors:{half} on checkpoints "
    text += f"that it was not fitted on, {below}% of the vectors have an R² below 0, worse than a "
    return f"{text}constant, their mean. On those it was fitted on, the median is {inside:.2f}."
