"""The other side of first_step.py: what one would write by hand and start with torchrun.

The same model, adapter, data and first step as ``qwen-ray train``: read the records, render the chat
template, tokenise, LoRA by PEFT, DDP, one optimizer step. Says ``first step`` when it is done.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL, DATA, ROWS, LENGTH = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

torch.set_num_threads(1)
dist.init_process_group("gloo")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
records = []
with open(DATA, encoding="utf-8") as f:
    for line in f:
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        ids = tokenizer(whole, add_special_tokens=False).input_ids[:LENGTH]
        records.append((ids, [-100] * start + ids[start:]))
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules=LINEAR, task_type="CAUSAL_LM"))
model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
mine = records[dist.get_rank() : ROWS * dist.get_world_size() : dist.get_world_size()]
longest = max(len(ids) for ids, _ in mine)
ids = torch.tensor([i + [0] * (longest - len(i)) for i, _ in mine])
labels = torch.tensor([b + [-100] * (longest - len(b)) for _, b in mine])
mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in mine])
model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
if dist.get_rank() == 0:
    print("first step", flush=True)
dist.destroy_process_group()
