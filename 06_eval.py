"""Stage 6: accuracy over repeated runs, ICER, the paper's tables and figures.                                      Paper: Sec. 5

    accelerate launch 06_eval.py --config demo --run-dir runs/demo
    accelerate launch 06_eval.py --config demo --run-dir runs/demo --policies train/step_0150 'continued/*/step_0250'
    python 06_eval.py --config demo --run-dir runs/demo --policies 'train/step_*' --test-data runs/demo/data/valid.jsonl --output validation

Reads   the policies named (globs below the run directory; `backbone` is the model itself), the test problems, every stage's logs
Writes  <run-dir>/eval/<policy>/<task>.jsonl       a response a line, with its run, seed and score
        <run-dir>/eval/<policy>/<task>.json        accuracy, standard error, n, response length, share cut at the limit
        <run-dir>/eval/results.json, report.md, figures/*.png

A policy is an adapter, measured on the backbone that it was trained on, or a whole model: train/step_0150 after `01 --tune full`, what
stage 5 makes of it, or merged/<name>.

With --output validation the results go to <run-dir>/validation instead, and no report is written: that is where methods that choose by
accuracy look, so that no test problem has a say.

Every problem is answered `runs` times (paper: 8). The standard error is over problems: the runs of one problem are not independent,
so their mean counts as one observation. All policies get the same sampling seeds, so differences between policies are paired and
their standard error is that of the differences. A policy that was measured already is not measured again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from common import UserError
from common.files import adapters
from common.files import config as configs
from common.files import models as model_files
from common.files import read as inputs
from common.files import write as run_dir
from common.reproduce import report
from common.rl import data, policy, rollout, verifier

NOT_RESULTS = ("backbone", "data", "train", "deltas", "predictor", "extrapolated", "merged", "continued", "figures")


@dataclasses.dataclass
class EvalConfig(configs.StageConfig):
    """What to measure, on what. Defaults are the test half of the paper's Table 2."""

    backbone: str = dataclasses.field(
        default="Qwen/Qwen2.5-1.5B-Instruct", metadata={"help": "the model that was trained: folder or hub id"}
    )
    policies: list[str] = dataclasses.field(
        default_factory=lambda: ["backbone", "train/step_*", "extrapolated/*", "continued/*/step_*"],
        metadata={"help": "globs below the run directory, and `backbone`"},
    )
    test_data: list[str] = dataclasses.field(
        default_factory=lambda: ["aime24", "aime25", "amc23", "minerva", "olymmath-en-easy", "gpqa-diamond", "mmlu-pro"],
        metadata={"help": "test problems: names (mmlu-pro/biology is one category), files, hub ids, name=path (paper: all of these)"},
    )
    prompt_column: str = dataclasses.field(default="prompt", metadata={"help": "of a file or a hub id: column of the question"})
    answer_column: str = dataclasses.field(default="answer", metadata={"help": "of a file or a hub id: column of the answer"})
    data_split: str = dataclasses.field(default="test", metadata={"help": "of a hub id: its split"})
    prompt_template: str = dataclasses.field(
        default=data.PROMPT_TEMPLATE, metadata={"help": "the user turn; must be the one of training (open)"}
    )
    system_prompt: str = dataclasses.field(
        default=data.SYSTEM_PROMPT, metadata={"help": "the system turn, none if empty; must be the one of training (open)"}
    )
    answer_format: Literal["boxed", "last_number"] = dataclasses.field(
        default="boxed", metadata={"help": "where a response has its answer; must be the one of training (open)"}
    )
    runs: int = dataclasses.field(default=8, metadata={"help": "answers to every problem (paper: 8)"})
    temperature: float = dataclasses.field(default=1.0, metadata={"help": "sampling temperature (paper: 1.0)"})
    top_p: float = dataclasses.field(default=1.0, metadata={"help": "nucleus sampling (paper: 1.0)"})
    max_prompt_tokens: int = dataclasses.field(default=1024, metadata={"help": "longest prompt allowed (paper: 1024)"})
    max_new_tokens: int = dataclasses.field(
        default=4096, metadata={"help": "longest response; one cut there counts as wrong (paper: 4096)"}
    )
    engine: Literal["auto", "hf", "vllm"] = dataclasses.field(
        default="auto", metadata={"help": "what samples; auto is vllm where it is installed and a GPU is there, else hf"}
    )
    vllm_options: str = dataclasses.field(default="{}", metadata={"help": "options of vLLM's LLM class, a JSON object"})
    batch_size: int = dataclasses.field(default=512, metadata={"help": "sequences that hf samples at one time: memory, not results"})
    verifier_seconds: float = dataclasses.field(default=5.0, metadata={"help": "time limit for one answer"})
    seed: int = dataclasses.field(default=1, metadata={"help": "of the sampled responses"})
    output: str = dataclasses.field(
        default="eval", metadata={"help": "folder below the run directory for the results; the report is written for `eval` alone"}
    )

    def __post_init__(self):
        odd = not self.output.isprintable() or pathlib.Path(self.output).name != self.output or self.output.startswith(".")
        if odd or self.output in ("", *NOT_RESULTS):
            raise UserError(f"--output {self.output}: want the name of a folder below the run directory for results, such as validation")
        for name in ("runs", "batch_size", "max_new_tokens", "temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        rollout.vllm_options(self.vllm_options)  # refuses what is not a JSON object


def find_policies(cfg: EvalConfig) -> list[str]:
    """The names that the globs stand for, in the order given, each once."""
    run, found = pathlib.Path(cfg.run_dir), []
    for pattern in cfg.policies:
        if pathlib.Path(pattern).is_absolute() or ".." in pathlib.Path(pattern).parts:
            raise UserError(f"policies are named as they stand in {run} (train/step_0150, extrapolated/*), not {pattern}")
        names = (
            ["backbone"]
            if pattern == "backbone"
            else sorted(str(path.relative_to(run)) for path in run.glob(pattern) if adapters.is_adapter(path) or model_files.is_model(path))
        )
        names = [name for name in names if "/." not in name]  # what a killed stage 4 left under a temporary name
        if not names:
            raise UserError(f"no policy matches {run}/{pattern}: run the stage that makes it, or leave it out of --policies")
        found += [name for name in names if name not in found]
    return found


def weights_hash(folder: pathlib.Path) -> str:
    """The hash of the weights in `folder`, intact: of its adapter, or of all safetensors files of a whole model."""
    if adapters.is_adapter(folder):
        adapters.read_header(folder)  # refuses what is more than a LoRA in safetensors
        inputs.check_intact(folder)
        return inputs.sha256(folder / "adapter_model.safetensors")
    hashes = [inputs.sha256(path) for path in sorted({*model_files.open_intact(folder).files.values()})]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]


