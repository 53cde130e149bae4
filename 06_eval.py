r"""Stage 6: accuracy over repeated runs, ICER, the paper's tables and figures.        Paper: Sec. 5

    accelerate launch --quiet 06_eval.py --config demo --run-dir runs/demo
    accelerate launch --quiet 06_eval.py --config demo --run-dir runs/demo --policies 'train/step_*'
    python 06_eval.py --config demo --run-dir runs/demo --policies 'train/step_*' \
        --test-data runs/demo/data/valid.jsonl --output validation

Reads   the policies named, the test problems, and every stage's logs
Writes  <run-dir>/eval/<policy>/<task>.jsonl   a response a line, with run number and score
        <run-dir>/eval/<policy>/<task>.json    accuracy, standard error, n, response length
        <run-dir>/report.html, report.md       tables, claims and figures: common/reproduce

A policy is an adapter, measured on the backbone that it was trained on, or a whole model. For those
of another trainer, type --run-dir outputs --policies 'checkpoint-*' or name=path; put what it makes
of a jump into outputs/continued/<jump>/checkpoint-100. With --output the results go to that folder,
without a report. Stage 4 chooses by what is in <run-dir>/validation, never by test results.

Every problem is answered `runs` times. The standard error is over problems: the runs of one problem
are not independent, so their mean is one observation. All policies get the same seeds: differences
are paired. What was measured with the same weights, problems, options and packages is kept.
"""

import dataclasses
import json
import pathlib
import time

from accelerate import Accelerator

from common import UserError
from common.files import adapters, config
from common.files.config import option
from common.files.models import base_of, find_model, find_policies, weights_hash
from common.files.read import safe_name
from common.files.stage import machine, progress, run_stage, versions
from common.files.write import claim, is_made, write_json, write_text
from common.reproduce import report
from common.rl import data, metrics, policy, rollout, training, verifier
from common.rl.options import SamplingConfig

FOLDERS = ("backbone", "data", "train", "deltas", "predictor", "extrapolated", "merged")
FOLDERS += ("continued", "figures")
MATHS = ["aime24", "aime25", "amc23", "minerva", "olymmath-en-easy"]
# Options that do not change how a policy is measured. The problems have a hash of their own.
NOT_SETTINGS = ("policies", "test_data", "prompt_column", "answer_column", "data_split")
NOT_SETTINGS += ("batch_size", "vllm_options", "backbone", "output")


@dataclasses.dataclass
class EvalConfig(SamplingConfig):
    """What to measure, on what. The templates and answer_format must be those of training."""

    policies: list[str] = option(
        ["backbone", "train/step_*", "extrapolated/*", "continued/*/step_*"],
        "globs below the run directory, `backbone`, name=path",
    )
    test_data: list[str] = option(
        [*MATHS, "gpqa-diamond", "mmlu-pro"],
        "names, files, hub ids, name=path (paper: all of these)",
    )
    data_split: str = option("test", "of a hub id or a folder: its split")
    runs: int = option(8, "answers to every problem (paper: 8)")
    seed: int = option(1, "of the sampled responses")
    output: str = option("eval", "folder for the results; only `eval` gets a report")

    def __post_init__(self):
        super().__post_init__()
        if safe_name(self.output, "--output") in FOLDERS:
            raise UserError(f"--output {self.output} is another stage's folder: try validation")


def to_measure(cfg: EvalConfig, run: pathlib.Path, tasks: dict) -> list[tuple]:
    """What was not measured before: (policy, its folder, its model, {task: all that the result
    depends on}). An adapter's model is the one it stands on."""
    how = {"settings": config.as_dict(cfg, leave_out=NOT_SETTINGS), "versions": versions()}
    asked, found = rollout.vllm_options(cfg.vllm_options).items(), []
    how["dtypes"] = {key: value for key, value in asked if "dtype" in key}
    for name, path in find_policies(run, [*map(cfg.path, cfg.policies)]).items():
        base = base_of(run, path, cfg.backbone)
        model = find_model(cfg.path(base))
        weights = weights_hash(path if adapters.is_adapter(path) else model)
        same = {**how, "weights": weights, "backbone": weights_hash(model)}
        made = {task: {**same, "data": data.fingerprint(tasks[task])} for task in tasks}
        folder = run / cfg.output / name.replace("/", "__")
        done = {t for t in tasks if is_made(folder / f"{t}.json", made[t]) and not cfg.overwrite}
        left = {task: record for task, record in made.items() if task not in done}
        found += [(name, path, base, left)] if left else []
    return found


