"""The runs that one page is about, which of their policies may be compared, and the statistics.

A page is about one run directory, or about a grid of them (several seeds, several settings).
With one seed every error is over test problems, paired by problem where two policies are compared.
With several it is over seeds, paired by seed, with Student's 95% interval.
"""

import collections
import copy
import json
import pathlib
import statistics

from common.baselines.measures import cosine
from common.files import adapters, deltas
from common.files.read import read_json
from common.reproduce import results
from common.reproduce.estimates import Estimate, over_problems, over_seeds
from common.reproduce.results import Result

MAIN = "lora"  # the name of a grid's main run, and of a single one


class Runs:
    """results[seed][name][policy] of a run directory, or of a grid's runs.

    A single run is "lora". Runs below it at other learning rates have the names of their folders.

    prefix, total, reference: RL steps before the jump, after the RL that follows it, and of a plain
    run that is longer than both; 0 where no measured policy has them.
    left_out: policies that were made otherwise than the rest, and why, as lines for the page.
    """

    main = MAIN  # the folder of the main run

    def __init__(self, root: pathlib.Path, seeds: list[int] | None = None):
        self.root, self.seeds, self.is_grid = root, seeds or [0], seeds is not None
        one = len(self.seeds) == 1
        self.over, self.interval = ("problems", "[± 2 s.e.]") if one else ("seeds", "[95%]")
        self.counted = "seeds" if self.is_grid else "n"
        self.results: dict[int, dict[str, dict[str, Result]]] = {}
        for seed in self.seeds:
            top = root / f"seed{seed}"
            names = sorted(str(path.parent.relative_to(top)) for path in top.glob("**/eval"))
            slow = sorted(path.parent.name for path in root.glob("rate*/eval"))
            names = names if self.is_grid else [MAIN, *slow]
            self.results[seed] = {n: results.load_results(self.folder(seed, n)) for n in names}
        self.tasks, self.left_out = (), []
        if found := self.all():
            self._keep_alike(found)
        main = self.some().values()
        plain = max((r.steps for r in main if r.method == "grpo"), default=0)
        self.prefix = max((r.steps for r in main if r.jumped), default=plain)
        self.total = max((r.steps for r in main if r.policy.startswith("continued/")), default=0)
        self.reference = plain if plain > max(self.prefix, self.total) else 0

    def folder(self, seed: int, name: str = MAIN) -> pathlib.Path:
        top = self.root / f"seed{seed}" if self.is_grid else self.root
        name = self.main if name == MAIN else name
        return top / name if self.is_grid or name != MAIN else top

    def of(self, name: str) -> "Runs":
        """The same with the run `name`, such as one at another learning rate, as the main run."""
        other = copy.copy(self)
        other.main = name
        other.results = {s: by | {MAIN: by.get(name, {})} for s, by in self.results.items()}
        return other

    def all(self) -> list[tuple[int, str, Result]]:
        """(seed, name of the run, result) of everything that may be compared."""
        runs = [(seed, name, f) for seed, by in self.results.items() for name, f in by.items()]
        return [(seed, name, result) for seed, name, f in runs for result in f.values()]

    def _keep_alike(self, found: list[tuple[int, str, Result]]) -> None:
        """Keeps what was measured on the same problems with the same options, and trained alike."""
        why, trained = collections.defaultdict(list), {}
        for task in sorted({task for *_, r in found for task in r.records}):
            having = [r for *_, r in found if task in r.records]
            ways = [json.dumps(measured(r.records[task]), sort_keys=True) for r in having]
            usual = json.loads(statistics.mode(ways))
            for r in having:
                if odd := differing(measured(r.records[task]), usual):
                    del r.records[task]
                    why[id(r)].append(f"measured {odd}")
        # The accuracy is the mean of one suite, over those tasks of it on which most were measured:
        # the first suite on which half were measured, else the one on which most were.
        sets = [[t for *_, r in found if (t := r.of_suite(suite))] for suite in results.SUITES]
        self.tasks = statistics.mode(max(sets, key=lambda tasks: min(len(tasks), len(found) / 2)))
        for seed, name, r in found:
            reasons, r.tasks = why[id(r)], self.tasks
            missing = [task for task in self.tasks if task not in r.records]
            if missing and not reasons:
                reasons.append(f"not measured on {', '.join(missing)}")
            usual = trained.setdefault(name, r.trained) if r.trained else {}
            if not missing and (odd := differing(r.trained, usual)):
                reasons.append(f"{100 * r.accuracy:.1f}%, trained {odd}")
            if reasons:
                del self.results[seed][name][r.policy]
                run = f"seed{seed}/{name}/" if self.is_grid else ""
                self.left_out.append(f"{run}{r.policy}: {'; '.join(dict.fromkeys(reasons))}")

    def step(self, step: int) -> str:
        return f"train/step_{step:04d}"

    def after(self, start: str) -> str:
        return f"continued/{start}/step_{self.total:04d}"

    @property
    def before(self) -> str:
        """The policy from which all jump. For another trainer's it is `none`, its equal."""
        plain, none = self.step(self.prefix), "extrapolated/none"
        return none if none in self.some() and plain not in self.some() else plain

    def get(self, policy: str, name: str = MAIN) -> dict[int, Result]:
        """This policy's result by seed; the backbone's once, as it is the same for all."""
        having = [seed for seed in self.seeds if policy in self.results[seed].get(name, {})]
        having = having[:1] if policy == "backbone" else having
        return {seed: self.results[seed][name][policy] for seed in having}

    def some(self, name: str = MAIN) -> dict[str, Result]:
        """Every policy that any seed of the run `name` has, with one of its results."""
        return {r.policy: r for _, run, r in self.all() if run == name}

    def count(self, policy: str, name: str = MAIN) -> str:
        """How many seeds of a grid have it; of one run the number of responses."""
        found = self.get(policy, name)
        return str(len(found) if self.is_grid else sum(r.n for r in found.values()))

    def accuracy(self, policy: str, name: str = MAIN) -> Estimate | None:
        found = [*self.get(policy, name).values()]
        if found and len(self.seeds) > 1:
            return over_seeds([r.accuracy for r in found])
        return over_problems(found[0]) if found else None

    def pairs(self, a: str, b: str, name: str = MAIN, other: str = "") -> dict[int, tuple]:
        """Seed -> the results of a in the run `name` and of b in `other`, by default the same."""
        first, second = self.get(a, name), self.get(b, other or name)
        return {seed: (first[seed], second[seed]) for seed in first if seed in second}

    def difference(self, a: str, b: str, name: str = MAIN, other: str = "") -> Estimate | None:
        """Accuracy of a in the run `name` minus that of b in `other`, by default the same run."""
        pairs = [*self.pairs(a, b, name, other).values()]
        if pairs and len(self.seeds) > 1:
            return over_seeds([x.accuracy - y.accuracy for x, y in pairs])
        return over_problems(*pairs[0]) if pairs else None

    def spectra(self, name: str = MAIN) -> list[dict]:
        """Stage 2's spectrum.json of the run `name`, of each seed that has it."""
        paths = [self.folder(seed, name) / "deltas" / "spectrum.json" for seed in self.seeds]
        return [read_json(path, deltas.STAGE) for path in paths if path.is_file()]

    def predictor_reports(self, name: str = MAIN) -> dict[str, dict[int, dict]]:
        """Stage 3's report.json of each predictor: recipe -> seed -> report."""
        found = collections.defaultdict(dict)
        kinds = {"losses": dict, "loss_of_zeros": dict, "loss_stride": int, "backtest": dict | None}
        for seed in self.seeds:
            for path in sorted(self.folder(seed, name).glob("predictor/*/report.json")):
                report = read_json(path, "03_train_predictor.py", kinds)
                found[path.parent.name][seed] = report
        return found

    def cosines(self, method: str, name: str = MAIN) -> dict[int, float]:
        """Seed -> the cosine of what `method` predicts with a true delta that it has not seen."""
        reports, row = self.predictor_reports(name), method
        found = next(iter(reports.values()), {})  # a control stands in every report
        if method.startswith("next-"):
            row, found = "predictor", reports.get(method.removeprefix("next-"), {})
        tested = {seed: report["backtest"] or {} for seed, report in found.items()}
        return {seed: rows[row]["cosine"] for seed, rows in tested.items() if row in rows}

    def backtest(self, method: str, name: str = MAIN) -> Estimate | None:
        values = [*self.cosines(method, name).values()]
        return over_seeds(values) if values else None

    def jump_cosines(self) -> dict[str, Estimate]:
        """Policy -> cosine of W_hat - W_c with the true W_(c+k) - W_c, mean over the matrices."""
        found = collections.defaultdict(list)
        runs = [self.folder(seed) for seed in self.seeds]
        for run in [run for run in runs if (run / "deltas" / "index.json").is_file()]:
            index = deltas.read_index(run / "deltas")
            c, every = index["steps"][-1], index["steps"][-1] - index["steps"][-2]
            ends = [run / self.step(step) for step in (c, c + index["k"] * every)]
            if not all(map(adapters.is_adapter, ends)):
                continue
            last, future = map(adapters.read_adapter, ends)
            true = {m: future.update(m) - last.update(m) for m in last.factors}
            for path in filter(adapters.is_adapter, sorted((run / "extrapolated").glob("[!.]*"))):
                jumped = adapters.read_adapter(path)
                values = [cosine(jumped.update(m) - last.update(m), true[m]) for m in true]
                if values := [value for value in values if value == value]:  # nan: nothing moved
                    found[f"extrapolated/{path.name}"].append(statistics.fmean(values))
        return {policy: over_seeds(values) for policy, values in found.items()}


def measured(record: dict) -> dict:
    """What decides a result of stage 6: its options, the prompt's template, the problems."""
    data = f"{record.get('data')}, {len(record['by_problem'])} problems"
    template = record.get("template_hash")
    return {**(record.get("settings") or {}), "template_hash": template, "data": data}


def differing(options: dict, usual: dict) -> str:
    """`with temperature 0.5 (the others: 1.0)` for what differs of the options that both have."""
    keys = sorted(k for k in options.keys() & usual.keys() if None not in (options[k], usual[k]))
    odd = [key for key in keys if options[key] != usual[key]]
    parts = [f"{key} {options[key]!r} (the others: {usual[key]!r})" for key in odd]
    return f"with {', '.join(parts)}" if odd else ""
