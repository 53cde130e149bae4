"""The runs that one page is about, which of their policies may be compared, and the statistics.

A page is about one run directory, or about a grid of them (several seeds, several settings).
With one seed every error is over test problems, paired by problem where two policies are compared.
With several it is over seeds, paired by seed, with Student's 95% interval.
"""

import collections
import copy
import dataclasses
import json
import pathlib
import statistics

from common.baselines.measures import cosine
from common.files import adapters, deltas
from common.files.read import read_json
from common.reproduce.estimates import Estimate, over_problems, over_seeds
from common.reproduce.results import MAIN_ALPHA, Result, load_results, place
from common.rl.benchmarks import SUITES

MAIN = "lora"  # the name of a grid's main run, and of a single one


class Measured:
    """One policy of one run as each seed measured it. False where none did.

    Its method, label, steps and so on are those of a Result: they are the same for all seeds.
    """

    def __init__(self, policy: str, several: bool = False):
        self.policy, self.several = policy, several  # several seeds on the page
        self.by_seed: dict[int, Result] = {}

    def __bool__(self) -> bool:
        return bool(self.by_seed)

    def __getattr__(self, name: str):
        return getattr([*self.by_seed.values()][-1], name)

    @property
    def accuracy(self) -> Estimate:
        found = [*self.by_seed.values()]
        if found and not self.several:
            return over_problems(found[0].scores)
        return over_seeds([r.accuracy for r in found])

    def gaps(self, other: "Measured") -> dict[int, float]:
        """Seed -> the difference of the accuracies, of the seeds that both have."""
        both = [seed for seed in self.by_seed if seed in other.by_seed and self is not other]
        return {s: self.by_seed[s].accuracy - other.by_seed[s].accuracy for s in both}

    def __sub__(self, other: "Measured") -> Estimate:
        """The mean difference of the accuracies, paired by seed; of one seed by problem."""
        gaps = self.gaps(other)
        if gaps and not self.several:
            ((a, b),) = ((self.by_seed[seed].scores, other.by_seed[seed].scores) for seed in gaps)
            return over_problems([x - y for x, y in zip(a, b, strict=True)])
        return over_seeds([*gaps.values()])

    def on(self, tasks: list[str]) -> "Measured":
        """The same on other tasks, of the seeds that have all of them."""
        other, wanted = Measured(self.policy, self.several), {*tasks}
        having = {s: r for s, r in self.by_seed.items() if wanted and wanted <= r.records.keys()}
        other.by_seed = {s: dataclasses.replace(r, tasks=(*tasks,)) for s, r in having.items()}
        return other

    def level(self) -> str:
        """Its accuracy in a table."""
        return self.accuracy.plain(100, 1)


