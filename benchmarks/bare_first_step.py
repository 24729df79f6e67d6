"""The other sides of first_step.py: what one would write by hand, under ``torchrun`` or plain Ray Train.

    torchrun --standalone --nproc-per-node N bare_first_step.py MODEL DATA ROWS LENGTH
    python bare_first_step.py MODEL DATA ROWS LENGTH --ray N

The same model, adapter, data and first step as ``qwen-ray train``: read the records, render the chat
template, tokenise, LoRA by PEFT, DDP, one optimizer step. Says ``first step`` when it is done.
"""

from __future__ import annotations

import json
import sys
from typing import Any

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def first_step(config: dict[str, Any]) -> None:
    """One rank; the process group exists."""
    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, data, rows, length = config["arguments"]
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(name)
    records = []
    with open(data, encoding="utf-8") as f:
        for line in f:
            messages = json.loads(line)["messages"]
            prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
            start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
            ids = tokenizer(whole, add_special_tokens=False).input_ids[:length]
            records.append((ids, [-100] * start + ids[start:]))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=LINEAR, task_type="CAUSAL_LM")
    module = DistributedDataParallel(get_peft_model(model, lora))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=4e-3)
    world = dist.get_world_size()
    mine = records[dist.get_rank() : rows * world : world]
    longest = max(len(ids) for ids, _ in mine)
    ids = torch.tensor([i + [0] * (longest - len(i)) for i, _ in mine])
    labels = torch.tensor([b + [-100] * (longest - len(b)) for _, b in mine])
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in mine])
    module(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    if dist.get_rank() == 0:
        print("first step", flush=True)


def under_torchrun(config: dict[str, Any]) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    first_step(config)
    dist.destroy_process_group()


def under_ray(config: dict[str, Any], workers: int) -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address="local", num_cpus=workers + 1, logging_level="WARNING")
    TorchTrainer(
        first_step,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(name="bare", storage_path=config["storage"]),
    ).fit()


if __name__ == "__main__":
    model_name, file, rows_, length_, *ray_ = sys.argv[1:]
    settings = {"arguments": (model_name, file, int(rows_), int(length_)), "storage": file + ".ray"}
    if ray_:
        under_ray(settings, int(ray_[1]))
    else:
        under_torchrun(settings)
