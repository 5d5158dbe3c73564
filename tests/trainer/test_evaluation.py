"""The evaluation loss: one mean over all targets, each sample once, whatever the batch size and the ranks."""

import copy
import itertools

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset
from transformers import DataCollatorWithFlattening, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_gradutils import GradUtilsSeq2SeqTrainer, GradUtilsTrainer
from hf_gradutils.trainer._filled import marking_filled_batches
from tests.harness.head_rows import VOCAB
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import make_data, make_model, train, truth

HEAD = "llama causal"
STILL = {"learning_rate": 0.0}
"""The weights stay those of the truth."""


@pytest.mark.parametrize(
    ("head", "layout"),
    [
        *itertools.product(["llama causal", "bert classes", "qwen2.5-vl images"], ["one_rank", "ddp2", "fsdp2x2"]),
        *itertools.product(["llama causal"], ["tp2", "tp2_fsdp2x2"]),
    ],
)
@on_layouts()
def test_the_evaluation_loss_is_a_mean_over_all_targets_each_sample_once(head, layout):
    data = make_data(head, 13, seed=8)  # does not divide: ranks are handed copies to fill up
    _, want = truth(head, data)
    for batch_size in (1, 3, 8):
        arguments = STILL | {"per_device_eval_batch_size": batch_size}
        trainer, _ = train(head, 2, layout=layout, eval_data=data, arguments=arguments)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5), batch_size


def test_control_the_stock_evaluation_loss_depends_on_the_batch_size():
    head = "llama causal"
    data = make_data(head, 13, seed=8)
    losses = []
    for batch_size in (1, 3):
        arguments = STILL | {"per_device_eval_batch_size": batch_size}
        trainer, _ = train(head, trainer_class=Trainer, eval_data=data, arguments=arguments)
        losses.append(trainer.evaluate()["eval_loss"])
    assert abs(losses[0] / losses[1] - 1) > 1e-4


def test_evaluation_works_before_training():
    head = "gpt2 causal"
    data = make_data(head, 7)
    trainer, _ = train(head, eval_data=data, arguments=STILL)
    fresh = GradUtilsTrainer(model=make_model(head), args=trainer.args, eval_dataset=data)
    assert fresh.evaluate()["eval_loss"] == pytest.approx(truth(head, data)[1], rel=1e-5)


@ranks(2)
def test_metrics_see_what_they_see_in_the_stock_trainer():
    head = "bert classes"
    data = make_data(head, 13, seed=8)
    seen = []
    for trainer_class in (GradUtilsTrainer, Trainer):
        predictions = []

        def keep(prediction, predictions=predictions):
            predictions.append(prediction)
            return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

        arguments = STILL | {"per_device_eval_batch_size": 3}
        trainer, _ = train(
            head, 2, trainer_class=trainer_class, eval_data=data, arguments=arguments, compute_metrics=keep
        )
        seen.append((trainer.evaluate(), *predictions))
    (ours, our_predictions), (stock, stock_predictions) = seen
    assert len(our_predictions.label_ids) == 13
    assert np.array_equal(our_predictions.label_ids, stock_predictions.label_ids)
    assert np.array_equal(our_predictions.predictions, stock_predictions.predictions)
    assert ours["eval_accuracy"] == stock["eval_accuracy"]
    assert ours.keys() == stock.keys()


@on_layouts("one_rank", "ddp2")
def test_generation_while_evaluating_leaves_the_loss_exact(layout):
    head = "t5 seq2seq"
    data = make_data(head, 13, seed=8)
    trainer, _ = train(head, 2, arguments=STILL)
    arguments = {k: v for k, v in trainer.args.to_dict().items() if k in ("output_dir", "use_cpu", "report_to")}
    arguments |= {"dataloader_pin_memory": False, "predict_with_generate": True, "generation_max_length": 6}
    results = []
    for trainer_class in (GradUtilsSeq2SeqTrainer, Seq2SeqTrainer):
        seen = []

        def keep(prediction, seen=seen):
            seen.append(prediction.predictions)
            return {}

        evaluating = trainer_class(
            model=make_model(head),
            args=Seq2SeqTrainingArguments(**arguments, per_device_eval_batch_size=3, disable_tqdm=True),
            eval_dataset=data,
            data_collator=HEADS[head].collate,
            compute_metrics=keep,
        )
        results.append((evaluating.evaluate()["eval_loss"], seen[0]))
    (loss, words), (_, stock_words) = results
    assert loss == pytest.approx(truth(head, data)[1], rel=1e-5)
    assert words.max() < VOCAB
    assert np.array_equal(words, stock_words)


class _EvaluatesPairs(GradUtilsTrainer):
    """As users write it: everything about prediction is theirs."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss, None, None


def test_a_prediction_step_of_the_users_own_keeps_trainers_mean():
    head = "bert classes"
    data = make_data(head, 12, seed=8)
    arguments = STILL | {"per_device_eval_batch_size": 4, "prediction_loss_only": True}
    ours, stock = (
        train(head, 2, trainer_class=c, eval_data=data, arguments=arguments)[0].evaluate()["eval_loss"]
        for c in (_EvaluatesPairs, Trainer)
    )
    assert ours == pytest.approx(stock, rel=1e-6)


# ---- Data without a length ----


class Stream(IterableDataset):
    """Rows without a length; workers share them out."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter(self.rows[first::step])