def named_backbone(cfg: EvalConfig, folder: pathlib.Path) -> str:
    """The backbone that the checkpoint in `folder` names: the one given, or one inside the run directory (a merged restart has its own).

    Raises UserError for any other: a file of unknown origin does not choose what is loaded, or fetched from the hub.
    """
    named, run = policy.checkpoint_info(folder).get("backbone") or cfg.backbone, pathlib.Path(cfg.run_dir).resolve()
    where, given = (pathlib.Path(cfg.path(name)) for name in (named, cfg.backbone))
    ours = where.is_dir() and (where.resolve().is_relative_to(run) or where.resolve() == given.resolve())
    if named != cfg.backbone and not ours:
        raise UserError(f"{folder} names the backbone {named}, not {cfg.backbone}: if it is to be loaded, say --backbone {named}")
    return named


def evaluate(cfg: EvalConfig, engine, judge, tokenizer, problems: list[data.Problem], prompts: list[list[int]], accelerator) -> list[dict]:
    """`runs` answers to each problem: rows of problem, run, response, tokens, finished, score. Each process samples its share of them."""
    asked = [(index, run) for run in range(cfg.runs) for index in range(len(problems))]
    asked = asked[accelerator.process_index :: accelerator.num_processes]
    seeds = [rollout.sequence_seed(cfg.seed, 0, index, run) for index, run in asked]
    rollouts = engine.generate([prompts[index] for index, _ in asked], seeds, cfg.max_new_tokens, cfg.temperature, cfg.top_p)
    texts = tokenizer.batch_decode([r.tokens for r in rollouts], skip_special_tokens=True)
    golds, kinds = ([getattr(problems[index], field) for index, _ in asked] for field in ("answer", "kind"))
    scores = judge.score(texts, golds, [r.finished for r in rollouts], kinds)
    rows = [
        {
            "problem": index,
            "run": run,
            "prompt": problems[index].prompt,
            "response": text,
            "answer": problems[index].answer,
            "tokens": len(r.tokens),
            "finished": r.finished,
            "score": score,
        }
        for (index, run), r, text, score in zip(asked, rollouts, texts, scores, strict=True)
    ]
    return sorted(gather_object(rows), key=lambda row: (row["run"], row["problem"]))


