"""The whole idea in one loop: one mean over the targets of all micro-batches and ranks, however they split the batch.

    python recipes/minimal.py
    accelerate launch --multi_gpu --num_processes 2 recipes/minimal.py
    torchrun --standalone --nproc_per_node 2 recipes/minimal.py

All three print the same numbers.
"""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_gradutils import clip_gradients, get_sync_ctx, reduce_loss, rescale_gradients

set_seed(0)
accelerator = Accelerator(cpu=not torch.accelerator.is_available())
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
lines = [torch.tensor(list(line)) for line in Path(os.__file__).read_bytes().splitlines() if len(line) > 1]

for step in range(5):
    batch = lines[16 * step : 16 * (step + 1)]  # of Python's own os.py, as bytes; their lengths differ
    rows = batch[accelerator.process_index :: accelerator.num_processes]  # this rank's part
    micro_batches = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    losses, num_targets = [], torch.zeros((), dtype=torch.int64, device=accelerator.device)
    for i, micro_batch in enumerate(micro_batches):
        labels = pad_sequence(micro_batch, batch_first=True, padding_value=-100).to(accelerator.device)
        num_here = (labels[:, 1:] != -100).sum()  # nothing predicts the first byte of a line
        with get_sync_ctx(model, is_optim_step=i == len(micro_batches) - 1):
            loss = model(input_ids=labels.clamp(min=0), labels=labels).loss * num_here  # from a mean to a sum
            loss.backward()
        losses.append(loss.detach())
        num_targets += num_here
    rescale_gradients(model, num_targets)  # divides by the targets of all micro-batches and ranks
    grad_norm = clip_gradients(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss, denominator = reduce_loss(losses, num_targets)
    accelerator.print(f"step {step}  loss {loss / denominator:.6f}  norm {grad_norm:.6f}  targets {denominator:.0f}")
accelerator.end_training()
