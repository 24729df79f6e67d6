"""vLLM's side of serve_generate.py, run by the Python of an environment that has vLLM.

Reads a task from standard input as JSON and writes the seconds and tokens of each of its rounds to the file
that the task names. Prompts of a round are given in groups, as the other sides get them.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    task = json.load(sys.stdin)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = {
        name: LoRARequest(name, number, folder)
        for number, (name, folder) in enumerate(task["adapters"].items(), start=1)
    }
    # One slot more than adapters: with all in use, 0.32 answers the base model's prompts by the last one.
    llm = LLM(
        task["model"], dtype="float32", enforce_eager=True, enable_lora=True, max_loras=len(adapters) + 1,
        max_lora_rank=task["rank"], max_model_len=task["context_length"], seed=0,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=task["max_tokens"])

    def generate(group: list[tuple[str | None, list[int]]]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": ids} for _, ids in group]
        loras = [None if name is None else adapters[name] for name, _ in group]
        outs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in outs]

    rounds = []
    generate(task["rounds"][0][0])
    for groups in task["rounds"]:
        start = time.perf_counter()
        made = [ids for group in groups for ids in generate(group)]
        rounds.append({"seconds": time.perf_counter() - start, "made": made})
    with open(task["out"], "w") as file:
        json.dump(rounds, file)


if __name__ == "__main__":
    main()
