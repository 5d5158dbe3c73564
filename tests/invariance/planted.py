"""What users write around a Trainer, right and wrong: mixins to put in front of a Trainer class, ours or not."""

import dataclasses
from collections import Counter

import torch
from accelerate import PartialState
from torch import nn
from transformers import BatchEncoding

from tests.harness.heads import HEADS
from tests.harness.trainer_cases import make_data, make_model
from tests.invariance.checks import HEAD


def token_losses(model, batch):
    """The sum of the cross entropies of all targets; ``batch`` has input_ids, labels and attention_mask."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


# ---- compute_loss ----


class CountedLoss:
    """Right with the stock Trainer, whose gradients are averaged over ranks."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num_items = (inputs["labels"][:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return token_losses(model, inputs) / num_items * self.num_ranks()

    def num_ranks(self):
        return self.accelerator.num_processes


class RanksOfTheArguments(CountedLoss):
    def num_ranks(self):
        return self.args.world_size


class RanksOfTorch(CountedLoss):
    def num_ranks(self):
        return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class RanksOfTheState(CountedLoss):
    def num_ranks(self):
        return PartialState().num_processes


class RanksForgotten(CountedLoss):
    def num_ranks(self):
        return 1


class OwnMean(CountedLoss):
    """The micro-batch's own mean."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return token_losses(model, inputs) / (inputs["labels"][:, 1:] != -100).sum()


class MeanTimesRanks(OwnMean):
    """Wrong with the stock Trainer as well."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * PartialState().num_processes


def count_odd_classes(batch):
    labels = batch["labels"][:, 1:]
    return ((labels != -100) & (labels % 2 == 1)).sum()


class MeanOfOddClasses:
    """A mean over some of the targets only."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"].masked_fill(inputs["labels"] % 2 == 0, -100)
        return token_losses(model, inputs | {"labels": labels}) / count_odd_classes(inputs).clamp(min=1)


class Gathers(CountedLoss):
    """Looks at all ranks in its loss, as metrics do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.seen_by_all = self.accelerator.gather(loss.detach()[None])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.seen_by_all)
            torch.distributed.barrier()
        self.accelerator.wait_for_everyone()
        return loss


class FewRows(CountedLoss):
    """Cannot run the whole batch of two ranks at once."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if len(inputs["labels"]) > 4:
            raise RuntimeError("more than 4 rows")
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


def counted_loss(outputs, labels, num_items_in_batch=None):
    """A loss function of the user's, whose head shifts."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


# ---- training_step ----


class TwoSteps:
    """The same loss twice, as R-Drop and adversarial training do with two different ones."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        first = super().training_step(model, dict(inputs), num_items_in_batch)
        return first + super().training_step(model, dict(inputs), num_items_in_batch)


class OwnStep:
    """The mean of a micro-batch through its own backward."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return self.go_back(loss)

    def go_back(self, loss):
        self.accelerator.backward(loss)
        return loss.detach()


class PlainBackward(OwnStep):
    def go_back(self, loss):
        loss.backward()
        return loss.detach()


class SecondBackward(OwnStep):
    def go_back(self, loss):
        self.accelerator.backward(loss, retain_graph=True)
        self.accelerator.backward(loss)
        return 2 * loss.detach()


class PlainSecondBackward(OwnStep):
    def go_back(self, loss):
        self.accelerator.backward(loss, retain_graph=True)
        loss.backward()
        return 2 * loss.detach()


class Added(OwnStep):
    """What :class:`SecondBackward` comes to, in one backward."""

    def go_back(self, loss):
        self.accelerator.backward(loss + loss)
        return 2 * loss.detach()


class DividesByAccumulation(OwnStep):
    def go_back(self, loss):
        self.accelerator.backward(loss / self.args.gradient_accumulation_steps)
        return loss.detach() / self.args.gradient_accumulation_steps


class DividesAndGoesBack(OwnStep):
    """The old pattern, past accelerate."""

    def go_back(self, loss):
        loss = loss / self.args.gradient_accumulation_steps
        loss.backward()
        return loss.detach()


class MeansAreDivided:
    """The stock Trainer divides by the number of micro-batches."""

    loss_is_scaled_for_ga = False


class MeanOfRows:
    """The mean over rows of each row's mean, which a mean of equal micro-batches gives as well."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return mean_of_rows(model, inputs)


def mean_of_rows(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).mean()


def gradient_of_rows():
    model = make_model(HEAD).double()
    mean_of_rows(model, HEADS[HEAD].collate(make_data(HEAD))).backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ---- Batches ----


class LooksAtBatches:
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        assert len(batches) == num_batches
        num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches).to(device)
        return batches, self.accelerator.gather(num_items).sum()


def as_tuple(rows):
    batch = HEADS[HEAD].collate(rows)
    return batch["input_ids"], batch["attention_mask"], batch["labels"]


def as_encoding(rows):
    return BatchEncoding(HEADS[HEAD].collate(rows))


@dataclasses.dataclass
class Sentences:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def __contains__(self, name):  # the stock Trainer asks for labels
        return hasattr(self, name)

    def __len__(self):
        return len(self.labels)


def as_object(rows):
    return Sentences(**HEADS[HEAD].collate(rows))


class UnpacksBatches:
    """Reads a batch of any of these types; the mean over rows of each row's mean."""

    loss_is_scaled_for_ga = False  # the stock Trainer divides by the number of micro-batches

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if isinstance(inputs, tuple):
            input_ids, attention_mask, labels = inputs
        else:
            input_ids, attention_mask, labels = inputs.input_ids, inputs.attention_mask, inputs.labels
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        return (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


# ---- Neither side trains ----


class Detached:
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs).detach()


class DetachedInside(CountedLoss):
    """A loss with a graph that leads to no parameter that is trained."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch).detach()
        return loss + 0.0 * sum(p.sum() for p in model.parameters())


def only_unused(model):
    for p in model.parameters():
        p.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(3))
    return model


# ---- Random numbers ----


class RandomTimesteps:
    """Each row at a random point of time, as diffusion models are trained."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return (logits.square().mean((1, 2)) * torch.rand(len(logits), device=logits.device)).mean()


class RandomWeight(CountedLoss):
    """One number for all rows: equal on all sides with equal seeds."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * torch.rand(())


class WarmsUp(CountedLoss):
    """A loss that differs between two equal calls, without random numbers."""

    num_calls = [0]  # noqa: RUF012 - out of reach of the check

    def compute_loss(self, *args, **kwargs):
        self.num_calls[0] += 1
        return super().compute_loss(*args, **kwargs) * (1 + self.num_calls[0])


# ---- Traces ----


class LeavesTraces(CountedLoss):
    """Logs, counts and collects in every call."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_calls, self.seen, self.parts = 0, [], {"losses": [], "kinds": Counter()}
        self.running = torch.zeros(2)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.num_calls += 1
        self.seen.append(loss.item())
        self.parts["losses"].append(loss.item())
        self.parts["kinds"]["loss"] += 1
        self.running += loss.item()
        self.model.num_forwards = getattr(self.model, "num_forwards", 0) + 1
        self.log({"part": loss.item()})
        return loss

    def traces(self):
        own = self.num_calls, list(self.seen), repr(self.parts), self.running.tolist()
        return *own, getattr(self.model, "num_forwards", None), list(self.state.log_history), self.state.global_step
