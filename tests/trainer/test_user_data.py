"""Data that is drawn or cannot be cut, loaders and Accelerators of users: as the stock Trainer with the whole batch."""

import logging
import queue
import random
from collections import deque

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset, default_collate

from tests.harness.user_trainers import NUM_ROWS, User, are_close, assert_as_stock, rows, train

AUTO = [("auto", 0.05)]


# ---- Data that is drawn, and generators ----


class Drawn(Dataset):
    """Each row comes from a source once."""

    def __init__(self, kind):
        self.length, self.source = len(rows()), rows()
        if kind == "iterator":
            self.source = iter(self.source)
        if kind == "deque":
            self.source = deque(self.source)
        if kind == "queue":
            self.source = queue.Queue()
            for row in rows():
                self.source.put(row)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if isinstance(self.source, list):
            return self.source.pop(0)
        if isinstance(self.source, deque):
            return self.source.popleft()
        return self.source.get(timeout=1) if isinstance(self.source, queue.Queue) else next(self.source)


@pytest.mark.parametrize("kind", ["iterator", "queue", "deque", "list"])
def test_rows_that_come_once_are_trained_in_their_order(kind):
    user = User(data=Drawn, data_options=(kind,))
    assert are_close(train(user, accumulation=2)[0], train(user, stock=True)[0])


class Source:
    def __init__(self, kind):
        self.generator = {
            "torch": lambda: torch.Generator().manual_seed(0),
            "numpy": lambda: np.random.default_rng(0),
            "old numpy": lambda: np.random.RandomState(0),
            "random": lambda: random.Random(0),
        }[kind]()

    def noisy(self, row):
        generator = self.generator
        drawn = torch.rand((), generator=generator) if isinstance(generator, torch.Generator) else generator.random()
        return {**row, "x": row["x"] + float(drawn)}


class NoisyRows(Source, Dataset):
    def __len__(self):
        return len(rows())

    def __getitem__(self, index):
        return self.noisy(rows()[index])


class NoisyCollator(Source):
    def __call__(self, rows):
        return default_collate([self.noisy(row) for row in rows])


def plain_rows(kind):
    return rows()


@pytest.mark.parametrize("kind", ["torch", "numpy", "old numpy", "random"])
@pytest.mark.parametrize("place", ["data set", "collator"])
def test_generators_of_data_are_as_before_the_check(place, kind):
    in_data = {"data": NoisyRows} if place == "data set" else {"data": plain_rows, "collator": NoisyCollator}
    user = User(**in_data, data_options=(kind,))
    assert are_close(train(user, accumulation=NUM_ROWS)[0], train(user, stock=True)[0])
    assert not are_close(train(User(), stock=True)[0], train(user, stock=True)[0]), "control"


# ---- What cannot be copied or cut ----


def keeps(base, what):
    """In the Trainer and in its model."""

    class Keeps(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.kept = self.model.kept = made(what)

    return Keeps


def made(what):
    if what == "read-only array":
        array = np.ones(4)
        array.flags.writeable = False
        return array
    with torch.inference_mode():
        return torch.ones(4)


@pytest.mark.parametrize("what", ["read-only array", "inference tensor"])
def test_what_cannot_be_written_may_be_kept(what):
    assert_as_stock(User(keeps, (what,)), "one_rank", 2, AUTO)


class Adds:
    """Entries that cannot be cut into rows."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, rows):
        batch = default_collate(rows)
        if self.kind == "sparse":
            return {**batch, "rest": batch["x"].to_sparse()}
        return {**batch, "rest": torch.nested.nested_tensor([row["x"] for row in rows])}


def leaves_the_rest(base):
    class Leaves(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(inputs["x"], inputs["labels"])
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    return Leaves


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_batches_that_cannot_be_cut_train_with_a_warning(kind, caplog):
    user = User(leaves_the_rest, data=plain_rows, collator=Adds, data_options=(kind,))
    with caplog.at_level(logging.WARNING, "hf_gradutils.trainer"):
        got, _ = train(user, accumulation=2)
    assert are_close(got, train(user, stock=True)[0])
    assert "could not be checked to be a mean" in caplog.text


def of_one_row(base, is_for_one):
    class OfOneRow(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            logits, labels = outputs["logits"], inputs["labels"]
            pair = (logits[0], labels[0]) if is_for_one else (logits.flatten(0, 1), labels.flatten())
            loss = nn.functional.cross_entropy(*pair)
            return (loss, outputs) if return_outputs else loss

    return OfOneRow


def test_a_loss_of_the_first_row_of_batches_of_one_trains_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "hf_gradutils.trainer"):
        got, _ = train(User(of_one_row, (True,)), accumulation=NUM_ROWS)
    assert are_close(got, train(User(of_one_row, (False,)), stock=True)[0])
    assert caplog.text.count("the first row of a batch only") == len(caplog.records) == 1


# ---- Loaders and Accelerators of the user's own ----


class Batches:
    """No loader of torch's."""

    def __init__(self, size, has_dataset):
        self.batches = [default_collate(rows()[start : start + size]) for start in range(0, len(rows()), size)]
        if has_dataset:
            self.batch_size, self.dataset = None, [None] * len(rows())

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return map(dict, self.batches)


def own_loader(base, has_dataset):
    class OwnLoader(base):
        def get_train_dataloader(self):
            return Batches(self.args.per_device_train_batch_size, has_dataset)

    return OwnLoader


@pytest.mark.parametrize("has_dataset", [True, False])
def test_a_loader_of_the_users_own_trains(has_dataset):
    assert_as_stock(User(own_loader, (has_dataset,)), "one_rank", 2, AUTO)


def own_accelerator(base):
    class OwnAccelerator(base):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator = Accelerator(cpu=True)

    return OwnAccelerator


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_accelerator_of_the_users_own_is_made_ours(accumulation):
    user = User(own_accelerator)  # which shuffles otherwise
    assert are_close(train(user, accumulation=accumulation)[0], train(user, stock=True)[0])