class Runs:
    """What was measured of a run directory, or of a grid's runs: of one of its runs at a time.

    A single run is "lora". Runs below it at other learning rates have the names of their folders.

    prefix, total, reference: RL steps before the jump, after the RL that follows it, and of a plain
    run that is longer than both; 0 where no measured policy has them.
    left_out: a line for each policy that was made otherwise. beside: other models, for Figs. 5, 7.
    """

    name = MAIN  # the run that the methods speak of; `of` gives the others

    def __init__(self, root: pathlib.Path, seeds: list[int] | None = None, beside=()):
        self.root, self.seeds, self.is_grid = root, seeds or [0], seeds is not None
        several = len(self.seeds) > 1
        self.over, self.interval = ("seeds", "[95%]") if several else ("problems", "[± 2 s.e.]")
        self.counted = "seeds" if self.is_grid else "n"  # the column that `count` fills
        found = []
        for seed in self.seeds:
            names = [MAIN, *sorted(path.parent.name for path in root.glob("rate*/eval"))]
            if self.is_grid:
                top = root / f"seed{seed}"
                names = sorted(str(path.parent.relative_to(top)) for path in top.glob("**/eval"))
            for name in names:
                made = load_results(self.of(name).folder(seed)).values()
                found += [dataclasses.replace(result, seed=seed, run=name) for result in made]
        self.tasks, self.left_out, self.beside = (), [], [*beside]
        self.all = self._alike(found) if found else []
        self.measured: dict[tuple[str, str], Measured] = {}
        for r in self.all:
            one = self.measured.setdefault((r.run, r.policy), Measured(r.policy, several))
            if r.policy != "backbone" or not one:  # it is the same for all seeds
                one.by_seed[r.seed] = r
        plain = max((m.steps for m in self.plain()), default=0)
        self.total = max((m.steps for m in self.ended()), default=0)
        jumped = [m.steps for m in self.some() if m.jumped]
        self.prefix = max(jumped, default=0 if self.total else plain)
        self.reference = plain if plain > max(self.prefix, self.total) else 0

    def folder(self, seed: int) -> pathlib.Path:
        top = self.root / f"seed{seed}" if self.is_grid else self.root
        return top / self.name if self.is_grid or self.name != MAIN else top

    def of(self, name: str) -> "Runs":
        """The same of the run `name`; without a name this one."""
        other = copy.copy(self)
        other.name = name or self.name
        return other

    def _alike(self, found: list[Result]) -> list[Result]:
        """What was measured on the same problems with the same options, and trained alike."""
        why = collections.defaultdict(list)  # the id of a result -> what is odd about it
        # Stage 1's options, of the first seed; without its policies those of stage 5.
        order = sorted(found[::-1], key=lambda r: not r.policy.startswith("continued/"))
        trained = {r.run: r.trained for r in order if r.trained}
        for task in sorted({task for r in found for task in r.records}):
            having = [r for r in found if task in r.records]
            ways = [json.dumps(way_of(r.records[task]), sort_keys=True) for r in having]
            usual = json.loads(statistics.mode(ways))
            for r in having:
                if odd := differing(way_of(r.records[task]), usual):
                    del r.records[task]
                    why[id(r)].append(f"measured {odd}")
        # The accuracy is the mean of one suite, over those tasks of it on which most were measured:
        # the first suite on which half were measured, else the one on which most were.
        sets = [[t for r in found if (t := r.of_suite(suite))] for suite in SUITES]
        self.tasks = statistics.mode(max(sets, key=lambda tasks: min(len(tasks), len(found) / 2)))
        for r in found:
            reasons, r.tasks = why[id(r)], self.tasks
            missing = [task for task in self.tasks if task not in r.records]
            if missing and not reasons:
                reasons.append(f"not measured on {', '.join(missing)}")
            if not missing and (odd := differing(r.trained, trained.get(r.run, {}))):
                reasons.append(f"{100 * r.accuracy:.1f}%, trained {odd}")
            if reasons:
                run = f"seed{r.seed}/{r.run}/" if self.is_grid else ""
                self.left_out.append(f"{run}{r.policy}: {'; '.join(dict.fromkeys(reasons))}")
        return [r for r in found if not why[id(r)]]

    def get(self, policy: str) -> Measured:
        return self.measured.get((self.name, policy), Measured(policy))

    def at(self, step: int) -> Measured:
        """The checkpoint of the run without a jump, ours or another trainer's."""
        ours = self.get(f"train/step_{step:04d}")
        return ours or next((m for m in self.plain() if m.steps == step), ours)

    def jump(self, method: str, alpha: float = MAIN_ALPHA) -> Measured:
        return self.get(f"extrapolated/{method}_alpha{alpha:g}")

    def later(self, method: str, alpha: float = MAIN_ALPHA, made: str = "") -> Measured:
        """What RL made of a jump. made: "_merged" of a merged restart."""
        return self.get(f"continued/{method}_alpha{alpha:g}{made}/step_{self.total:04d}")

    @property
    def before(self) -> Measured:
        """The policy from which all jump, or `none`, its equal."""
        return self.at(self.prefix) or self.get("extrapolated/none")

    def some(self) -> list[Measured]:
        """Every policy that any seed has."""
        return [found for (name, _), found in self.measured.items() if name == self.name]

    def plain(self) -> list[Measured]:
        """What was measured of the run without a jump, by step."""
        return sorted((m for m in self.some() if m.method == "grpo"), key=lambda m: m.steps)

    def ended(self) -> list[Measured]:
        """The last policy of each start of stage 5, in the order of the tables."""
        found = [m for m in self.some() if m.policy.startswith("continued/")]
        last = {m.policy.split("/")[1]: m for m in sorted(found, key=lambda m: m.steps)}
        return sorted(last.values(), key=place)

    def count(self, found: Measured) -> str:
        """How many seeds of a grid have it; of one run the number of responses."""
        return str(sum(1 if self.is_grid else r.n for r in found.by_seed.values()))

    def spectra(self) -> dict[int, dict]:
        """Seed -> stage 2's spectrum.json, where there is one."""
        paths = {seed: self.folder(seed) / "deltas" / "spectrum.json" for seed in self.seeds}
        return {s: read_json(path, deltas.STAGE) for s, path in paths.items() if path.is_file()}

    def predictor_reports(self) -> dict[str, dict[int, dict]]:
        """Stage 3's report.json of each predictor: recipe -> seed -> report."""
        found = collections.defaultdict(dict)
        kinds = {"losses": dict, "loss_of_zeros": dict, "loss_stride": int, "backtest": dict | None}
        for seed in self.seeds:
            for path in sorted(self.folder(seed).glob("predictor/*/report.json")):
                found[path.parent.name][seed] = read_json(path, "03_train_predictor.py", kinds)
        return found

    def cosines(self, method: str) -> dict[int, float]:
        """Seed -> the cosine of what `method` predicts with a true delta that it has not seen."""
        reports, row = self.predictor_reports(), method
        found = next(iter(reports.values()), {})  # a control stands in every report
        if method.startswith("next-"):
            row, found = "predictor", reports.get(method.removeprefix("next-"), {})
        tested = {seed: report["backtest"] or {} for seed, report in found.items()}
        return {seed: rows[row]["cosine"] for seed, rows in tested.items() if row in rows}

    def backtest(self, method: str) -> Estimate:
        return over_seeds([*self.cosines(method).values()])

    def jump_cosines(self) -> dict[str, Estimate]:
        """Policy -> cosine of W_hat - W_c with the true W_(c+k) - W_c, mean over the matrices."""
        found = collections.defaultdict(list)
        runs = [self.folder(seed) for seed in self.seeds]
        for run in [run for run in runs if (run / "deltas" / "index.json").is_file()]:
            index = deltas.read_index(run / "deltas")
            c, every = index["steps"][-1], index["steps"][-1] - index["steps"][-2]
            ends = [run / self.at(step).policy for step in (c, c + index["k"] * every)]
            if not all(map(adapters.is_adapter, ends)):
                continue
            last, future = map(adapters.read_adapter, ends)
            true = {m: future.update(m) - last.update(m) for m in last.factors}
            for path in filter(adapters.is_adapter, sorted((run / "extrapolated").glob("[!.]*"))):
                jumped = adapters.read_adapter(path)
                values = [cosine(jumped.update(m) - last.update(m), true[m]) for m in true]
                if values := [x for x in values if x == x]:  # nan: nothing moved
                    found[f"extrapolated/{path.name}"].append(statistics.fmean(values))
        return {policy: over_seeds(values) for policy, values in found.items()}


def way_of(record: dict) -> dict:
    """What decides a result of stage 6: its options, the prompt's template, the problems."""
    known = {key: record.get(key) for key in ("dtypes", "template_hash")}
    data = f"{record.get('data')}, {len(record['by_problem'])} problems"
    return {**(record.get("settings") or {}), **known, "data": data}


def differing(options: dict, usual: dict) -> str:
    """`with temperature 0.5 (the others: 1.0)` for what differs of the options that both have."""
    keys = sorted(k for k in options.keys() & usual.keys() if None not in (options[k], usual[k]))
    odd = [key for key in keys if options[key] != usual[key]]
    parts = [f"{key} {options[key]!r} (the others: {usual[key]!r})" for key in odd]
    return f"with {', '.join(parts)}" if odd else ""
