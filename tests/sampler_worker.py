"""Samples in step with another process: run twice by tests/test_transformers_backend.py, as `sampler_worker.py FOLDER`.

Every forward pass of the model waits for the other process's, as it does where the weights are spread (FSDP, ZeRO-3).
A process that makes one pass more or fewer hangs, or gets the other's marker; what comes out must be what a process
alone samples.
"""

import datetime
import os
import sys

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from outspoken.trainers.rollouts.sampling import SamplingParams
from outspoken.trainers.rollouts.transformers_backend import sample


class Tokenizer:
    pad_token_id = 0


def build():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.4}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=1, pad_token_id=0)).eval()


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    # Rounds: uneven lengths, uneven numbers of prompts and batches, none at all on one side; then `model.generate`.
    rounds = [
        ([[3, 4, 5]] * 3 + [[7] * 9] * 2, [[9, 8]], [12, 12, 2, 7, 5], [3], {}),
        ([[3, 4, 5]], [], [9], [], {}),
        ([], [[2, 3], [4, 5, 6, 7, 8, 9, 10, 11]], [], [6, 1], {"max_batch_tokens": 4}),
        ([[3, 4, 5]], [[9, 8], [9, 8]], [6], [2, 3], {"extra": {"max_time": 1e6}}),
        ([], [[9, 8], [9, 8]], [], [2, 3], {"extra": {"max_time": 1e6}}),
    ]
    alone, together = build(), build()
    passes = []

    def meet(module, args, kwargs):
        passes.append(1)
        count = torch.tensor([len(passes)])
        gathered = [torch.zeros_like(count) for _ in range(2)]
        dist.all_gather(gathered, count)
        assert gathered[0] == gathered[1], gathered

    together.register_forward_pre_hook(meet, with_kwargs=True)

    def synced(unfinished):
        anyone = torch.tensor([int(unfinished)])
        dist.all_reduce(anyone, op=dist.ReduceOp.MAX)
        return bool(anyone.item())

    for number, (first, second, first_caps, second_caps, more) in enumerate(rounds):
        prompt_ids, caps = (first, first_caps) if rank == 0 else (second, second_caps)
        params = SamplingParams(max_new_tokens=12, temperature=0.0, end_ids=(1,), extra=more.pop("extra", {}))
        found = sample(together, prompt_ids, params, tokenizer=Tokenizer(), caps=caps, synced=synced, **more)
        wanted = sample(alone, prompt_ids, params, tokenizer=Tokenizer(), caps=caps)
        assert found.completion_ids == wanted.completion_ids, (number, found, wanted)
        assert found.finished == wanted.finished
        dist.barrier()
    assert not together.training and passes
    with open(os.path.join(folder, f"done-{rank}"), "w") as file:
        file.write(str(len(passes)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
