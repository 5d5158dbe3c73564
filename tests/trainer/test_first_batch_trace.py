"""The check before training leaves no trace, and collectives in a loss of the user's fit together."""

import collections
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.accelerator import GradUtilsPlugin
from tests.harness.gradients import relative_error
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, make_model, train, truth

TOLERANCE = 1e-5
NO_CHECK = GradUtilsPlugin(check_loss_unit=False)


def token_loss(outputs, labels):
    return cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())


# ---- Collectives in the user's loss ----


class GatheringLosses(GradUtilsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = token_loss(outputs, labels)
        self.gather(outputs, loss.detach())
        return (loss, outputs) if return_outputs else loss

    def gather(self, outputs, loss):
        self.all_losses = self.accelerator.gather(loss)


class GatheringRows(GatheringLosses):
    def gather(self, outputs, loss):
        everyones = self.accelerator.gather(outputs.logits[:, 0].contiguous())
        assert len(everyones) == dist.get_world_size() * len(outputs.logits)


class ReducingRows(GatheringLosses):
    def gather(self, outputs, loss):
        rows = outputs.logits[:, 0].detach().clone()
        dist.all_reduce(rows)


class GatheringByHand(GatheringLosses):
    def gather(self, outputs, loss):
        own = outputs.logits[:, 0].contiguous()
        everyones = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, own)


def ragged_by_rank():
    """Rows with many targets come first on one rank and last on the other: other cuts tell most."""
    data = make_data("bert masked")
    for index, row in enumerate(data):
        num_targets = 9 if index in (0, 1, 14, 15) else 1
        row["labels"] = torch.where(torch.arange(len(row["labels"])) < num_targets, row["input_ids"], -100)
    return data


@on_layouts("ddp2", "fsdp2x2")
@pytest.mark.parametrize("trainer_class", [GatheringLosses, GatheringRows, ReducingRows, GatheringByHand])
def test_collectives_in_a_loss_fit_together_where_ranks_have_other_rows(trainer_class, layout):
    data = ragged_by_rank()
    want, _ = truth("bert masked", data)
    arguments = {"train_sampling_strategy": "sequential"}
    options = {"layout": layout, "trainer_class": trainer_class, "data": data}
    _, tap = train("bert masked", 1, arguments=arguments, **options)
    assert relative_error(tap.steps[0], want) < TOLERANCE


# ---- Traces ----


class Meter:
    def __init__(self):
        self.sum, self.count, self.history = 0.0, 0, []


class Keeping(GradUtilsTrainer):
    """Keeps whatever users keep while they compute a loss."""

    def __init__(self, *args, **kwargs):
        self.calls = 0
        self._losses = []
        self._parts = collections.defaultdict(lambda: collections.defaultdict(list))
        self.seen = {"rows": 0, "names": set()}
        self.running = torch.zeros(2)
        self.array = np.zeros(2)
        self.queue = collections.deque(maxlen=3)
        self.counter = collections.Counter()
        self.meter = Meter()
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["input_ids"].clamp_(max=40)
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        loss, value = outputs[0], float(outputs[0].detach())
        if not hasattr(self, "first_loss"):
            self.first_loss = value
        self.calls += 1
        self._losses.append(value)
        self._parts["train"]["loss"].append(value)
        self.seen["rows"] += len(inputs["input_ids"])
        self.seen["names"].add(random.random())
        self.running.add_(1)
        self.array += np.random.rand()
        self.queue.append(value)
        self.counter["calls"] += 1
        self.meter.sum, self.meter.count = self.meter.sum + value, self.meter.count + 1
        self.meter.history.append(value)
        self.state.num_input_tokens_seen += 1
        self.log({"part": value})
        return outputs if return_outputs else loss

    def kept(self):
        return {
            "calls": self.calls,
            "losses": self._losses,
            "parts": dict(self._parts["train"]),
            "seen": self.seen,
            "running": self.running.tolist(),
            "array": self.array.tolist(),
            "queue": list(self.queue),
            "counter": dict(self.counter),
            "meter": vars(self.meter),
            "first": self.first_loss,
            "tokens": self.state.num_input_tokens_seen,
            "log": [entry["part"] for entry in self.state.log_history if "part" in entry],
        }


class CountingLogs(TrainerCallback):
    def __init__(self):
        self.num_logs = 0

    def on_log(self, args, state, control, **kwargs):
        self.num_logs += 1


@pytest.mark.parametrize("accumulation", [4, 16])
def test_what_the_user_keeps_is_as_without_the_check(accumulation):
    kept, num_logs = [], []
    for plugin in (GradUtilsPlugin(), NO_CHECK):
        random.seed(3)
        np.random.seed(3)
        callback = CountingLogs()
        options = {"grad_plugin": plugin, "callback": callback, "arguments": {"max_steps": 2}}
        trainer, _ = train("bert masked", accumulation, trainer_class=Keeping, **options)
        kept.append(trainer.kept())
        num_logs.append(callback.num_logs)
        assert trainer.calls == 2 * accumulation
    assert kept[0] == kept[1]
    assert num_logs[0] == num_logs[1]
    assert "log" not in vars(trainer)


class CountingModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_model("bert masked")
        self.config = self.net.config
        self.calls, self.lengths = 0, []
        self.register_buffer("running", torch.zeros(1))

    def forward(self, input_ids, labels=None, attention_mask=None):
        self.calls += 1
        self.lengths.append(input_ids.shape[1])
        self.running.mul_(0.9).add_(0.1)
        return self.net(input_ids=input_ids, labels=labels, attention_mask=attention_mask)


class OwnLoss:
    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, labels, num_items_in_batch=None):
        self.calls += 1
        return token_loss(outputs, labels)


def test_what_a_users_model_and_loss_keep_is_as_without_the_check():
    model, loss = CountingModel(), OwnLoss()
    trainer, _ = train("bert masked", 4, model=model, compute_loss_func=loss)
    assert model.calls == len(model.lengths) == loss.calls == 4
    assert model.running.item() == pytest.approx(1 - 0.9**4)
    assert trainer.compute_loss_func is loss


def test_batches_that_a_loss_changes_in_place_are_trained_on_as_they_were():
    class Noisy(GradUtilsTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs["input_ids"].add_(1).remainder_(48)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    taps = [train("bert masked", 2, trainer_class=Noisy, grad_plugin=p)[1] for p in (GradUtilsPlugin(), NO_CHECK)]
    assert relative_error(taps[0].steps[0], taps[1].steps[0]) == 0


def test_random_numbers_of_python_and_numpy_are_drawn_as_without_the_check():
    class Drawing(GradUtilsTrainer):
        drawn = ()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            Drawing.drawn = (*Drawing.drawn, random.random(), np.random.rand(), torch.rand(()).item())
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    drawn = []
    for plugin in (GradUtilsPlugin(), NO_CHECK):
        Drawing.drawn = ()
        train("bert masked", 16, trainer_class=Drawing, grad_plugin=plugin)
        drawn.append(Drawing.drawn[-3 * 16 :])
    assert drawn[0] == drawn[1]
