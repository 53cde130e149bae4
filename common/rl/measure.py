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
        """cfg: stage 6's EvalConfig. rank: the highest of the adapters to come."""
        self.cfg, self.base, self.accelerator = cfg, base, accelerator
        model, self.tokenizer = policy.load_backbone(cfg.path(base))
        model = model.to(accelerator.device) if cfg.engine == "hf" else model
        self.fingerprint = policy.fingerprint(model)
        turns = (self.tokenizer, cfg.prompt_template, cfg.system_prompt)
        self.template_hash = data.template_hash(*turns)
        limit = cfg.max_prompt_tokens
        self.tasks = {t: data.encode_prompts(found, *turns, limit, t) for t, found in tasks.items()}
        self.engine = rollout.make_engine(cfg, model, self.tokenizer, cfg.path(base), rank)

    def use(self, lora: pathlib.Path | None) -> None:
        """Samples from the model with this adapter. Raises UserError for another model's."""
        if lora:
            policy.refuse_foreign(lora, self.fingerprint)
        self.engine.use(lora)

    def answers(self, task: str, judge) -> list[dict]:
        """cfg.runs answers to every problem, scored, a row each. A process samples its share."""
        cfg, (problems, prompts), accelerator = self.cfg, self.tasks[task], self.accelerator
        asked = [(i, run) for run in range(cfg.runs) for i in range(len(problems))]
        asked = asked[accelerator.process_index :: accelerator.num_processes]
        seeds = [rollout.sequence_seed(cfg.seed, 0, i, run) for i, run in asked]
        prompts = [prompts[i] for i, _ in asked]
        # vLLM sees to its own precision.
        with accelerator.autocast() if cfg.engine == "hf" else contextlib.nullcontext():
            draw = (cfg.max_new_tokens, cfg.temperature, cfg.top_p)
            found = self.engine.generate(prompts, seeds, *draw)
        texts = self.tokenizer.batch_decode([r.tokens for r in found], skip_special_tokens=True)
        sampled, finished = [problems[i] for i, _ in asked], [r.finished for r in found]
        scores, rows = judge.score(texts, sampled, finished), []
        for (i, run), rolled, text, right in zip(asked, found, texts, scores, strict=True):
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
