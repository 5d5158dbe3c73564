"""Tokens, operations, samples, steps, epochs and log entries are those of the stock Trainer; padding is not booked."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.trainer._bookkeeping import Operations
from tests.harness.layouts import on_layouts
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import make_data, train

HEAD = "llama causal"
EQUAL = "bert classes"
"""A head without a shift."""
TOKENS = pytest.mark.parametrize("tokens", ["all", "non_padding"])


def make_rows(head, num_rows):
    """Rows that end in padding of their own, of which the first has none."""
    rows = make_data(head, num_rows)
    for index, row in enumerate(rows):
        num_left_out = index % 5
        if num_left_out:
            row["attention_mask"] = row["attention_mask"].clone()
            row["attention_mask"][-num_left_out:] = 0
            if head == HEAD:
                row["labels"] = row["labels"].clone()
                row["labels"][-num_left_out:] = -100
    return rows


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class SizedStream(Stream):
    def __len__(self):
        return len(self.rows)


def books_of(trainer, metrics):
    """All that is booked, without what differs by design or by the clock."""
    state = trainer.state
    rows = [{k: v for k, v in entry.items() if not _is_left_out(k)} for entry in state.log_history]
    return {
        "steps": (state.global_step, state.max_steps, state.num_train_epochs, state.epoch),
        "tokens": state.num_input_tokens_seen,
        "operations": state.total_flos,
        "samples": round(metrics["train_samples_per_second"] * metrics["train_runtime"]),
        "log": rows,
        "names": [sorted(entry.keys() - {"num_targets"}) for entry in state.log_history],
    }


def _is_left_out(name):
    by_design = ("loss", "train_loss", "grad_norm", "num_targets")
    return name in by_design or name.endswith(("_runtime", "_per_second"))


def trained(trainer_class, head, accumulation, data, *, callback=None, resume=None, **arguments):
    """The Trainer after a training, and its last metrics."""
    told = {"learning_rate": 0.0, "include_num_input_tokens_seen": "all", "per_device_train_batch_size": 2}
    trainer, _ = train(
        head,
        accumulation,
        trainer_class=trainer_class,
        data=data,
        arguments=told | {"max_steps": -1, "num_train_epochs": 2} | arguments,
        callback=callback,
        resume=resume,
        taps=False,
    )
    return trainer, trainer.state.log_history[-1]


def both(*args, **kwargs):
    return [books_of(*trained(trainer_class, *args, **kwargs)) for trainer_class in (GradUtilsTrainer, Trainer)]


NO_DISPATCH = {"accelerator_config": {"dispatch_batches": False}}
SPLIT = {"accelerator_config": {"split_batches": True}}
CASES = {
    "whole windows": (HEAD, list, 16, {}),
    "a short last window": (HEAD, list, 14, {}),
    "a short last batch": (HEAD, list, 13, {}),
    "drop_last": (HEAD, list, 13, {"dataloader_drop_last": True}),
    "split batches": (HEAD, list, 14, SPLIT),
    "grouped by length": (HEAD, list, 14, {"train_sampling_strategy": "group_by_length"}),
    "steps instead of epochs": (HEAD, list, 14, {"max_steps": 5}),
    "logs seldom": (HEAD, list, 14, {"logging_steps": 2, "logging_first_step": True}),
    "sized stream": (HEAD, SizedStream, 14, NO_DISPATCH),
    "dispatched sized stream": (EQUAL, SizedStream, 14, {}),
    "dispatched and split sized stream": (EQUAL, SizedStream, 14, SPLIT),
    "stream": (HEAD, Stream, 24, NO_DISPATCH | {"max_steps": 4}),
    "dispatched stream": (EQUAL, Stream, 24, {"max_steps": 4}),
    "dispatched and split stream": (EQUAL, Stream, 24, SPLIT | {"max_steps": 4}),
}


@pytest.mark.wide
@TOKENS
@pytest.mark.parametrize("case", CASES)
@on_layouts("one_rank", "ddp2")
def test_all_that_is_booked_is_what_the_stock_trainer_books(case, tokens, layout):
    head, kind, num_rows, arguments = CASES[case]
    ours, stock = both(head, 3, kind(make_rows(head, num_rows)), include_num_input_tokens_seen=tokens, **arguments)
    assert ours == stock
    assert stock["tokens"] > 0 or tokens != "all"
    assert stock["operations"] > 0


# ---- Padding ----


class OwnLoader:
    """Each rank reads what is its own, as accelerate does not know of it."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)


class OwnLoaderTrainer(OwnLoader, GradUtilsTrainer):
    pass


class StockOwnLoaderTrainer(OwnLoader, Trainer):
    pass


def once(tokens, rows):
    """Tokens of one pass, each row once."""
    return sum(row["input_ids"].numel() if tokens == "all" else int(row["attention_mask"].sum()) for row in rows)


