"""A training loop of the user's own: exact if it goes through ours, else an error before its first step."""

import pytest
import torch
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from hf_gradutils import exact
from hf_gradutils.errors import InvalidArgumentError
from tests.harness.trainer_cases import make_model
from tests.trainer.test_exact import _norm, _trainer


class PlainLoop(Trainer):
    def _inner_training_loop(self, *args, **kwargs):
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        for batch in self.get_train_dataloader():
            self.compute_loss(self.model, self._prepare_inputs(batch)).backward()
            optimizer.step()
        return TrainOutput(1, 0.0, {})


class PlainTrain(Trainer):
    def train(self, *args, **kwargs):
        self.create_optimizer()
        for batch in self.get_train_dataloader():
            self.model(**batch).loss.backward()
            self.optimizer.step()


class SecondOptimizer(PlainTrain):
    """Steps another model first."""

    def train(self, *args, **kwargs):
        other = torch.nn.Linear(2, 2)
        other(torch.ones(2)).sum().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        self.stepped_the_other = True
        super().train()


@pytest.mark.parametrize("trainer_class", [PlainLoop, PlainTrain, SecondOptimizer])
def test_a_loop_past_ours_is_an_error_before_its_first_step(trainer_class, tmp_path):
    trainer = _trainer(exact(trainer_class), tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(InvalidArgumentError, match=f"Exact{trainer_class.__name__} has a training loop of its own"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert getattr(trainer, "stepped_the_other", trainer_class is not SecondOptimizer)


def test_a_loop_past_ours_with_a_model_that_is_made_anew_is_an_error_too(tmp_path):
    trainer = _trainer(exact(PlainLoop), tmp_path)
    trainer.model_init = lambda: make_model("bert classes")
    with pytest.raises(InvalidArgumentError, match="has a training loop of its own"):
        trainer.train()


class WrittenAnew(Trainer):
    """The window of transformers' loop, in a loop of the user's."""

    def _inner_training_loop(self, batch_size=None, args=None, **kwargs):
        self.create_optimizer_and_scheduler(1)
        model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.model_wrapped, self.state = model, TrainerState()
        loader = self.get_train_dataloader()
        num_steps = args.gradient_accumulation_steps
        self.current_gradient_accumulation_steps = num_steps
        self._tr_loss, self._globalstep_last_logged = torch.zeros(()), 0
        batches, count = self.get_batch_samples(iter(loader), num_steps, args.device)
        for index, batch in enumerate(batches):
            self.accelerator.gradient_state._set_sync_gradients(index == num_steps - 1)
            self.training_step(model, batch, count)
        norm = self._get_grad_norm(model)
        self.optimizer.step()
        self.state.log_history.append({"grad_norm": norm.item()})
        return TrainOutput(1, 0.0, {})


class Resumes(Trainer):
    """Steps on gradients of 0 first, as torch does to make the state of an optimizer that is resumed."""

    def train(self, *args, **kwargs):
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.AdamW(self.model.parameters(), lr=0.0).step()
        self.model.zero_grad()
        return super().train(*args, **kwargs)


class Around(Trainer):
    def train(self, *args, **kwargs):
        return super().train(*args, **kwargs)

    def _inner_training_loop(self, *args, **kwargs):
        return super()._inner_training_loop(*args, **kwargs)


@pytest.mark.parametrize("trainer_class", [WrittenAnew, Around, Resumes])
def test_a_loop_through_ours_is_exact(trainer_class, tmp_path):
    want = _norm(_trainer(exact(Trainer), tmp_path))
    assert _norm(_trainer(exact(trainer_class), tmp_path)) == pytest.approx(want, rel=1e-5)
    assert _norm(_trainer(trainer_class, tmp_path)) == pytest.approx(4 * want, rel=1e-4), "the control: stock"
