"""What can be wrong is found before the first command runs, and not hours later.

`--check` also fetches the model and the problems, and says what the runs will need.
"""

import contextlib
import dataclasses
import importlib
import itertools
import math
import pathlib
import shlex

import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig

from common import UserError, in_one_line
from common.files import config, write
from common.reproduce import plans
from common.rl import data, memory, policy, training, verifier

STAGES = plans.TABLES["options"]  # stage -> the class of its options, the preset's sections
GPU = 80e9  # bytes of a GPU where none is here
COPIES = 6  # two resume states, each with the weights and AdamW's two moments


def options_of(stage: str, argv: list[str]):
    """The options of the stage "01" ... "06" by the flags `argv`."""
    script, (name, *sections) = plans.TABLES["scripts"][stage], STAGES[stage]
    kind = getattr(importlib.import_module(script.removesuffix(".py")), name)
    return config.parse(kind, sections, "", argv)


def options(name: str, root: str) -> list:
    """The options of the six stages. UserError for options or data that a stage would refuse."""
    found = [options_of(stage, ["--config", name, "--run-dir", root]) for stage in STAGES]
    known = {key for cfg in found for key in vars(cfg)}
    for key in config.load_preset(name).get("shared", {}).keys() - known:
        raise UserError(f"preset {name}: unknown key {key} in shared; {config.nearest(key, known)}")
    for flag, spec, cfg in sources(name, found)[1:]:  # stage 1 comes first and sees for itself
        path = pathlib.Path(data.place(spec))  # what `prepare` makes may not be there yet
        if path.is_file() or (path.suffix in data.FILE_TYPES and not path.is_relative_to(root)):
            problems = data.load_problems(spec, flag, **cfg.columns)
            verifier.Verifier(answer_format=cfg.answer_format).check(problems)
    specs = map(found[-1].path, found[-1].test_data)  # together: two may have one name
    here = [spec for spec in specs if pathlib.Path(data.place(spec)).is_file()]
    data.load_tasks(here, **found[-1].columns)
    return found


def sources(name: str, found: list) -> list[tuple]:
    """(flag, data, the options of its stage) of all problems. found: the options of the stages."""
    train, *_, later, test = found
    wanted = plans.values_of(name, config.load_preset(name))["reproduce"]
    tests = dict.fromkeys([*test.test_data, *wanted["domains"], wanted["validation_data"]])
    specs = [("--train-data", train.train_data, train), ("--eval-data", train.eval_data, train)]
    if (later.train_data, later.columns) != (train.train_data, train.columns):  # of stage 5
        specs.append(("--train-data", later.train_data, later))
    specs += [("--test-data", spec, test) for spec in tests]
    return [(flag, cfg.path(spec), cfg) for flag, spec, cfg in specs if spec]


def summary(jobs: list[plans.Job], wanted: dict, cfg) -> str:
    """How much there is to do. wanted: the preset's `reproduce`; cfg: the options of stage 1."""
    steps = sum(job.work for job in jobs if job.stage in ("01", "05"))
    hours = steps * wanted["gpu_hours_per_step"]
    told = f", {hours:.0f} GPU hours and the evaluation" if hours else ""
    with contextlib.suppress(UserError):  # no such model, or none that can be trained
        size = f"{disk(jobs, cfg.save_every, *sizes_of(cfg, wanted)) / 1e9:.2g}"
        told += f", {float(size):g} GB of checkpoints"
    return f"{len(jobs)} commands, {steps:.0f} RL steps{told}"