@TOKENS
@on_layouts("one_rank", "ddp2")
def test_padding_of_data_without_a_length_is_not_booked(tokens, layout):
    # 5 micro-batches a rank: windows of 3 and 2; the third micro-batch of the second window is padding.
    data = make_rows(HEAD, 10 if layout == "one_rank" else 20)
    arguments = NO_DISPATCH | {"max_steps": 4, "include_num_input_tokens_seen": tokens}
    trainer, _ = trained(GradUtilsTrainer, HEAD, 3, Stream(data), **arguments)
    operations = 6 * once("all", data) * trainer.model.num_parameters(exclude_embeddings=True)
    assert trainer.state.num_input_tokens_seen == 2 * once(tokens, data)
    assert trainer.state.total_flos == 2 * operations
    logged = [entry["num_input_tokens_seen"] for entry in trainer.state.log_history]
    assert logged[1] == once(tokens, data)


@TOKENS
@pytest.mark.parametrize("has_length", [True, False])
@on_layouts("ddp2", "fsdp2x2")
def test_padding_of_ranks_with_fewer_batches_is_not_booked(has_length, tokens, layout):
    data = make_rows(HEAD, 16)
    rows = data[:14] if dist.get_rank() == 0 else data[14:]  # 7 micro-batches and 1
    arguments = {} if has_length else {"max_steps": 6}
    trainer, _ = train(
        HEAD,
        3,
        layout=layout,
        trainer_class=OwnLoaderTrainer,
        data=rows if has_length else Stream(rows),
        arguments={"max_steps": -1, "num_train_epochs": 2, "include_num_input_tokens_seen": tokens} | arguments,
        taps=False,
    )
    operations = 6 * once("all", data) * trainer.model.num_parameters(exclude_embeddings=True)
    assert trainer.state.global_step == 6
    assert trainer.state.num_input_tokens_seen == 2 * once(tokens, data)
    if layout == "ddp2":  # a rank of FSDP2 counts its shards
        assert trainer.state.total_flos == 2 * operations


@TOKENS
@ranks(2)
def test_without_even_batches_every_token_is_booked_once(tokens):
    data = make_rows(HEAD, 5)
    arguments = {"accelerator_config": {"even_batches": False}, "include_num_input_tokens_seen": tokens}
    trainer, _ = trained(GradUtilsTrainer, HEAD, 2, data, per_device_train_batch_size=1, **arguments)
    assert trainer.state.num_input_tokens_seen == 2 * once(tokens, data)


def test_control_a_stock_trainer_books_each_token_of_one_process_once():
    data = make_rows(HEAD, 10)
    trainer, _ = trained(StockOwnLoaderTrainer, HEAD, 5, data, per_device_train_batch_size=2)
    assert trainer.state.num_input_tokens_seen == 2 * once("all", data)


# ---- Interrupted ----


class RunsOutOfMemory(TrainerCallback):
    def __init__(self):
        self.has_raised = False

    def on_substep_end(self, *args, **kwargs):
        if not self.has_raised:
            self.has_raised = True
            raise RuntimeError("CUDA out of memory.")


@TOKENS
@on_layouts("one_rank", "ddp2")
def test_a_smaller_batch_after_running_out_of_memory_is_booked_as_in_the_stock_trainer(tokens, layout):
    ours, stock = (
        books_of(
            *trained(
                trainer_class,
                HEAD,
                3,
                make_rows(HEAD, 24),
                callback=RunsOutOfMemory(),
                auto_find_batch_size=True,
                per_device_train_batch_size=4,
                include_num_input_tokens_seen=tokens,
            )
        )
        for trainer_class in (GradUtilsTrainer, Trainer)
    )
    assert ours == stock


class StopsEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


@TOKENS
@pytest.mark.parametrize("ignores", [False, True])
@on_layouts("one_rank", "ddp2")
def test_a_training_resumed_in_mid_epoch_is_booked_as_in_the_stock_trainer(ignores, tokens, layout):
    books = []
    for trainer_class in (GradUtilsTrainer, Trainer):
        folders = [tempfile.mkdtemp()]
        if dist.is_initialized():
            dist.broadcast_object_list(folders)
        arguments = {"output_dir": folders[0], "save_strategy": "steps", "save_steps": 2}
        arguments |= {"include_num_input_tokens_seen": tokens, "ignore_data_skip": ignores}
        data = make_rows(HEAD, 28)
        trained(trainer_class, HEAD, 3, data, callback=StopsEarly(), **arguments)
        trainer, metrics = trained(trainer_class, HEAD, 3, data, resume=f"{folders[0]}/checkpoint-4", **arguments)
        books.append(books_of(trainer, metrics))
    assert books[0] == books[1]


class _TwoInputs:
    main_input_name = ("pixel_values", "task_inputs")

    def num_parameters(self, exclude_embeddings=False):
        return 7

    def parameters(self):
        return iter(())


def test_a_model_of_two_main_inputs_is_booked_by_the_first():
    trainer = Trainer.__new__(Trainer)
    trainer.model = _TwoInputs()
    inputs = {"pixel_values": torch.zeros(2, 3), "task_inputs": torch.zeros(2, 5)}
    assert Operations(trainer).of(inputs, trainer.floating_point_ops) == 6 * 6 * 7
    trainer.model.main_input_name = list(trainer.model.main_input_name)
    with pytest.raises(TypeError):
        trainer.floating_point_ops(inputs)
    assert Operations(trainer).of(inputs, trainer.floating_point_ops) == 6 * 6 * 7
