"""Training steps of PyTorch, some a line: run by `benchmarks/against_torch.py` in an environment
that has torch and transformers.

python benchmarks/torch_worker.py FORM THREADS ROWS LENGTH

FORM is `eager`, `grouped_mm` or `compiled`: how transformers' Mixtral runs its experts, the last by
torch.compile over the model. Of each line of the standard input, a number of steps, it prints the
seconds of each as a JSON list; for `memory`, the most bytes of memory that the process has had.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.memory import peak_bytes

VOCAB_SIZE = 8192


def make_step(form: str, rows: int, length: int) -> Callable[[], None]:
    """A training step: loss, gradients, their norm, AdamW; float32."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=length,
        use_cache=False,
        sliding_window=None,
    )
    experts = "eager" if form == "eager" else "grouped_mm"
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation=experts, attn_implementation="sdpa"
    )
    model.train()
    run = torch.compile(model) if form == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, VOCAB_SIZE, (rows, length))

    def step() -> None:
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def main(form: str, threads: str, rows: str, length: str) -> None:
    """Answers the lines of the standard input."""
    torch.set_num_threads(int(threads))
    step = make_step(form, int(rows), int(length))
    for _ in range(2):
        step()
    print(json.dumps([]), flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(json.dumps([peak_bytes()]), flush=True)
            continue
        times = []
        for _ in range(int(line)):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
