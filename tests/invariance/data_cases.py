"""Stock Trainers that are right, and what users feed them with: datasets, loaders and collators of all kinds."""

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer

from tests.harness.heads import HEADS
from tests.harness.trainer_cases import make_data
from tests.invariance.checks import HEAD


class Streamed(IterableDataset):
    def __init__(self, num_rows=16):
        self.num_rows = num_rows

    def __iter__(self):
        yield from make_data(HEAD, self.num_rows)


class Noisy(Dataset):
    """Other rows in each draw, as with augmentation."""

    rows = make_data(HEAD)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if not 0 <= index < len(self.rows):
            raise IndexError(index)
        ids = self.rows[index]["input_ids"].clone()
        ids[torch.randint(len(ids), ())] = 8 + torch.randint(40, ())
        return self.rows[index] | {"input_ids": ids}


def consuming(rows):
    """Takes what it needs out of its rows, as axolotl's collators do."""
    return {name: torch.stack([row.pop(name) for row in rows]) for name in ("input_ids", "labels", "attention_mask")}


def changing(rows):
    """Masks one more label in each call."""
    for row in rows:
        row["labels"][int((row["labels"] != -100).sum()) - 1] = -100
    return HEADS[HEAD].collate(rows)


class OwnLoader(Trainer):
    """Without a train_dataset."""

    def get_train_dataloader(self):
        rows = make_data(HEAD)
        return self.accelerator.prepare(DataLoader(rows, batch_size=4, collate_fn=HEADS[HEAD].collate))


class LoaderOfBatches(Trainer):
    """Its dataset yields whole batches, of which no other batches can be put together."""

    def get_train_dataloader(self):
        rows = make_data(HEAD)
        batches = [HEADS[HEAD].collate(rows[start : start + 4]) for start in range(0, 16, 4)]
        return DataLoader(batches, batch_size=None)


RIGHT = {
    # name: (class, options of train)
    "streamed": (Trainer, {"data": Streamed()}),
    "streamed, each rank its own": (
        Trainer,
        {"data": Streamed(), "arguments": {"accelerator_config": {"dispatch_batches": False}}},
    ),
    "a few streamed": (Trainer, {"data": Streamed(10)}),
    "few": (Trainer, {"data": make_data(HEAD, 7)}),
    "noisy": (Trainer, {"data": Noisy()}),
    "by length": (Trainer, {"arguments": {"train_sampling_strategy": "group_by_length"}}),
    "workers": (Trainer, {"arguments": {"dataloader_num_workers": 1}}),
    "consumes rows": (Trainer, {"data_collator": consuming}),
    "changes rows": (Trainer, {"data_collator": changing}),
    "a loader of its own": (OwnLoader, {}),
}
