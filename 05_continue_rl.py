"""Stage 5: the remaining RL steps, from the extrapolated policy.                            Paper: Alg. 1, Sec. 5.1 (100 more steps)

    accelerate launch 05_continue_rl.py --config demo --run-dir runs/demo --start next-weighted_alpha1.5
    accelerate launch 05_continue_rl.py --config demo --run-dir runs/demo --start next-weighted_alpha1.5 --restart merged

Reads   <run-dir>/extrapolated/<start>, the backbone, and the section `train` of the preset (it is the same loop: stage 1's)
Writes  <run-dir>/continued/<start>/...       same layout as train/; steps are counted on, 151 ... 250
        <run-dir>/continued/<start>_merged/...  with --restart merged

--restart adapter   (default) the jumped adapter, now of rank r + 1, is trained on
--restart merged    the jump is baked into the backbone, in fp32, and a new LoRA starts on it; the paper most likely did this
--tune full         the jump is added to the weights, in fp32, and all parameters are trained on

Either way the optimizer starts afresh. Problems and rollout seeds are those the uninterrupted run meets at the same step, so the runs
differ in their start and in nothing else.
"""

import dataclasses
import importlib
import pathlib
from typing import Literal

from common import UserError
from common.files import config as configs
from common.files import deltas as delta_files
from common.files import models as model_files
from common.files import read as inputs
from common.files import write as run_dir
from common.files.write import atomic_dir, writing
from common.rl import data, policy

stage1 = importlib.import_module("01_train_lora_grpo")


@dataclasses.dataclass
class ContinueConfig(stage1.TrainConfig):
    """Stage 1's options (from the preset's section `train`), and where to start."""

    start: str = stage1.option("next-weighted_alpha1.5", "what to go on from: a folder in <run-dir>/extrapolated")
    restart: Literal["adapter", "merged"] = stage1.option(
        "adapter", "train the jumped adapter on, or bake it in and start a new one (open)"
    )
    more_steps: int = stage1.option(100, "RL steps after the jump (paper: 100)")
    steps: int = stage1.option(1, "not an option here: the last step is that of the start plus more_steps")


def with_jump(backbone, start: pathlib.Path):
    """The backbone with the adapter `start` merged in, in fp32 (in bf16 a rank-1 update of RL's size mostly rounds away)."""
    return policy.load_lora(backbone, start).float().merge_and_unload()


def bake(backbone: str, start: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the model `backbone` (a folder or hub id) with the jump to the folder `out`, all or nothing."""
    model, tokenizer = policy.load_backbone(backbone)
    jumped = with_jump(model, start)
    policy.drop_sampling_defaults(jumped)
    with writing(out), atomic_dir(out) as folder:
        run_dir.save_pretrained(folder, jumped, tokenizer)


def main() -> None:
    cfg = configs.parse(ContinueConfig, ("train", "continue"), __doc__)
    if cfg.more_steps < 1:
        raise UserError(f"more_steps must be at least 1, not {cfg.more_steps}")
    run = pathlib.Path(cfg.run_dir)
    start = run / "extrapolated" / inputs.safe_name(cfg.start, "--start")
    if not start.is_dir():
        there = sorted(path.name for path in start.parent.glob("[!.]*"))
        raise UserError(f"{start} not found: run 04_extrapolate.py first (there: {', '.join(there) or 'nothing'})")
    begun = policy.checkpoint_info(start)
    first_step = begun.get("step")
    if first_step is None or first_step < 0:
        raise UserError(f"{start}/checkpoint.json has no usable step: run 04_extrapolate.py --overwrite")
    whole = delta_files.kind_of(run) == "full"
    name = (begun.get("backbone") or cfg.backbone) if whole else cfg.backbone  # what the adapter is on
    below = {*model_files.open_model(model_files.find_model(cfg.path(name))).files.values()} if whole else {}
    if cfg.tune == "full" and cfg.restart == "merged":
        raise UserError("--tune full has no adapter to restart: the jump is always added to the weights; leave out --restart")
    if cfg.tune == "lora" and cfg.restart == "adapter" and whole:
        raise UserError(f"{start} is an adapter of rank 1 on a whole model, too little to train: --tune full, or --restart merged")
    cfg.steps = first_step + cfg.more_steps
    folder = run / "continued" / (cfg.start + ("_merged" if cfg.restart == "merged" else ""))
    accelerator = stage1.start_accelerator(cfg, folder)
    stage = run_dir.Stage(
        folder,
        configs.as_dict(cfg),
        [*data.local_files(cfg.path(cfg.train_data)), start / "adapter_model.safetensors", *sorted(below)],
        (*stage1.MAY_CHANGE, "more_steps"),
    )
    with accelerator.main_process_first():
        if stage.is_done(cfg.overwrite, at_least=("steps", cfg.steps), writer=accelerator.is_main_process):
            return
        if cfg.restart == "merged" and accelerator.is_main_process and not (folder / "backbone").exists():
            bake(cfg.path(name), start, folder / "backbone")
    if cfg.restart == "merged":
        name = f"{{run_dir}}/continued/{folder.name}/backbone"
    backbone, tokenizer = policy.load_backbone(cfg.path(name))
    info = {"backbone": name, "backbone_fingerprint": policy.fingerprint(backbone)}
    if cfg.tune == "full":
        model = policy.train_all(with_jump(backbone, start))
    elif cfg.restart == "merged":
        model = policy.add_lora(backbone, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    else:
        model = policy.load_lora(backbone, start)
    stage1.train(cfg, policy.place(model, accelerator.device), tokenizer, accelerator, folder, first_step, info)
    if accelerator.is_main_process:
        stage.finish()
        print(f"done: steps {first_step + 1} to {cfg.steps}, checkpoints in {folder}")
    accelerator.end_training()


if __name__ == "__main__":
    configs.run_stage(main)