def evaluate(cfg: EvalConfig, run: pathlib.Path, accelerator: Accelerator) -> None:
    """Measures every policy on every task. Policies on one model, one after another, share it."""
    tasks, loaded = data.load_tasks([*map(cfg.path, cfg.test_data)], **cfg.columns), None
    judge = verifier.Verifier(cfg.verifier_seconds, cfg.answer_format)
    judge.check([problem for problems in tasks.values() for problem in problems])
    work = to_measure(cfg, run, tasks)
    loras = {name: path for name, path, *_ in work if adapters.is_adapter(path)}
    rank = max((adapters.highest_rank(adapters.read_config(x)) for x in loras.values()), default=0)
    start, done, total = time.perf_counter(), 0, sum(len(left) for *_, left in work)
    for name, path, base, left in (bar := progress(work, "evaluating")):
        # The model, then the adapter on it.
        if loaded is None or loaded.base != base:
            if loaded:
                loaded.engine.close()  # the next model needs its memory
            first, loaded = loaded is None, metrics.Loaded(cfg, base, tasks, rank, accelerator)
            for task, (_, prompts) in loaded.tasks.items() if first else ():
                prompt = loaded.tokenizer.decode(prompts[0])
                accelerator.print(f"{task}: {len(prompts)} problems; first prompt: {prompt!r}")
        if name in loras:
            policy.refuse_foreign(loras[name], loaded.fingerprint)
        loaded.engine.use(loras.get(name))
        trained = {} if name == "backbone" else adapters.read_info(path)
        if trained.get("template_hash", loaded.template_hash) != loaded.template_hash:
            accelerator.print(f"warning: {name} was trained with another prompt template")
        # `runs` answers to every problem, scored.
        for task, depends in left.items():
            began, done = time.perf_counter(), done + 1
            rows = metrics.answers(loaded, loaded.tasks[task], cfg.runs, judge)
            record = {"policy": name, **depends, "template_hash": loaded.template_hash}
            record |= metrics.summarise(rows, judge, began) | machine()
            record["left_out"] = len(tasks[task]) - record["problems"]  # prompts that are too long
            if accelerator.is_main_process:
                file = run / cfg.output / name.replace("/", "__") / f"{task}.jsonl"
                write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
                write_json(file.with_suffix(".json"), record)
                told = metrics.console_line(record, start, done / total)
                bar.write(f"{done}/{total} {name}  {task}: {told}")
    judge.close()
    if loaded:
        loaded.engine.close()


def main() -> None:
    cfg = config.parse(EvalConfig, "eval", __doc__)
    training.check_prepared(cfg, cfg.backbone, *cfg.test_data)
    accelerator = policy.start_processes("auto")
    accelerator.print(f"{accelerator.num_processes} process(es)")
    cfg.engine, run = rollout.choose_engine(cfg.engine), pathlib.Path(cfg.run_dir)
    if not run.is_dir() and not all(x == "backbone" or "=" in x for x in cfg.policies):
        raise UserError(f"run directory {run} not found: run 01_train_lora_grpo.py first")
    if accelerator.is_main_process:
        claim(run / cfg.output)
    evaluate(cfg, run, accelerator)
    if cfg.output == "eval" and accelerator.is_main_process:
        print(report.write_run(run))
    accelerator.end_training()


if __name__ == "__main__":
    run_stage(main)
