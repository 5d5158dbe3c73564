"""What a first pass changes is as before when the second begins."""

import pytest
import torch
from torch import nn

from hf_gradutils import GradUtilsTrainer, WholeBatchLoss
from hf_gradutils.errors import LossUnitError
from tests.harness.heads import VOCAB, PlainModel
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, train

ACCUMULATION, STEPS = 4, 3
LARGE = 2**21
"""Elements of a buffer, more than are kept of the user's own tensors."""


class Queued(PlainModel):
    """Keeps numbers in many ways, as a queue of negatives would be kept."""

    def __init__(self, size):
        super().__init__(shifts=False)
        self.register_buffer("queue", torch.zeros(size))
        self.statistics = nn.BatchNorm1d(VOCAB)
        self.num_calls = 0
        self.calls = []

    def forward(self, input_ids, labels):
        outputs = super().forward(input_ids, labels)
        rows = outputs["logits"].mean(1)
        self.statistics(rows.detach())
        with torch.no_grad():
            self.queue.add_(1)
        self.num_calls += 1
        self.calls.append(torch.is_grad_enabled())
        return outputs | {"rows": rows}


def compare_rows(rows):
    return (rows @ rows.T).logsumexp(-1).mean()


class Counting(GradUtilsTrainer):
    num_losses = 0

    def compute_loss(self, *args, **kwargs):
        self.num_losses += 1
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("size", [4, LARGE])
@on_layouts("one_rank", "ddp2")
def test_state_that_forwards_change_is_changed_once_for_each_micro_batch(layout, size):
    model = Queued(size)
    trainer, _ = train(
        "plain module",
        ACCUMULATION,
        layout=layout,
        trainer_class=Counting,
        model=model,
        data=make_data("plain module", 16 * STEPS),
        arguments={"max_steps": STEPS, "per_device_train_batch_size": 2},
        whole_batch_loss=WholeBatchLoss(embed=lambda model, batch: model(**batch)["rows"], loss=compare_rows),
    )
    assert trainer.num_losses == model.num_calls == ACCUMULATION * STEPS
    assert model.calls == [True] * ACCUMULATION * STEPS
    assert model.queue.unique().tolist() == [ACCUMULATION * STEPS]
    assert model.statistics.num_batches_tracked == ACCUMULATION * STEPS


def test_passes_that_differ_are_an_error():
    def embed(model, batch):
        return model(**batch)["rows"] * (1 + torch.is_grad_enabled())

    with pytest.raises(LossUnitError, match="two forwards of the same micro-batch differ"):
        train("plain module", ACCUMULATION, model=Queued(4), whole_batch_loss=WholeBatchLoss(embed, compare_rows))
