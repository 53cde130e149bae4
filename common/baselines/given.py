"""What some methods must be given beside the deltas: the future, measured accuracies.

`future`, `accuracies` and `soup` take what stage 4 knows. They return (a function that gets it, the
files it comes from): what takes long is done only for a jump that is not there yet.
"""

import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterable

import torch

from common import UserError
from common.files import adapters, deltas, merge, series, write
from common.files.models import weights_hash
from common.files.read import read_json
from common.files.stage import within
from common.rl.benchmarks import suite_of

MEASURED = {"accuracy": float, "data": str, "settings": dict, "weights": str}  # by stage 6
OF_SEVERAL = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # set where a process is one of several


@dataclasses.dataclass
class Known:
    """What stage 4 knows when it jumps."""

    cfg: object  # its options
    run: pathlib.Path
    series: series.Series
    trajectory: deltas.Trajectory


def future(known: Known):
    """A function module -> W of the checkpoint k after the last one."""
    steps, k = known.trajectory.steps, known.trajectory.k
    ahead = steps[0] * (len(steps) + k)
    kinds = {"config": {"checkpoints": list[str]}}
    done = read_json(known.run / "deltas" / "done.json", deltas.STAGE, kinds)
    found = series.find_checkpoints(done["config"]["checkpoints"], str(known.run))
    if ahead not in found:
        raise UserError(f"oracle needs the checkpoint of step {ahead}: train on with more --steps")

    def get():
        one = series.open_series({ahead: found[ahead]}, known.series.backbone, str(known.run))
        return lambda module: one.weights(module)[1]

    return get, sorted(found[ahead].glob("*.safetensors"))


def measuring(cfg, policies: str) -> list[str]:
    """Stage 6's flags for measuring policies on validation problems."""
    flags = ["--config", cfg.config] if cfg.config else []
    flags += ["--run-dir", cfg.run_dir, "--policies", policies]
    return [*flags, "--test-data", *cfg.validation_data, "--output", "validation"]


def measured(known: Known, policies: Iterable[str] = ()) -> tuple[dict, list[pathlib.Path]]:
    """What stage 6 wrote to <run>/validation: policy -> a row for each task; and the files. Without
    `policies`: of every checkpoint. Raises UserError where one was not measured, or not like the
    others, or where its weights have changed since then."""
    rows, files, ways, folder = {}, [], [], known.run / "validation"
    for policy in policies or [within(path, known.run) for path in known.series.paths.values()]:
        if pathlib.Path(policy).is_absolute():
            raise UserError(f"{policy}: to choose by accuracy, have the checkpoints in {known.run}")
        if not (read := sorted((folder / policy.replace("/", "__")).glob("*.json"))):
            pattern = str(pathlib.PurePath(policy).with_name("*"))
            line = shlex.join(["python", "06_eval.py", *measuring(known.cfg, pattern)])
            raise UserError(f"{policy} has no measured accuracy in {folder}: run {line}")
        rows[policy] = [read_json(file, "06_eval.py", MEASURED) for file in read]
        files += read
        if len(suites := sorted({suite_of(file.stem) for file in read})) > 1:
            raise UserError(f"validation: {' and '.join(suites)} have no common mean, measure one")
        ways.append([(row["data"], row["settings"], row.get("dtypes")) for row in rows[policy]])
        if ways[-1] != ways[0]:
            raise UserError(f"validation: {policy} was measured otherwise (problems or options)")
        if any(row["weights"] != weights_hash(known.run / policy) for row in rows[policy]):
            raise UserError(f"validation: {policy} has changed, measure it again with stage 6")
    return rows, files


def mean(rows: list[dict]) -> float:
    """The plain mean over tasks."""
    return sum(row["accuracy"] for row in rows) / len(rows)


def best_alpha(known: Known, jumps: dict[str, float]) -> float | None:
    """Of jumps (folder of extrapolated/ or merged/ -> alpha) the alpha that is best on validation
    problems, None where none is better than `none`. Raises UserError as `measured` does."""
    alphas = {}
    for name, alpha in {"none": None, **jumps}.items():
        is_adapter = adapters.is_adapter(known.run / "extrapolated" / name)
        alphas[f"{'extrapolated' if is_adapter else 'merged'}/{name}"] = alpha
    rows, _ = measured(known, alphas)
    return alphas[max(alphas, key=lambda policy: mean(rows[policy]))]  # of equals the first


def accuracies(known: Known):
    """The accuracy of every checkpoint on validation problems [c]."""
    rows, files = measured(known)
    found = torch.tensor([mean(tasks) for tasks in rows.values()], dtype=torch.float64)
    return lambda: found, files


def soup(known: Known):
    """The checkpoints of a greedy soup [positions in W], see `choose`."""
    rows, files = measured(known)
    return lambda: choose(known, rows), files


def choose(known: Known, rows: dict[str, list[dict]]) -> list[int]:
    """From the best checkpoint down, each is taken if the accuracy of the mean rises."""
    settings = next(iter(rows.values()))[0]["settings"]
    accuracy = [mean(tasks) for tasks in rows.values()]
    first, *others = sorted(range(1, len(accuracy) + 1), key=lambda i: -accuracy[i - 1])
    chosen, best = [first], accuracy[first - 1]
    for number, i in enumerate(others, 1):
        found = measure_mean(known, [*chosen, i], f"validation/candidate_{number:02d}", settings)
        if found > best:
            chosen, best = [*chosen, i], found
    return chosen


def measure_mean(known: Known, members: list[int], name: str, settings: dict) -> float:
    """The accuracy of the mean of the checkpoints at `members`, by stage 6 as a person would type
    it. `name`: of its policy, its own, so that an interrupted run finds it measured already."""
    folder, info, W = known.run / name, known.series.info(known.run), known.series.weights
    new = lambda module: sum(W(module)[i] for i in members) / len(members)  # noqa: E731
    merge.save_jump(known.series, new, (folder, folder), info, known.cfg)
    # As the checkpoints were measured. If a flag stands twice, the last one counts.
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    flags += measuring(known.cfg, name)
    if info.get("backbone"):
        flags += ["--backbone", info["backbone"]]
    alone = {key: value for key, value in os.environ.items() if key not in OF_SEVERAL}
    if subprocess.run([sys.executable, "06_eval.py", *flags], env=alone).returncode:
        raise UserError(f"stage 6 failed on {folder}; its message is above")
    rows, _ = measured(known, [name])
    write.remove(folder)
    return mean(rows[name])
