"""The evaluation loss: one mean over all targets, each sample once, whatever the batch size and the ranks."""

import itertools

import numpy as np
import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_gradutils import GradUtilsSeq2SeqTrainer, GradUtilsTrainer
from tests.harness.head_rows import VOCAB
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import make_data, make_model, train, truth

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
