"""The loop of accelerate's documentation with one more argument: exact for every head, for one all-reduce."""

import math

import pytest
import torch
from accelerate import Accelerator

from hf_gradutils import GradUtilsPlugin
from tests.harness.accelerator_cases import FUSED, HEAD, TOLERANCE, make, run_loop
from tests.harness.counting import collectives, events_of, num_host_syncs
from tests.harness.gradients import norm_of, relative_error, whole_gradients
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import (
    make_data,
    make_model,
    micro_batches_of,
    reset_accelerate,
    truth,
    truth_of_micro_batches,
)

MEANS = [head for head in HEADS if head != "wav2vec2 ctc sum"]
"""Heads that return a mean; a sum is divided by the loop itself."""
IN_LAYOUT = {
    "one_rank": MEANS,
    "ddp2": MEANS,
    "ddp4": [HEAD],
    "fsdp2x2": [HEAD, "t5 seq2seq", "bert classes", "qwen3 moe aux", "plain shifting module"],
    "hsdp2x2": [HEAD, "bert classes"],
    "native_fsdp2x2": [HEAD, "bert tokens"],
    "native_hsdp2x2": [HEAD],
    "tp2": [HEAD, "qwen3 causal"],
    "tp2_fsdp2x2": [HEAD, "qwen3 causal"],
    "ep2_fsdp2x2": ["qwen3 moe aux"],
}


@on_layouts(*IN_LAYOUT)
def test_every_head_is_exact_in_every_layout(layout):
    for head in IN_LAYOUT[layout]:
        rows = make_data(head)
        for accumulation in (8,) if "qwen3 causal" in head else (1, 4) if head == HEAD else (4,):
            parts = micro_batches_of(rows, layout, accumulation) if "moe aux" in head else [rows]
            want, loss = truth_of_micro_batches(head, parts)
            loop = run_loop(head, layout, accumulation, max_norm=math.inf)
            assert len(loop.gradients) == 1
            assert relative_error(loop.gradients[0], want) < TOLERANCE, (head, accumulation)
            assert loop.norms == pytest.approx([norm_of(want)], rel=TOLERANCE)
            assert loop.losses == pytest.approx([loss], rel=TOLERANCE)
            assert loop.num_targets == [HEADS[head].targets(HEADS[head].collate(rows))]


def test_control_the_stock_accelerator_is_not():
    reset_accelerate()
    want, _ = truth("bert tokens", rows := make_data("bert tokens"))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = make_model("bert tokens")
    loader = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=HEADS["bert tokens"].collate)
    model, loader = accelerator.prepare(model, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
    assert relative_error(whole_gradients(model), want) > 1e-2


@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_the_end_of_a_window_is_one_all_reduce_and_no_host_sync(layout):
    loop, loader = make(HEAD, layout, plugin=GradUtilsPlugin(), rows=make_data(HEAD), batch_size=2, optimizer=FUSED)
    torch_own_syncs = len(list(loop.model.parameters()))  # on CPU the fused kernel reads each parameter's step count
    counted = []
    for index, batch in enumerate(loader):
        loop.backward(batch)

        def end():
            loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0)

        events = events_of(end)
        if index:  # the first makes the plan
            counted.append((sum(collectives(events).values()), num_host_syncs(events)))
        steps = events_of(loop.optimizer.step)
        assert not collectives(steps)
        assert num_host_syncs(steps) == torch_own_syncs
        loop.optimizer.zero_grad()
    assert counted == [(0 if layout == "one_rank" else 1, 0)] * len(counted)
    assert counted
