"""Stage 5: the remaining RL steps, from the extrapolated policy.              Paper: Sec. 5.1

    python 05_continue_rl.py --config demo --run-dir runs/demo --restart merged   # one GPU, or none
    accelerate launch --quiet --num_processes 2 05_continue_rl.py --config demo --run-dir runs/demo

Reads   <run-dir>/extrapolated/<start>, backbone, problems; the sections `train`, `continue`
Writes  <run-dir>/continued/<start>, <start>_merged or <name>, like train/, with steps to 250

--restart merged adds the jump to the backbone, saved in fp32, and starts a new LoRA: likely the
paper's way. A start that is a whole model gets a new LoRA too. KL is against the model below the
LoRA, as in TRL and verl: after a merged restart that is the jumped one. GPUs round it to bf16: a
part of a small jump is lost. The optimizer is new; problems and seeds are as without a jump.
"""

import dataclasses
import importlib
import pathlib
from typing import Literal

from common import UserError
from common.files import adapters, models, write
from common.files.config import HIDDEN, option, parse
from common.files.read import quick_hash, safe_name
from common.files.stage import Stage, is_writer, run_stage
from common.rl import data, options, policy, training

stage1 = importlib.import_module("01_train_lora_grpo")


@dataclasses.dataclass
class ContinueConfig(stage1.TrainConfig):
    """Where to start, and how far to go."""

    start: str = option("next-aligned_alpha1.5", "in extrapolated/; or merged/<name>; or a path")
    restart: Literal["adapter", "merged"] = option("adapter", "train it, or merge it: a new LoRA")
    name: str = option("", "folder of continued/ to write [the name of the start]")
    more_steps: int = option(100, "RL steps after the jump (paper: 100)")
    steps: int = option(1, HIDDEN)  # the step of the start plus more_steps


def main() -> None:
    cfg = parse(ContinueConfig, ("train", "continue"), __doc__)
    start, first_step, base = models.find_start(cfg)
    jump = {} if models.is_model(start) else adapters.read_config(start)
    merge = cfg.restart == "merged" or (cfg.tune == "lora" and not jump)  # a whole model has none
    cfg.steps = first_step + cfg.more_steps
    if cfg.tune == "full" and merge:
        raise UserError("--tune full has no adapter to restart: leave out --restart")
    if cfg.tune == "lora" and not merge and jump.get("r", 0) < 2 and base != cfg.backbone:
        raise UserError(f"{start}: rank 1 on a whole model. --tune full, or --restart merged")
    last = cfg.start if cfg.start.startswith("merged/") else pathlib.Path(cfg.start).name
    name = cfg.name or last.replace("/", "__") + ("_merged" if merge else "")
    folder = pathlib.Path(cfg.run_dir) / "continued" / safe_name(name, "--name")
    accelerator = training.start(cfg, folder)
    made_from = {"backbone": cfg.path(cfg.backbone), "base": cfg.path(base), "start": str(start)}
    inputs = {key: quick_hash(path) for key, path in made_from.items()}
    inputs["train_data"] = data.content_hash(cfg.path(cfg.train_data))
    with accelerator.main_process_first():
        stage = Stage(folder, cfg, inputs, options.MAY_CHANGE, options.grows(cfg))
        if stage.done:
            return
        if merge and jump and is_writer() and not (folder / "backbone").exists():
            model, tokenizer = policy.load_backbone(cfg.path(base))
            with write.atomic_dir(folder / "backbone") as baked:
                policy.save(policy.with_jump(model, start), tokenizer, baked)
    if merge and jump:
        base = f"{{run_dir}}/continued/{name}/backbone"
    model, tokenizer = policy.load_backbone(cfg.path(base))
    made_of = (base, policy.fingerprint(model))  # of the model below the adapter
    if merge:
        model = policy.add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    elif cfg.tune == "full":
        model = (policy.with_jump(model, start) if jump else model).requires_grad_(True)
    else:
        model = policy.load_lora(model, start)
    stage1.train(training.prepare(cfg, accelerator, model, tokenizer, made_of), stage, first_step)


if __name__ == "__main__":
    run_stage(main)