class SizedStream(Stream):
    def __len__(self):
        return len(self.rows)


SHARDED = {"dispatch_batches": False}
SPLIT = {"split_batches": True}


def evaluated(trainer_class, head, eval_data, *, layout=None, **options):
    arguments = STILL | {"per_device_eval_batch_size": 2} | options.pop("arguments", {})
    trainer, _ = train(head, 2, layout=layout, trainer_class=trainer_class, arguments=arguments, **options)
    return trainer, trainer.evaluate(eval_data)["eval_loss"]


@pytest.mark.parametrize("stream", [Stream, SizedStream])
@pytest.mark.parametrize(
    ("head", "config"),
    [
        *itertools.product(["llama causal", "bert classes"], [SHARDED, SHARDED | SPLIT]),
        *itertools.product(
            ["bert classes"], [{}, SPLIT]
        ),  # dispatched, for which accelerate wants rows of equal length
    ],
)
@on_layouts("ddp2")
def test_each_sample_of_an_iterable_set_counts_once(head, stream, config, layout):
    # Of 7 rows rank 1 has one and a copy, of 5 it has copies alone, 3 are less than a batch, and 8 need none.
    for num_samples in (7, 5, 3, 8):
        data = make_data(head, num_samples, seed=8)
        _, loss = evaluated(GradUtilsTrainer, head, stream(data), arguments={"accelerator_config": config})
        assert loss == pytest.approx(truth(head, data)[1], rel=1e-6), num_samples


@pytest.mark.parametrize("num_samples", [7, 5])
@on_layouts("one_rank", "fsdp2x2")
def test_each_sample_of_an_iterable_set_counts_once_in_other_layouts(num_samples, layout):
    data = make_data(HEAD, num_samples, seed=8)
    arguments = {"accelerator_config": SHARDED}
    _, loss = evaluated(GradUtilsTrainer, HEAD, Stream(data), layout=layout, arguments=arguments)
    assert loss == pytest.approx(truth(HEAD, data)[1], rel=1e-6)


@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_worker_marks_its_own_last_batch(num_workers, split_batches):
    real, num_filled = [], 0
    for rank in range(2):
        loader = DataLoader(Stream(list(range(11))), batch_size=4, num_workers=num_workers)
        prepared = prepare_data_loader(
            loader, num_processes=2, process_index=rank, split_batches=split_batches, dispatch_batches=False
        )
        with marking_filled_batches(prepared) as marked:
            for batch in marked:
                num_filled += marked.filled is not None
                real += batch.tolist()[: marked.filled.num_real_rows if marked.filled else None]
        assert all(isinstance(batch, torch.Tensor) for batch in prepared), "as it was"
    assert sorted(real) == list(range(11))
    assert num_filled == 2 * max(1, num_workers), "the same on both ranks"


@ranks(2)
def test_control_the_stock_trainer_counts_copies():
    data = make_data(HEAD, 7, seed=8)
    _, loss = evaluated(Trainer, HEAD, Stream(data), arguments={"accelerator_config": SHARDED})
    assert abs(loss / truth(HEAD, data)[1] - 1) > 1e-4


@ranks(2)
def test_flattened_rows_of_an_iterable_set_count_once():
    data = make_data(HEAD, 7, seed=8)
    rows = [{name: row[name].tolist() for name in ("input_ids", "labels")} for row in data]
    options = {"data_collator": DataCollatorWithFlattening(), "data": rows[:4]}
    _, loss = evaluated(GradUtilsTrainer, HEAD, Stream(rows), arguments={"accelerator_config": SHARDED}, **options)
    assert loss == pytest.approx(truth(HEAD, data)[1], rel=1e-6)


@ranks(2)
def test_predictions_and_batches_of_an_iterable_set_are_those_of_the_stock_trainer():
    head = "bert classes"
    data, seen = make_data(head, 7, seed=8), []
    for trainer_class in (GradUtilsTrainer, Trainer):
        trainer, _ = evaluated(trainer_class, head, Stream(data), arguments={"accelerator_config": SHARDED})
        output = trainer.predict(Stream(data))
        loader = trainer.get_eval_dataloader(Stream(data))
        trainer.evaluation_loop(loader, "Evaluation")
        batches = list(loader)
        seen.append((output.predictions, output.label_ids, [batch["labels"].tolist() for batch in batches]))
        copy.deepcopy(trainer.callback_handler.eval_dataloader)
    (ours, our_labels, our_batches), (stock, stock_labels, stock_batches) = seen
    assert np.array_equal(ours, stock)
    assert np.array_equal(our_labels, stock_labels)
    assert our_batches == stock_batches
