"""The page on writing around the Trainer: its script runs, its examples are exact, and what its tables say holds.

Each example is compared with its loss written by hand, of one process and the whole batch in float64.
"""

import contextlib
import functools
import io
import os
import re
import tempfile
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.nn.functional import cross_entropy, kl_div
from torch.nn.utils import parameters_to_vector
from torch.utils.data import default_collate

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainerMixin
from hf_gradutils.errors import LossUnitError
from tests.harness.layouts import on_layouts
from tests.harness.ranks import run_ranks
from tests.harness.trainer_cases import reset_accelerate
from tests.test_docs import BLOCK, DOCS, NO_LAUNCHER

TEXT = (DOCS / "custom.md").read_text()
BLOCKS = [block["code"] for block in BLOCK.finditer(TEXT)]
OUTPUTS = str(Path(tempfile.gettempdir()) / "hf_gradutils-tests")
"""Nothing is saved there."""
TOLERANCE = 1e-9
LAYOUTS = ["one_rank", "ddp2"]


# ---- The script ----


def test_the_script_runs_and_prints_what_the_page_shows(tmp_path):
    (printed,) = run_ranks(_printed, 1, "\n".join(BLOCKS), str(tmp_path), init=False, env=NO_LAUNCHER)
    table = re.compile(r"^(\w+) +([\d.]+e[+-]\d+)  ([\d.]+e[+-]\d+)", re.MULTILINE)
    shown, got = ([(name, float(theirs)) for name, theirs, _ in table.findall(text)] for text in (TEXT, printed))
    assert [name for name, _ in got] == [name for name, _ in shown]
    assert len(got) == len(EXAMPLES)
    if transformers.__version__.startswith("5.24."):  # the page names it
        assert [theirs for _, theirs in got if theirs > 0.01] == [theirs for _, theirs in shown if theirs > 0.01]


def _printed(code, folder):
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, "the page", "exec"), {"__name__": "__main__"})
    return output.getvalue()


@functools.cache
def page():
    """The names of the page, and its examples: name → (class, plugin, options), in place of the comparisons."""
    names, examples = {"__name__": "custom"}, {}
    exec(BLOCKS[0], names)

    def keep(stock, grad_plugin=None, **options):
        examples.setdefault(stock.__name__, (stock, grad_plugin, options))

    names["compare"] = keep
    for code in BLOCKS[1:]:
        exec(code, names)
    return types.SimpleNamespace(**names, examples=examples)


def exact(trainer_class):
    return type("Exact", (GradUtilsTrainerMixin, trainer_class), {})


def num_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def trained(trainer_class, accumulation=4, *, rows=None, make_model=None, arguments=None, **options):
    """The Trainer of the page's `step`, and what its steps add to the weights; on all ranks together."""
    reset_accelerate()
    rows = page().rows if rows is None else rows
    split = {
        "per_device_train_batch_size": max(1, len(page().rows) // (accumulation * num_ranks())),
        "gradient_accumulation_steps": accumulation,
        "logging_steps": 1,
    }
    args = page().TrainingArguments(OUTPUTS, **page().sgd | page().quiet | split | (arguments or {}))
    torch.manual_seed(1)
    model = (make_model or page().make_model)()
    before = parameters_to_vector(model.parameters()).detach().clone()
    trainer = trainer_class(model=model, args=args, train_dataset=rows, **options)
    trainer.train()
    return trainer, parameters_to_vector(model.parameters()).detach() - before


def truth(loss_of, *, rows=None, collate=default_collate, make_model=None):
    """The step and the loss of one process and the whole batch, in float64."""
    torch.manual_seed(1)
    model = (make_model or page().make_model)()
    loss = loss_of(model, collate(list(page().rows if rows is None else rows)))
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), gradients, strict=True)]
    return -parameters_to_vector(flat), loss.item()


def error(got, want):
    return float((got - want).norm() / want.norm())


# ---- The examples ----


