"""Models of the user's own that return a sum unless they are given the count."""

import pytest
from torch.nn.functional import cross_entropy

from hf_gradutils import GradUtilsPlugin
from tests.harness.gradients import relative_error
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, make_model, train, truth
from tests.trainer.test_overrides import CAUSAL, TOLERANCE

TOKENS = "bert tokens"


def by_its_count(head, kind):
    """A head whose class is the user's: its forward takes the count without a name, or by its name."""
    theirs = type(make_model(head))
    shift = int(head == CAUSAL)

    def loss_of(logits, labels, count):
        logits, labels = logits[:, : logits.shape[1] - shift].flatten(0, 1), labels[:, shift:].flatten()
        total = cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        return total if count is None else total / count

    class AnyNames(theirs):
        def forward(self, input_ids, labels=None, attention_mask=None, **kwargs):
            outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            outputs["loss"] = loss_of(outputs.logits, labels, kwargs.get("num_items_in_batch"))
            return outputs

    class ItsName(theirs):
        def forward(self, input_ids, labels=None, attention_mask=None, num_items_in_batch=None, **kwargs):
            outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            outputs["loss"] = loss_of(outputs.logits, labels, num_items_in_batch)
            return outputs

    class HandsOn(theirs):
        def forward(self, input_ids, labels=None, **kwargs):
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)

    class Ignores(theirs):
        def forward(self, input_ids, labels=None, attention_mask=None, **kwargs):
            return super().forward(input_ids=input_ids, labels=labels, attention_mask=attention_mask)

    model = make_model(head)
    model.__class__ = {c.__name__: c for c in (AnyNames, ItsName, HandsOn, Ignores)}[kind]
    return model


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["AnyNames", "ItsName", "HandsOn", "Ignores"])
@pytest.mark.parametrize("head", [CAUSAL, TOKENS])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("counts", ["auto", "first"])
@on_layouts("one_rank", "ddp2")
def test_a_model_is_given_the_count_where_the_stock_trainer_gives_it(layout, head, accumulation, kind, counts):
    want, want_loss = truth(head, make_data(head))
    trainer, tap = train(
        head,
        accumulation,
        layout=layout,
        model=by_its_count(head, kind),
        grad_plugin=GradUtilsPlugin(counts=counts),
        arguments={"learning_rate": 0.0},
    )
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)
    assert trainer.evaluate(make_data(head))["eval_loss"] == pytest.approx(want_loss, rel=1e-5)


def test_a_head_of_transformers_is_given_none():
    seen = {}
    model = make_model(CAUSAL)
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    train(CAUSAL, 1, model=model)
    assert "labels" in seen
    assert "num_items_in_batch" not in seen
