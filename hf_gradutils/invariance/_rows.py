"""The rows that a Trainer's loader would draw, and batches of them."""

import copy
import itertools
import random
from typing import Any

from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import ConcatDataset, IterableDataset

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.invariance._as_before import seed_all
from hf_gradutils.invariance._one_batch import alike, can_be_cut


class NoRowsError(InvalidArgumentError):
    """A loader has no rows of which other batches could be made."""


class TrainRows:
    """Rows of a Trainer's train dataset, and its collator.

    Args:
        trainer: Whose ``get_train_dataloader`` is asked. Of several datasets the rows come from the first.

    Raises:
        NoRowsError: the loader has no rows that could be collated in another way.
    """

    def __init__(self, trainer: Any):
        loader = trainer.get_train_dataloader()
        self._dataset: Any = getattr(loader, "dataset", None)
        self._collate: Any = getattr(loader, "collate_fn", None)
        while isinstance(self._dataset, IterableDatasetShard):  # of this rank's rows only
            self._dataset = self._dataset.dataset
        self.num_datasets = len(self._dataset.datasets) if isinstance(self._dataset, ConcatDataset) else 1
        """Of which only the first is read."""
        seed = getattr(trainer.args, "data_seed", None)
        self._seed = trainer.args.seed if seed is None else seed
        makes_batches = getattr(loader, "batch_size", 1) is None and getattr(loader, "batch_sampler", None) is None
        if self._dataset is None or self._collate is None or makes_batches:
            raise NoRowsError(
                f"the rows of a {type(loader).__name__} cannot be put together to other batches: the check needs a "
                "DataLoader with a dataset of rows and a collate_fn"
            )

    def some(self, num_rows: int) -> list[Any]:
        """Rows from anywhere in a dataset that has an order, the first of a stream; fewer if there are fewer.

        The same for the same seed of the arguments.
        """
        dataset = self._dataset.datasets[0] if isinstance(self._dataset, ConcatDataset) else self._dataset
        return drawn_rows(dataset, num_rows, self._seed)

    def collate(self, rows: list[Any], seed: int) -> Any:
        """A batch of copies of rows, which a collator may change or consume."""
        try:
            own = copy.deepcopy(rows)
        except Exception:  # handles and the like, of which every library has an error of its own
            own = list(rows)
        seed_all(seed)  # collators may draw too
        return self._collate(own)

    def drawn_batch(self, rows: list[Any]) -> Any:
        """The batch of all rows, if the collator draws random numbers and the batch can be cut; else None."""
        batch = self.collate(rows, seed=0)
        if alike(batch, self.collate(rows, seed=1)):
            return None
        return batch if can_be_cut(batch, len(rows), self.collate(rows[:1], seed=0)) else None


def drawn_rows(dataset: Any, num_rows: int, seed: int) -> list[Any]:
    """So many rows drawn at random, or all; the first ones of a dataset without numbers.

    Datasets are often sorted, by class or by length, and the first rows then have no differences to show.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return list(itertools.islice(iter(dataset), num_rows))
    try:
        length = len(dataset)
    except (TypeError, NotImplementedError):
        return list(itertools.islice(iter(dataset), num_rows))
    return [dataset[index] for index in random.Random(seed).sample(range(length), min(num_rows, length))]
