"""verl 0.9.1 as the trainer of stages 1 and 5: its commands, our problems and our reward for it,
and its checkpoints as ours, so that the other stages go on as they are.

    python -m common.reproduce.verl problems <file.parquet> --config <preset> --run-dir <run dir>
    python -m common.reproduce.verl checkpoints <verl's> <ours> <steps before> <backbone> [<jump>]
"""

import functools
import pathlib
import shlex
import subprocess
import sys
import tempfile
import threading

from common import UserError, in_one_line
from common.files import write
from common.files.adapters import CONFIG, VLLM_RANKS
from common.files.read import step_of
from common.files.stage import run_stage
from common.reproduce.check import options_of
from common.reproduce.plans import TABLES, Job
from common.reproduce.results import table_of
from common.rl import data
from common.rl.verifier import Verifier

KEYS = table_of("verl.yaml")
ONLY_OURS = {"learning_rate_schedule": "constant", "reward": ["verifier"], "importance_cap": 0.0}
ONLY_OURS |= {"eval_every": 0, "report_to": ""}
HIGH_RANK = ("relex", "wsm", "greedy-soup")  # sums of many checkpoints
FROM_ZERO = {**ONLY_OURS, "start": ""}  # stage 1's
OURS = ("python", "-m", "common.reproduce.verl")
LOCK = threading.Lock()


def commands(jobs: list[Job], preset: str, root: str, flags: str) -> list[str]:
    """What to type for `jobs`: verl's commands for stages 1 and 5, the others as they are.

    preset: its name. flags: verl's keys, key=value, that replace those of verl.yaml. Raises
    UserError where a job has an option that verl has not.
    """
    problems, lines, before = f"{root}/verl/train.parquet", [], {}  # run -> its steps to the jump
    if odd := [word for word in shlex.split(flags) if "=" not in word]:
        raise UserError(f"verl_flags: want key=value, not {odd[0]}")
    own = dict(word.split("=", 1) for word in shlex.split(flags))
    for job in jobs:
        if job.stage not in ("01", "05"):
            lines.append(job.line)
            continue
        cfg = options_of(job.stage, job.argv[job.argv.index("--config") :])
        for key, usual in (FROM_ZERO if job.stage == "01" else ONLY_OURS).items():
            if (value := getattr(cfg, key)) != usual:
                raise UserError(f"verl has no {key} {value}, which this job wants: {job.line}")
        if not before:
            asked = ["problems", problems, "--config", preset, "--run-dir", root]
            lines.append(shlex.join([*OURS, *asked]))
        first = before.setdefault(cfg.run_dir, cfg.steps)
        if job.stage == "01":
            folder, step, backbone, sections = "train", 0, cfg.backbone, []
        else:
            name, whole = cfg.start.removeprefix("merged/"), cfg.start.startswith("merged/")
            folder = f"continued/{job.name.split()[-1].replace('/', '__')}"
            folder += "_merged" if whole and cfg.tune == "lora" else ""  # as stage 5 names it
            step, cfg.steps, backbone, sections = first, cfg.more_steps, cfg.backbone, ["jump"]
            if whole or cfg.restart == "merged" or cfg.tune == "full":
                lines += [] if whole else [merging(cfg, name)]
                backbone, sections = f"{{run_dir}}/merged/{name}", []
        values = {"model": cfg.path(backbone), "folder": f"{cfg.run_dir}/verl/{folder}"}
        values |= {"problems": problems, "order": cfg.seed + step}
        values["jump"] = f"{cfg.run_dir}/extrapolated/{cfg.start}"
        lines.append(trained(cfg, sections, values, own))
        places = [values["folder"], f"{cfg.run_dir}/{folder}", str(step), backbone]
        places += [values["jump"]] if sections else []
        lines.append(shlex.join([*OURS, "checkpoints", *places]))
    return lines


def trained(cfg, sections: list[str], values: dict, own: dict[str, str]) -> str:
    """verl's command for the options `cfg`. sections: more of verl.yaml. values: for its {}."""
    algorithm = cfg.algorithm.replace("reinforce++", "reinforce_plus_plus").replace("-", "_")
    aggregation = {"token": "token-mean", "seq": "seq-mean-token-mean"}[cfg.loss_aggregation]
    values = {**vars(cfg), "estimator": algorithm, "aggregation": aggregation, **values}
    values["room"] = VLLM_RANKS[-1] if cfg.start.startswith(HIGH_RANK) else 2 * cfg.lora_rank
    sections = ["always", cfg.tune, *([f"kl_in_{cfg.kl_in}"] if cfg.kl_coef else []), *sections]
    keys = {key: text.format_map(values) for name in sections for key, text in KEYS[name].items()}
    words = [f"{key}={value}" for key, value in {**keys, **own}.items()]
    return shlex.join(["python", "-m", "verl.trainer.main_ppo", *words])