def check(name: str, preset: dict, root: str, jobs: list[plans.Job]) -> None:
    """Prints what the runs need. UserError, at the end, where something is missing or unlike what
    is known of it."""
    train, *_ = found = options(name, root)
    wanted, wrong, tokenizer = plans.values_of(name, preset)["reproduce"], [], None
    print(f"free on the disk: {write.free_bytes(pathlib.Path(root)) / 1e9:.1f} GB")
    try:
        training.check_prepared(train, train.backbone, train.train_data)
        _, tokenizer = policy.load_backbone(train.path(train.backbone))
    except UserError as error:
        wrong.append(f"missing: {error}")
    if backbone := architecture(train, wanted):
        kinds = {"": (backbone, train)}
        if any("merged" in job.argv for job in jobs):
            fp32 = architecture(train, wanted)  # a second object
            fp32.dtype = torch.float32
            kinds["after a merged restart, "] = (fp32, train)
        if any("full" in job.argv for job in jobs):
            argv = ["--config", name, "--tune", "full", *shlex.split(wanted["full_flags"])]
            kinds["without LoRA, "] = (backbone, options_of("01", argv))
        for kind, of in kinds.items():
            try:
                print(f"{kind}{needs(*of, jobs)}")
            except UserError as error:
                wrong.append(f"{kind}{error}")
    for flag, spec, cfg in sources(name, found):
        try:
            wrong += counted(flag, spec, cfg, tokenizer)
        except UserError as error:
            wrong.append(f"missing: {error}")
    print("\n".join([summary(jobs, wanted, train), *wrong]))
    if wrong:
        raise UserError(f"of model and data, {len(wrong)} are not as they should be, see above")


def counted(flag: str, spec: str, cfg, tokenizer) -> list[str]:
    """Prints how many problems `spec` has; returns in what it is not as benchmarks.yaml says."""
    problems = data.load_problems(spec, flag, **cfg.columns)
    print(f"{spec}: {len(problems)} problems")
    if tokenizer:  # which says on stderr what is too long
        turns = (cfg.prompt_template, cfg.system_prompt, cfg.max_prompt_tokens)
        data.encode_prompts(problems, tokenizer, *turns, spec)
    name, _, source = data.parse_spec(spec)
    known = source.rows if source and "/" not in name else len(problems)  # of mmlu-pro/law: open
    near = known / 20 if source and source.around[0] else 0  # DAPO repeats its problems
    odd = f"unlike what is known: {spec} has {len(problems)} problems, not {known}"
    return [odd] if abs(len(problems) - known) > near else []


def needs(backbone, cfg, jobs: list[plans.Job]) -> str:
    """What a GPU will hold; UserError where it is too small. backbone: its configuration; cfg: the
    options of stage 1."""
    cfg.engine, shards = "vllm" if cfg.engine == "auto" else cfg.engine, 1  # as where a GPU is
    given = dict(itertools.pairwise(jobs[-1].argv))
    processes = int(given.get("--num_processes", 1))
    if file := given.get("--config_file"):
        launcher = load_config_from_file(file)
        processes = int(given.get("--num_processes", launcher.num_processes))
        shards = processes if launcher.distributed_type == "FSDP" else 1
    total = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else GPU
    with in_one_line(f"memory of {cfg.backbone} is not known", policy.WANTED):
        parts = memory.plan(backbone, cfg, shards, processes=processes)
    return memory.told(parts, cfg, total)


def architecture(cfg, wanted: dict):
    """The backbone's configuration: its config.json if that is here, else the one in the preset's
    `reproduce`. None where neither is."""
    with contextlib.suppress(OSError, ValueError):
        safe = {"local_files_only": True, "trust_remote_code": False}
        return AutoConfig.from_pretrained(cfg.path(cfg.backbone), **safe)
    known = wanted["architecture"]
    return AutoConfig.for_model(**known) if known else None


def sizes_of(cfg, wanted: dict) -> tuple[int, int]:
    """Bytes of a checkpoint in fp32, of a LoRA and of the whole model. UserError: unknown."""
    backbone = architecture(cfg, wanted)
    with in_one_line(f"cannot load backbone {cfg.backbone}", policy.WANTED):
        both = (cfg, dataclasses.replace(cfg, tune="full"))
        models = [memory.on_paper(backbone, one) for one in both]
    return tuple(4 * sum(p.numel() for p in policy.trained(m).values()) for m in models)


def disk(jobs: list[plans.Job], every: int, adapter: float, whole: float) -> float:
    """Bytes of all checkpoints and resume states; adapter, whole: those of one in fp32."""
    total, folders = 0.0, {}
    for job in jobs:
        if job.stage in ("01", "05"):
            size = whole if "full" in job.argv else adapter
            given = dict(itertools.pairwise(job.argv))
            total += size * math.ceil(job.work / int(given.get("--save-every", every)))
            # Stage 1 goes on in one folder, stage 5 has one a start; the merged model is in it.
            folder = job.name if "--start" in given else given["--run-dir"]
            folders[folder] = COPIES * size + (whole if "merged" in job.argv else 0)
    return total + sum(folders.values())
