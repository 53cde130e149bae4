"""Options that stage 1 shares with stage 6, and those of stage 1 that few will ever change."""

import dataclasses
from typing import Literal

from common import UserError
from common.files.config import StageConfig, option
from common.rl import data, rollout

POSITIVE = (
    *("steps", "save_every", "prompts_per_step", "mini_batch", "rollouts", "max_new_tokens"),
    *("lora_rank", "batch_size", "resume_every", "log_every", "temperature", "more_steps", "runs"),
    *("max_grad_norm", "learning_rate", "lora_alpha", "verifier_seconds"),
)
NOT_NEGATIVE = ("weight_decay", "clip_low", "clip_high", "kl_coef", "importance_cap", "eval_every")


@dataclasses.dataclass
class SamplingConfig(StageConfig):
    """Model, data, prompts, sampling and engine: alike in training and in evaluation."""

    backbone: str = option("Qwen/Qwen2.5-1.5B-Instruct", "folder or hub id (paper: 1.5B to 14B)")
    prompt_column: str = option("prompt", "of a file or hub id: question's column, a.b for nested")
    answer_column: str = option("answer", "of a file or hub id: answer's column, a.b for nested")
    data_split: str = option("train", "of a hub id or a folder: its split")
    prompt_template: str = option(data.PROMPT_TEMPLATE, "the user turn around a problem (open)")
    system_prompt: str = option(data.SYSTEM_PROMPT, "system turn (Qwen2.5's), none if empty (open)")
    answer_format: Literal["boxed", "last_number"] = option("boxed", "where the answer is (open)")
    temperature: float = option(1.0, "sampling temperature (paper: 1.0)")
    top_p: float = option(1.0, "nucleus sampling; training needs 1.0 (paper: 1.0)")
    max_prompt_tokens: int = option(1024, "longest prompt allowed (paper: 1024)")
    max_new_tokens: int = option(4096, "longest response; one cut there gets 0 (paper: 4096)")
    engine: Literal["auto", "hf", "vllm"] = option("auto", "auto: vllm if it is there, and a GPU")
    batch_size: int = option(512, "sequences that hf samples at a time: memory, not results")
    vllm_options: str = option(
        "{}", "of vLLM's LLM class, in JSON: '{\"gpu_memory_utilization\": 0.4}' (0.8 in stage 6)"
    )
    verifier_seconds: float = option(5.0, "time limit for one answer")

    @property
    def columns(self) -> dict[str, str]:
        """Where `data.load_tasks` finds prompt and answer."""
        found = {"prompt": self.prompt_column, "answer": self.answer_column}
        return {**found, "split": self.data_split}

    def __post_init__(self):
        rollout.vllm_options(self.vllm_options)  # refuses what it does not know
        for name in POSITIVE:
            if not (value := getattr(self, name, 1)) > 0:  # nan; a stage has not all of them
                raise UserError(f"{name} must be positive, not {value}")
        for name in NOT_NEGATIVE:
            if not (value := getattr(self, name, 0)) >= 0:
                raise UserError(f"{name} must not be negative: {value}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")


@dataclasses.dataclass
class RLConfig(SamplingConfig):
    """Rarely changed: reward, optimizer, memory, precision, logging."""

    start: str = option("", "an adapter of PEFT's to train on, from its step [a new LoRA, from 0]")
    reward: list[str] = option(["verifier"], "verifier, or file.py:function; several are added")
    english_only: bool = option(False, "leave out problems with Chinese characters (open)")
    learning_rate_schedule: Literal["constant", "linear"] = option(
        "constant", "linear falls to 0 over the steps of this stage (open)"
    )
    weight_decay: float = option(0.0, "of AdamW (open)")
    max_grad_norm: float = option(1.0, "gradient clipping (open)")
    max_logprob_gap: float = option(1.0, "nats a token; stop if engine and trainer differ by more")
    micro_tokens: int = option(16384, "padded tokens in one forward pass: memory, not results")
    gradient_checkpointing: bool = option(False, "less memory, a third more time")
    mixed_precision: Literal["auto", "no", "bf16"] = option("auto", "auto is bf16 on GPUs alone")
    resume_every: int = option(10, "steps between states that an interrupted run goes on from")
    log_every: int = option(1, "steps between console lines; metrics.jsonl has every step")
    eval_every: int = option(0, "steps between accuracies on --eval-data; 0 is never")
    eval_data: str = option("", "validation problems, each answered once; never test problems")
    report_to: str = option("", "a tracker of accelerate: trackio, tensorboard, wandb ...")
    project: str = option("next", "name of the project there")

    def __post_init__(self):
        super().__post_init__()
        P, mini = self.prompts_per_step, self.mini_batch
        if P % mini:
            raise UserError(f"prompts_per_step ({P}) must be a multiple of mini_batch ({mini})")
        if self.top_p != 1.0:
            raise UserError(f"top_p {self.top_p} biases the importance ratio: set it to 1.0")
        if self.rollouts == 1 and self.algorithm != "reinforce++":
            raise UserError(f"{self.algorithm} compares responses: rollouts must be 2 or more")
        if self.eval_every and not self.eval_data:
            raise UserError("eval_every wants --eval-data: problems for validation")
        if self.kl_in == "reward" and not self.kl_coef:
            raise UserError("kl_in reward subtracts kl_coef times the KL, and kl_coef is 0: set it")


# What may differ when a run goes on: it changes weights at most by rounding and by the verifier's
# timeouts. In place of more_steps `steps` is compared, its sum with the step of the start.
MAY_CHANGE = (
    *("save_every", "resume_every", "log_every", "report_to", "project", "micro_tokens"),
    *("max_logprob_gap", "vllm_options", "batch_size", "verifier_seconds", "more_steps"),
    *("gradient_checkpointing", "eval_every", "eval_data"),
)


def learning_rate(cfg, first_step: int, step: int) -> float:
    """The learning rate of `step`, in a stage whose steps are first_step + 1 ... cfg.steps."""
    left = (cfg.steps - step + 1) / (cfg.steps - first_step)  # of the steps: 1 at the first one
    return cfg.learning_rate * (left if cfg.learning_rate_schedule == "linear" else 1.0)


def grows(cfg) -> str:
    """The option that makes a finished run longer: none where the rate has fallen to 0."""
    return "steps" if cfg.learning_rate_schedule == "constant" else ""