def summarise(rows: list[dict], problems: int) -> dict:
    """Accuracy with its standard error over problems, and the means that go with it."""
    by_problem = torch.zeros(problems, dtype=torch.float64)
    for row in rows:
        by_problem[row["problem"]] += row["score"] * problems / len(rows)
    error = float(by_problem.std() / problems**0.5) if problems > 1 else None
    return {
        "accuracy": float(by_problem.mean()),
        "standard_error": error,
        "n": len(rows),
        "problems": problems,
        "response_length": sum(row["tokens"] for row in rows) / len(rows),
        "truncated_share": sum(not row["finished"] for row in rows) / len(rows),
        "by_problem": by_problem.tolist(),
    }


def settings_of(cfg: EvalConfig) -> dict:
    """The options that decide how a policy is measured: not which, on what (its hash is kept), with what memory, nor where to."""
    elsewhere = ("policies", "test_data", "prompt_column", "answer_column", "data_split", "batch_size", "vllm_options", "backbone")
    return configs.as_dict(cfg, leave_out=(*elsewhere, "output"))


def measure(cfg: EvalConfig, names: list[str], accelerator: Accelerator) -> None:
    """Evaluates every policy on every task, one after another; the policies of a backbone share the loaded model."""
    run = pathlib.Path(cfg.run_dir)
    columns = {"prompt_column": cfg.prompt_column, "answer_column": cfg.answer_column, "split": cfg.data_split}
    tasks = data.load_tasks([cfg.path(spec) for spec in cfg.test_data], **columns)
    hashes = {task: data.fingerprint(problems) for task, problems in tasks.items()}
    settings = settings_of(cfg)
    hashed = functools.cache(weights_hash)  # a whole model takes its time, and many jumps stand on one
    adapted = [name for name in names if name != "backbone" and adapters.is_adapter(run / name)]
    rank = max((adapters.highest_rank(adapters.read_config(run / name)) for name in adapted), default=0)
    judge, engine, loaded, shown = verifier.Verifier(cfg.verifier_seconds, cfg.answer_format), None, None, set()
    for name in (bar := tqdm(names, desc="evaluating", unit="policy", disable=None if accelerator.is_main_process else True)):
        folder = run / cfg.output / name.replace("/", "__")
        info = {} if name == "backbone" else policy.checkpoint_info(run / name)
        whole = name != "backbone" and name not in adapted
        base = f"{{run_dir}}/{name}" if whole else cfg.backbone if name == "backbone" else named_backbone(cfg, run / name)
        weights = name if name == "backbone" else hashed(run / name)
        if name in adapted and base.startswith("{run_dir}/train/"):  # a jump from a whole model; `none` is zeros on whatever it is
            weights += hashed(pathlib.Path(cfg.path(base)))
        wanted = {"settings": settings, "weights": weights, "versions": run_dir.versions()}
        open_tasks = [task for task in tasks if not _is_measured(folder / f"{task}.json", {**wanted, "data": hashes[task]})]
        if not open_tasks:
            continue
        if base != loaded:
            if engine:
                engine.close()
            backbone, tokenizer = policy.load_backbone(cfg.path(base))
            if cfg.engine == "hf":
                backbone = backbone.to(accelerator.device)
            engine = rollout.make_engine(cfg, backbone, tokenizer, cfg.path(base), rank, cfg.batch_size)
            loaded, fingerprint = base, policy.fingerprint(backbone)
            del backbone  # hf holds it, vLLM has its own
        if name in adapted:
            policy.refuse_foreign(run / name, fingerprint)
        engine.use(run / name if name in adapted else None)
        template_hash = data.template_hash(tokenizer, cfg.prompt_template, cfg.system_prompt)
        if info.get("template_hash", template_hash) != template_hash:
            bar.write(f"warning: {name} was trained with another prompt template ({info['template_hash']}, here {template_hash})")
        for task in open_tasks:
            prompts = data.encode_prompts(tasks[task], tokenizer, cfg.prompt_template, cfg.system_prompt, cfg.max_prompt_tokens, task)
            if task not in shown:
                shown.add(task)
                accelerator.print(f"{task}: {len(prompts)} problems; first prompt: {tokenizer.decode(prompts[0])!r}")
            began = time.perf_counter()
            with accelerator.autocast() if cfg.engine == "hf" else contextlib.nullcontext():  # vLLM sees to its own precision
                rows = evaluate(cfg, engine, judge, tokenizer, tasks[task], prompts, accelerator)
            if not accelerator.is_main_process:
                continue
            result = {**summarise(rows, len(prompts)), "seconds": round(time.perf_counter() - began, 2)}
            record = {"policy": name, **wanted, "data": hashes[task], "template_hash": template_hash, **result}
            run_dir.atomic_write_text(folder / f"{task}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            run_dir.write_json(folder / f"{task}.json", record)
            bar.write(f"{names.index(name) + 1}/{len(names)} {name}  {task}: {console_line(result)}")
    judge.close()
    if engine:
        engine.close()


def console_line(result: dict) -> str:
    error = "" if result["standard_error"] is None else f" +- {result['standard_error']:.3f}"
    return f"{result['accuracy']:.3f}{error} (n = {result['n']}), length {result['response_length']:.1f}, {result['seconds']:.1f} s"


def _is_measured(path: pathlib.Path, wanted: dict) -> bool:
    if not path.is_file():
        return False
    before = inputs.read_json(path, "06_eval.py")
    return all(before.get(key) == value for key, value in wanted.items())


def run_eval(cfg: EvalConfig) -> None:
    """The whole stage, from its config on; stage 4 calls it too."""
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="bf16" if torch.cuda.is_available() else "no")
    if accelerator.num_processes > 1:
        accelerator.print(f"{accelerator.num_processes} processes")
    cfg.engine = rollout.choose_engine(cfg.engine)
    if not pathlib.Path(cfg.run_dir).is_dir():
        raise UserError(f"run directory {cfg.run_dir} not found: run 01_train_lora_grpo.py first")
    if accelerator.is_main_process:
        run_dir.claim(pathlib.Path(cfg.run_dir) / cfg.output)
    measure(cfg, find_policies(cfg), accelerator)
    if cfg.output == "eval" and accelerator.is_main_process:
        print(report.write(pathlib.Path(cfg.run_dir)))
    accelerator.end_training()


def main() -> None:
    run_eval(configs.parse(EvalConfig, "eval", __doc__))


if __name__ == "__main__":
    configs.run_stage(main)
