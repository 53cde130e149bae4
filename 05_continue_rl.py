"""Stage 5: the remaining RL steps, from the extrapolated policy.      Paper: Alg. 1; Sec. 5.1

    accelerate launch 05_continue_rl.py --config demo --run-dir runs/demo
    accelerate launch 05_continue_rl.py --config demo --run-dir runs/demo --restart merged

Reads   <run-dir>/extrapolated/<start>, the backbone, and the preset's section `train`
Writes  <run-dir>/continued/<start>/...         like train/; steps are counted on, 151 ... 250
        <run-dir>/continued/<start>_merged/...  with --restart merged

--restart adapter trains the jumped adapter on, now of rank r + 1. --restart merged adds it to the
backbone in fp32 and starts a new LoRA: likely the paper's way. --tune full trains all parameters.
The optimizer starts afresh; problems and seeds are those of the uninterrupted run.
"""

import dataclasses
import importlib
import pathlib
import sys
from typing import Literal

from common import UserError
from common.files import adapters, models, read, resume, write
from common.files.config import option, parse
from common.files.stage import Stage, is_writer, run_stage
from common.rl import data, options, policy, training

stage1 = importlib.import_module("01_train_lora_grpo")


@dataclasses.dataclass
class ContinueConfig(stage1.TrainConfig):
    """Stage 1's options, and where to start."""

    start: str = option(
        "next-aligned_alpha1.5", "a folder in <run-dir>/extrapolated, or merged/<name>"
    )
    restart: Literal["adapter", "merged"] = option("adapter", "what becomes of the jump (open)")
    more_steps: int = option(100, "RL steps after the jump (paper: 100)")
    steps: int = option(1, "not an option here: the step of the start plus more_steps")


def find_start(cfg: ContinueConfig) -> tuple[pathlib.Path, int, str]:
    """(folder of the start, its step, the model that it is an adapter on, or that it is)."""
    inside = cfg.start if cfg.start.startswith("merged/") else f"extrapolated/{cfg.start}"
    start = pathlib.Path(cfg.run_dir) / read.safe_path(inside, "--start")
    if not start.is_dir():
        there = ", ".join(sorted(path.name for path in start.parent.glob("[!.]*"))) or "nothing"
        raise UserError(f"{start} not found: run 04_extrapolate.py first (there: {there})")
    info = policy.checkpoint_info(start)
    step, base = info.get("step"), info.get("backbone") or cfg.backbone
    if step is None or step < 0:
        raise UserError(f"{start} has no usable step: run 04_extrapolate.py --overwrite")
    if models.is_model(start):
        return start, step, f"{{run_dir}}/{inside}"
    # A file chooses among the models in the run directory alone.
    is_ours = base.startswith("{run_dir}/") and pathlib.Path(cfg.path(base)).is_dir()
    return start, step, base if is_ours else cfg.backbone


def main() -> None:
    cfg = parse(ContinueConfig, ("train", "continue"), __doc__)
    if cfg.more_steps < 1:
        raise UserError(f"more_steps must be at least 1, not {cfg.more_steps}")
    start, first_step, base = find_start(cfg)
    jump = {} if models.is_model(start) else adapters.read_config(start)
    merge, cfg.steps = cfg.restart == "merged", first_step + cfg.more_steps
    if cfg.tune == "full" and merge:
        raise UserError("--tune full has no adapter to restart: leave out --restart")
    if cfg.tune == "lora" and not merge and jump.get("r", 0) < 2:
        raise UserError(f"{start} has too little to train: --tune full, or --restart merged")
    name = cfg.start.replace("/", "__") + ("_merged" if merge else "")
    folder = pathlib.Path(cfg.run_dir) / "continued" / name
    accelerator = training.start(cfg, folder)
    made_from = {"backbone": cfg.path(cfg.backbone), "base": cfg.path(base), "start": str(start)}
    inputs = {key: resume.quick_hash(path) for key, path in made_from.items()}
    inputs["train_data"] = data.content_hash(cfg.path(cfg.train_data))
    with accelerator.main_process_first():
        stage = Stage(folder, cfg, inputs, (*options.MAY_CHANGE, "more_steps"), grows="steps")
        if stage.done:
            return
        if merge and jump and is_writer() and not (folder / "backbone").exists():
            model, tokenizer = policy.load_backbone(cfg.path(base))
            with write.writing(folder), write.atomic_dir(folder / "backbone") as baked:
                policy.save(policy.with_jump(model, start), tokenizer, baked)
    if merge and jump:
        base = f"{{run_dir}}/continued/{name}/backbone"
    model, tokenizer = policy.load_backbone(cfg.path(base))
    made_of = (base, policy.fingerprint(model))
    if merge:
        model = policy.add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    elif cfg.tune == "full":
        model = policy.train_all(policy.with_jump(model, start) if jump else model)
    else:
        model = policy.load_lora(model, start)
        if jump.get("lora_dropout") and is_writer():
            print(f"{start}: lora_dropout is set to 0, as rollouts have none", file=sys.stderr)
    stage1.train(training.prepare(cfg, accelerator, model, tokenizer, made_of), folder, first_step)
    stage.finish()
    accelerator.print(f"done: steps {first_step + 1} to {cfg.steps}, checkpoints in {folder}")
    accelerator.end_training()


if __name__ == "__main__":
    run_stage(main)
