"""A ``compute_loss`` that returns several (loss, count), a ``WholeBatchLoss``, and the exact router loss."""

import statistics

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer

from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin, GradUtilsTrainer, GradUtilsTrainerMixin, WholeBatchLoss
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from tests.harness.gradients import norm_of, relative_error
from tests.harness.layouts import on_layouts
from tests.harness.shared_heads import LOSS_OF_PAIRS, contrast, embed_pairs
from tests.harness.trainer_cases import make_data, make_model, train, truth

TOLERANCE = 1e-5
IN_ORDER = {"train_sampling_strategy": "sequential"}
HEAD = "bert pretraining"


def terms_of(outputs, words, order):
    of_words = cross_entropy(outputs.prediction_logits.flatten(0, 1), words.flatten())
    of_order = cross_entropy(outputs.seq_relationship_logits, order)
    return [(of_words, (words != -100).sum()), (of_order, (order != -100).sum())]


class Several(GradUtilsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = [inputs.pop(name) for name in ("labels", "next_sentence_label")]
        outputs = model(**inputs)
        terms = terms_of(outputs, *labels)
        return (terms, outputs) if return_outputs else terms


class Behind(Trainer):
    """The same behind the mixin."""

    compute_loss = Several.compute_loss


class Front(GradUtilsTrainerMixin, Behind):
    pass


def count_both(batch):
    return [(batch[name] != -100).sum() for name in ("labels", "next_sentence_label")]


def check(trainer, tap, data, head=HEAD):
    want, want_loss = truth(head, data)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(want_loss, rel=1e-5)
    assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("counts_first", [False, True])
def test_each_term_has_a_weight_of_its_own(layout, counts_first):
    data = make_data(HEAD, 32)
    plugin = GradUtilsPlugin(count_targets=count_both) if counts_first else None
    for accumulation in (1, 4):
        for trainer_class in (Several, Front):
            trained = train(
                HEAD, accumulation, layout=layout, data=data, arguments=IN_ORDER, trainer_class=trainer_class,
                grad_plugin=plugin,
            )  # fmt: skip
            check(*trained, data)


def test_a_loss_function_may_return_terms_too():
    data = make_data("bert masked", 32)

    def loss_of(outputs, labels, num_items_in_batch=None):
        is_even = torch.arange(labels.shape[1]) % 2 == 0
        halves = [labels.masked_fill(~is_even, -100), labels.masked_fill(is_even, -100)]
        return [(cross_entropy(outputs["logits"].flatten(0, 1), h.flatten()), (h != -100).sum()) for h in halves]

    steps = [
        train("bert masked", n, data=data, compute_loss_func=loss_of, arguments=IN_ORDER)[1].steps[0] for n in (1, 8)
    ]
    assert relative_error(steps[1], steps[0]) < TOLERANCE
    weighted = train("bert masked", 8, data=data, arguments=IN_ORDER)[1].steps[0]
    assert relative_error(steps[1], weighted) > 1e-2, "control: one weight for both is another gradient"


def test_targets_are_counted_in_a_first_pass_only_where_they_must_be():
    data = make_data(HEAD, 32)
    numbers = {}
    for name, plugin in {"counted": GradUtilsPlugin(count_targets=count_both), "not": None}.items():
        model = make_model(HEAD)
        ran = []
        model.cls.register_forward_hook(lambda *_, ran=ran: ran.append(torch.is_grad_enabled()))
        train(HEAD, 4, data=data, model=model, trainer_class=Several, grad_plugin=plugin)
        numbers[name] = (ran.count(True), ran.count(False))
    num_asked = 1  # how many terms compute_loss returns
    assert numbers["counted"][0] == numbers["not"][0] == num_asked + 4
    assert numbers["not"][1] - numbers["counted"][1] == 4


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("trainer_class", [Several, GradUtilsTrainer])
def test_each_term_is_a_mean_over_the_evaluation_set(trainer_class, layout):
    """13 rows in batches of 4, two ranks with copies in the last."""
    data = make_data(HEAD, 13)
    trainer, _ = train(HEAD, 2, layout=layout, data=make_data(HEAD, 16), eval_data=data, trainer_class=trainer_class)
    trainer.args.per_device_eval_batch_size = 4
    model = make_model(HEAD).eval()
    model.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        want = model(**torch.utils.data.default_collate(data)).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want.item(), rel=1e-5)


class Wavering(Several):
    def compute_loss(self, *args, **kwargs):
        terms = super().compute_loss(*args, **kwargs)
        return terms[: 1 + self.model.training]


def test_another_number_of_terms_stops():
    with pytest.raises(InvalidArgumentError, match="returns 2 terms, but 1 for the first batch"):
        train(HEAD, 4, trainer_class=Wavering)


def test_counts_that_are_not_those_of_the_terms_stop_before_the_first_step():
    plugin = GradUtilsPlugin(count_targets=lambda batch: count_both(batch)[::-1])
    with pytest.raises(LossUnitError, match=r"count_targets counts .* and compute_loss returns"):
        train(HEAD, 4, trainer_class=Several, grad_plugin=plugin)


class Later(Several):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        terms = super().compute_loss(model, inputs)
        return terms if self.state.global_step else terms[0][0]


