"""Answers of policies to test problems: sampled, scored, and summed up for stage 6."""

import contextlib
import pathlib

import torch
from accelerate.utils import gather_object

from common import UserError
from common.files import models
from common.rl import data, policy, rollout


def find_model(name: str) -> pathlib.Path:
    """The folder of the model `name`; a hub id that is not on this machine is fetched."""
    with contextlib.suppress(UserError):
        return models.find_model(name)
    policy.load_backbone(name)
    return models.find_model(name)


class Loaded:
    """A model on which policies are measured, with the prompts of every task in its tokens."""

    def __init__(self, cfg, base: str, tasks: dict, rank: int, accelerator):
        """cfg: a SamplingConfig with batch_size. rank: the highest of the adapters to come."""
        model, self.tokenizer = policy.load_backbone(cfg.path(base))
        model = model.to(accelerator.device) if cfg.engine == "hf" else model
        self.base, self.fingerprint = base, policy.fingerprint(model)
        turns = (self.tokenizer, cfg.prompt_template, cfg.system_prompt)
        self.template_hash = data.template_hash(*turns)
        self.prompts = {
            task: data.encode_prompts(problems, *turns, cfg.max_prompt_tokens, task)
            for task, problems in tasks.items()
        }
        where = (cfg.path(base), rank, cfg.batch_size)
        self.engine = rollout.make_engine(cfg, model, self.tokenizer, *where)

    def first_prompts(self) -> str:
        """A line a task, for whoever wants to see what the model is asked."""
        firsts = {task: (len(p), self.tokenizer.decode(p[0])) for task, p in self.prompts.items()}
        lines = [f"{task}: {n} problems; first prompt: {p!r}" for task, (n, p) in firsts.items()]
        return "\n".join(lines)

    def use(self, lora: pathlib.Path | None) -> None:
        """Samples from the model with this adapter. Raises UserError for another model's."""
        if lora:
            policy.refuse_foreign(lora, self.fingerprint)
        self.engine.use(lora)


def ask(cfg, engine, prompts: list[list[int]], accelerator) -> list[tuple]:
    """(problem, run, rollout) of cfg.runs answers to each prompt; a process samples its share."""
    asked = [(i, run) for run in range(cfg.runs) for i in range(len(prompts))]
    asked = asked[accelerator.process_index :: accelerator.num_processes]
    seeds = [rollout.sequence_seed(cfg.seed, 0, i, run) for i, run in asked]
    wanted = [prompts[i] for i, _ in asked]
    # vLLM sees to its own precision.
    with accelerator.autocast() if cfg.engine == "hf" else contextlib.nullcontext():
        found = engine.generate(wanted, seeds, cfg.max_new_tokens, cfg.temperature, cfg.top_p)
    return [(i, run, rolled) for (i, run), rolled in zip(asked, found, strict=True)]


def score(judge, tokenizer, problems: list[data.Problem], asked: list[tuple]) -> list[dict]:
    """A row an answer, of all processes."""
    tokens, finished = [r.tokens for *_, r in asked], [r.finished for *_, r in asked]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    asked_of = [problems[i] for i, *_ in asked]
    golds, kinds = [p.answer for p in asked_of], [p.kind for p in asked_of]
    scores, rows = judge.score(texts, golds, finished, kinds), []
    for (i, run, rolled), text, right in zip(asked, texts, scores, strict=True):
        row = {"problem": i, "run": run, "prompt": problems[i].prompt, "response": text}
        row |= {"answer": problems[i].answer, "tokens": len(rolled.tokens)}
        rows.append({**row, "finished": rolled.finished, "score": right})
    return sorted(gather_object(rows), key=lambda row: (row["run"], row["problem"]))


def summarise(rows: list[dict], problems: int) -> dict:
    """Accuracy with its standard error over problems, and the means that go with it."""
    by_problem = torch.zeros(problems, dtype=torch.float64)
    for row in rows:
        by_problem[row["problem"]] += row["score"] * problems / len(rows)
    return {
        "accuracy": float(by_problem.mean()),
        "standard_error": float(by_problem.std() / problems**0.5) if problems > 1 else None,
        "n": len(rows),
        "problems": problems,
        "response_length": sum(row["tokens"] for row in rows) / len(rows),
        "truncated_share": sum(not row["finished"] for row in rows) / len(rows),
        "by_problem": by_problem.tolist(),
    }


def console_line(record: dict) -> str:
    """`0.749 +- 0.012 (n = 2048), length 29.4, 1.7 s`."""
    error = "" if record["standard_error"] is None else f" +- {record['standard_error']:.3f}"
    zero = "" if record["accuracy"] else "; all scored 0: are template and answer_format right?"
    line = f"{record['accuracy']:.3f}{error} (n = {record['n']})"
    return f"{line}, length {record['response_length']:.1f}, {record['seconds']:.1f} s{zero}"