def merging(cfg, name: str) -> str:
    """Stage 4's command for the whole model of the jump `name`: next-paper_alpha1.5."""
    method, _, alpha = name.partition("_alpha")
    flags = ["--config", cfg.config, "--run-dir", cfg.run_dir, "--merge", "--methods"]
    recipe = method.removeprefix("next-")
    flags += ["next", "--recipes", recipe] if recipe != method else [method]
    flags += ["--alphas", alpha] if alpha else []
    return shlex.join(["python", TABLES["scripts"]["04"], *flags])


def write_problems(path: pathlib.Path, argv: list[str]) -> None:
    """Stage 1's problems in verl's columns. argv: flags of stage 1."""
    from datasets import Dataset

    cfg = options_of("01", argv)
    columns = {**cfg.columns, "english_only": cfg.english_only}
    problems = data.load_problems(cfg.path(cfg.train_data), **columns)
    system = [{"role": "system", "content": cfg.system_prompt}] if cfg.system_prompt else []
    turns = [cfg.prompt_template.replace("{prompt}", problem.prompt) for problem in problems]
    judge("boxed").score([r"\boxed{x + 1}"], [data.Problem("", "1 + x")], [True])  # it works here
    rows = {
        "prompt": [[*system, {"role": "user", "content": turn}] for turn in turns],
        "data_source": [problem.kind for problem in problems],
        "reward_model": [{"ground_truth": problem.answer} for problem in problems],
        "extra_info": [{"index": i, "format": cfg.answer_format} for i in range(len(problems))],
    }
    with write.atomic_file(path) as temporary:
        Dataset.from_dict(rows).to_parquet(temporary)


@functools.cache
def judge(answer_format: str) -> Verifier:
    return Verifier(answer_format=answer_format)


def compute_score(data_source, solution_str, ground_truth, extra_info) -> float:
    """The verifier's reward, by verl's signature. A response that was cut can score here."""
    problem = data.Problem("", ground_truth, data_source)
    with LOCK:  # verl calls it from several threads
        return judge(extra_info["format"]).score([solution_str], [problem], [True])[0]


def take(verls: pathlib.Path, ours: pathlib.Path, before: int, backbone: str, jump="") -> None:
    """verl's checkpoints in `verls` as step_0010 ... in `ours`, those that are not there yet.

    before: RL steps before its first. backbone: what its adapters stand on. jump: the adapter that
    was trained on; its config is copied, because verl's merger cuts lora_alpha 32.5 to 32.
    """
    found = sorted(verls.glob("global_step_*/actor"), key=step_of)
    if not found:
        raise UserError(f"{verls} has no checkpoint global_step_*/actor of verl's: train first")
    merger = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    for path in found:
        step = step_of(path) + before
        if (made := ours / f"step_{step:04d}").is_dir():
            continue
        with tempfile.TemporaryDirectory(dir=verls) as merged:
            where = ["--local_dir", str(path), "--target_dir", merged]
            with in_one_line(f"verl's merger fails on {path}", "see above"):
                subprocess.run([*merger, *where], check=True)
            adapter = pathlib.Path(merged, "lora_adapter")  # beside its backbone
            files = adapter if adapter.is_dir() else pathlib.Path(merged)
            with write.atomic_dir(made, {"step": step, "backbone": backbone}) as folder:
                write.copy_files([file for file in files.iterdir() if file.is_file()], folder)
                write.copy_files([pathlib.Path(jump, CONFIG)] if jump else [], folder)


def main() -> None:
    match sys.argv[1:]:
        case ["problems", path, *argv]:
            write_problems(pathlib.Path(path), argv)
        case ["checkpoints", verls, ours, before, *others]:
            take(pathlib.Path(verls), pathlib.Path(ours), int(before), *others)
        case _:
            raise UserError(__doc__)


if __name__ == "__main__":
    run_stage(main)