def test_one_loss_first_and_several_later_stops():
    with pytest.raises(InvalidArgumentError, match="but one loss for the first batch"):
        train(HEAD, 4, trainer_class=Later, arguments={"max_steps": 2})


class Reads(Several):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert float(num_items_in_batch) > 0
        return super().compute_loss(model, inputs, return_outputs)


def test_code_that_reads_the_count_is_given_one():
    data = make_data(HEAD, 16)
    check(*train(HEAD, 4, data=data, trainer_class=Reads), data)


# ---- A loss of the whole batch that is the user's own ----


@on_layouts("one_rank", "ddp2")
def test_a_loss_of_the_whole_batch_takes_the_place_of_the_models(layout):
    data = make_data("clip pairs", 32)
    for accumulation in (1, 4):
        trained = train(
            "clip pairs", accumulation, layout=layout, data=data, arguments=IN_ORDER, whole_batch_loss=LOSS_OF_PAIRS
        )
        check(*trained, data, "clip pairs")


def test_it_evaluates_batch_by_batch():
    data = make_data("clip pairs", 16)
    trainer, _ = train("clip pairs", 4, data=data, eval_data=data, whole_batch_loss=LOSS_OF_PAIRS)
    trainer.args.per_device_eval_batch_size = 4
    model = trainer.model.eval()

    def loss_of(rows):
        return contrast(*embed_pairs(model, trainer.data_collator(rows)), model.logit_scale).item()

    of_batches = statistics.mean(loss_of(data[start : start + 4]) for start in range(0, 16, 4))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(of_batches, rel=1e-5)
    assert abs(of_batches - loss_of(data)) > 1e-2, "control: all rows compared with each other are another loss"


def test_a_temperature_that_is_not_passed_stops_before_the_first_step():
    model = make_model("clip pairs")
    lost = WholeBatchLoss(embed_pairs, lambda text, image: contrast(text, image, model.logit_scale))
    with pytest.raises(InvalidArgumentError, match="return it from parameters"):
        train("clip pairs", 4, model=model, whole_batch_loss=lost)


def test_it_evaluates_and_predicts_batches_that_only_embed_understands():
    named = WholeBatchLoss(lambda model, batch: embed_pairs(model, batch["pair"]), contrast, LOSS_OF_PAIRS.parameters)
    data = make_data("clip pairs", 8)

    def collate(rows):
        return {"pair": {name: torch.stack([row[name] for row in rows]) for name in rows[0]}}

    trainer, _ = train("clip pairs", 2, data=data, eval_data=data, whole_batch_loss=named, data_collator=collate)
    trainer.args.per_device_eval_batch_size = 8
    rows = embed_pairs(trainer.model.eval(), trainer._prepare_inputs(collate(data))["pair"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(contrast(*rows, trainer.model.logit_scale).item(), rel=1e-5)
    predicted = trainer.predict(data).predictions
    assert torch.allclose(torch.as_tensor(predicted[0]), rows[0], atol=1e-6)


# ---- The router loss of a mixture of experts ----

EXACT = GradUtilsPlugin(aux="exact")


@on_layouts("one_rank", "ddp2")
def test_the_router_loss_is_that_of_the_whole_batch(layout):
    head = "qwen3 moe aux"
    data = make_data(head, 32)
    for accumulation in (1, 4):
        trained = train(head, accumulation, layout=layout, data=data, arguments=IN_ORDER, grad_plugin=EXACT)
        check(*trained, data, head)


def test_control_the_mean_of_the_micro_batches_is_another_gradient():
    head = "qwen3 moe aux"
    data = make_data(head, 32)
    _, tap = train(head, 4, data=data)
    assert relative_error(tap.steps[0], truth(head, data)[0]) > 1e-2


def test_a_micro_batch_without_targets_has_its_part_in_the_router_loss():
    head = "qwen3 moe aux"
    data = make_data(head, 16)
    for row in data[:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    trained = train(head, 4, data=data, arguments=IN_ORDER, grad_plugin=EXACT)
    check(*trained, data, head)


def test_it_is_exact_beside_an_unchecked_loss_and_nothing_where_there_is_none():
    head = "qwen3 moe aux"
    data = make_data(head, 16)
    unchecked = GradUtilsPlugin(aux="exact", check_loss_unit=False, loss_unit="shifted_tokens")
    check(*train(head, 4, data=data, arguments=IN_ORDER, grad_plugin=unchecked), data, head)
    steps = []
    for plugin in (None, EXACT):
        model = make_model(head)
        model.config.output_router_logits = False
        steps.append(train(head, 4, data=data, model=model, arguments=IN_ORDER, grad_plugin=plugin)[1].steps[0])
    assert relative_error(*steps) == 0


class Stepping(GradUtilsTrainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


def test_where_it_is_not_exact_it_stops():
    with pytest.raises(LossUnitError, match="training_step of your own"):
        train("qwen3 moe aux", 4, trainer_class=Stepping, grad_plugin=EXACT)
    with pytest.raises(InvalidArgumentError, match=r"aux='exact'.*Trainer"):
        GradUtilsAccelerator(cpu=True, gradient_accumulation_plugin=EXACT)