def own_losses(model, batch):
    logits, labels = model(input_ids=batch["input_ids"]).logits, batch["labels"]
    is_target = labels != -100
    return cross_entropy(logits[is_target], labels[is_target], reduction="none"), is_target


def plain(model, batch):
    return own_losses(model, batch)[0].mean()


def focal(model, batch):
    losses = own_losses(model, batch)[0]
    return ((1 - (-losses).exp()).square() * losses).mean()


def adversarial(model, batch):
    words = model.get_input_embeddings()(batch["input_ids"])

    def loss_at(words):
        is_target = batch["labels"] != -100
        return cross_entropy(model(inputs_embeds=words).logits[is_target], batch["labels"][is_target])

    (slope,) = torch.autograd.grad(loss_at(words), words, retain_graph=True)
    return loss_at(words) + loss_at(words + 0.01 * slope.sign())


def distilled(model, batch):
    is_target = batch["labels"] != -100
    teacher = page().examples["Distilled"][2]["teacher"]
    wanted = teacher(input_ids=batch["input_ids"]).logits[is_target].softmax(-1).detach()
    ours = model(input_ids=batch["input_ids"]).logits[is_target].log_softmax(-1)
    return (plain(model, batch) + kl_div(ours, wanted, reduction="none").sum(-1).mean()) / 2


def weighted(model, batch):
    losses, is_target = own_losses(model, batch)
    weights = page().class_weights[batch["labels"][is_target]]
    return (weights * losses).sum() / weights.sum()


def two_sets(model, batch):
    losses, is_target = own_losses(model, batch)
    is_clean = batch["is_clean"][:, None].expand_as(is_target)[is_target]
    return torch.where(is_clean, losses, 1 - (-losses).exp()).mean()


def graphs(model, batch):
    return model(**batch)["loss"]


EXAMPLES = {
    "Focal": focal,
    "FocalByCount": focal,
    "Adversarial": adversarial,
    "Distilled": distilled,
    "Weighted": weighted,
    "TwoSets": two_sets,
    "Trainer": graphs,
    "LayerWise": plain,
}


@pytest.mark.parametrize("name", EXAMPLES)
@on_layouts(*LAYOUTS)
def test_an_example_is_exact_and_the_stock_trainer_is_not(layout, name):
    if name == "LayerWise" and layout == "ddp2":
        return  # below
    stock, plugin, options = page().examples[name]
    data = {"rows": options.get("rows"), "make_model": options.get("make_model")}
    want, want_loss = truth(EXAMPLES[name], collate=options.get("data_collator", default_collate), **data)
    for accumulation in (1, 4):
        trainer, got = trained(exact(stock), accumulation, grad_plugin=plugin, **options)
        assert error(got, want) < TOLERANCE
        assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)
    _, theirs = trained(stock, 4, **options)
    assert (error(theirs, want) > 0.05) == (name != "FocalByCount"), "by transformers' contract it is right"


def test_all_examples_of_the_page_are_compared():
    assert list(page().examples) == list(EXAMPLES)


@pytest.mark.parametrize("counts", ["streamed", "first"])
@pytest.mark.parametrize("name", ["Focal", "FocalByCount", "Adversarial", "Distilled", "TwoSets"])
def test_an_example_is_exact_whenever_targets_are_counted(name, counts):
    stock, _, options = page().examples[name]
    want, _ = truth(EXAMPLES[name], rows=options.get("rows"))
    _, got = trained(exact(stock), grad_plugin=GradUtilsPlugin(counts=counts), **options)
    assert error(got, want) < TOLERANCE


@on_layouts("ddp2")
def test_under_ddp_an_optimizer_in_the_backward_does_not_get_by(layout):
    with pytest.raises(RuntimeError, match="Encountered gradient which is undefined"):  # DDP's, with any Trainer
        trained(exact(page().LayerWise))


@on_layouts(*LAYOUTS)
def test_class_weights_are_refused_without_their_sum(layout):
    with pytest.raises(LossUnitError, match=r"is not a mean over the targets counted .* class weights"):
        trained(exact(page().Weighted))
