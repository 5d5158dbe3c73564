"""Losses of the whole batch, and sums of several means, in a loop of the user's own."""

import contextlib

import pytest
import torch
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from hf_gradutils import GradUtilsAccelerator, WholeBatchLoss
from hf_gradutils.accelerator._padding import PaddedShard
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from tests.harness.gradients import norm_of, relative_error, whole_gradients
from tests.harness.layouts import LAYOUTS, on_layouts
from tests.harness.shared_heads import contrast
from tests.harness.trainer_cases import fsdp_on_cpu, reset_accelerate

TOLERANCE = 1e-6
NUM_ROWS, WIDTH = 16, 6


class Pairs(nn.Module):
    """An encoder for both sides of a pair, and a temperature."""

    def __init__(self, p=0.0):
        super().__init__()
        self.inp, self.dropout, self.out = nn.Linear(WIDTH, 8), nn.Dropout(p), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.tensor([1.3]))

    def forward(self, x):
        return normalize(self.out(self.dropout(torch.tanh(self.inp(x)))), dim=-1)


LOSS = WholeBatchLoss(
    embed=lambda model, batch: (model(batch[0]), model(batch[1])),
    loss=contrast,
    parameters=lambda model: (model.scale,),
)


def make_pairs():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, NUM_ROWS, WIDTH, generator=generator)


def make_model(p=0.0):
    torch.manual_seed(0)
    return Pairs(p)


def make(layout="one_rank", model=None, **options):
    reset_accelerate()
    if LAYOUTS[layout].is_fsdp:
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Linear"]
        )
    with fsdp_on_cpu() if LAYOUTS[layout].is_fsdp else contextlib.nullcontext():
        accelerator = GradUtilsAccelerator(cpu=True, **options)
        model = model or make_model()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert LAYOUTS[layout].is_right(model)
    return accelerator, model, optimizer


def micro_batches(pairs, accelerator, accumulation):
    own = pairs.chunk(accelerator.num_processes, 1)[accelerator.process_index]
    return list(own.chunk(accumulation, 1))


def truth(pairs):
    model = make_model().double()
    loss = contrast(model(pairs[0].double()), model(pairs[1].double()), model.scale)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


@on_layouts("one_rank", "ddp2", "fsdp2x2")
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_passes_give_the_gradient_of_the_whole_batch(layout, accumulation):
    pairs = make_pairs()
    want, want_loss = truth(pairs)
    accelerator, model, optimizer = make(layout)
    for _ in range(2):  # a second window is like the first
        loss = accelerator.backward_whole_batch(LOSS, micro_batches(pairs, accelerator, accumulation))
        norm = accelerator.clip_grad_norm_(model.parameters(), float("inf"))
        assert relative_error(whole_gradients(model), want) < TOLERANCE
        assert float(loss) == float(accelerator.report.loss) == pytest.approx(want_loss, rel=TOLERANCE)
        assert float(norm) == pytest.approx(norm_of(want), rel=TOLERANCE)
        assert float(accelerator.report.num_targets) == NUM_ROWS
        optimizer.zero_grad()


def test_control_the_mean_of_the_micro_batches_is_another_gradient():
    model, pairs = make_model(), make_pairs()
    for left, right in (part.unbind() for part in pairs.chunk(4, 1)):
        (contrast(model(left), model(right), model.scale) / 4).backward()
    assert relative_error({n: p.grad for n, p in model.named_parameters()}, truth(pairs)[0]) > 0.1


def test_the_step_is_taken_and_the_next_window_starts_from_it():
    pairs = make_pairs()
    accelerator, model, optimizer = make()
    reference = make_model()
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(3):
        accelerator.backward_whole_batch(LOSS, micro_batches(pairs, accelerator, 4))
        optimizer.step()
        optimizer.zero_grad()
        contrast(reference(pairs[0]), reference(pairs[1]), reference.scale).backward()
        plain.step()
        plain.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_random_states_go_on_as_after_one_pass():
    pairs = make_pairs()
    accelerator, model, _ = make(model=make_model(0.4))
    torch.manual_seed(5)
    for batch in micro_batches(pairs, accelerator, 4):
        model(batch[0]), model(batch[1])
    want = torch.rand(3)
    torch.manual_seed(5)
    accelerator.backward_whole_batch(LOSS, micro_batches(pairs, accelerator, 4))
    assert torch.equal(torch.rand(3), want)


class Counting(Pairs):
    def __init__(self):
        super().__init__()
        self.register_buffer("num_forwards", torch.zeros(()))
        self.register_buffer("num_again", torch.zeros(()))

    def forward(self, x):
        self.num_forwards += 1
        self.num_again = self.num_again + 1
        return super().forward(x)


def test_buffers_change_once():
    accelerator, model, _ = make(model=Counting())
    accelerator.backward_whole_batch(LOSS, micro_batches(make_pairs(), accelerator, 4))
    assert model.num_forwards == model.num_again == 8


def test_a_frozen_temperature_and_labels_among_the_rows():
    pairs, labels = make_pairs(), torch.arange(NUM_ROWS) % 3
    model = make_model()
    model.scale.requires_grad_(False)

    def loss(rows, labels, scale):
        return ((rows @ rows.T * scale.exp() - (labels[:, None] == labels).float()) ** 2).mean()

    supervised = WholeBatchLoss(lambda model, batch: [model(batch[0]), batch[1]], loss, lambda model: [model.scale])
    loss(model(pairs[0]), labels, model.scale).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    accelerator, model, _ = make(model=model)
    batches = list(zip(pairs[0].chunk(4), labels.chunk(4), strict=True))
    accelerator.backward_whole_batch(supervised, batches)
    accelerator.clip_grad_norm_(model.parameters(), float("inf"))
    assert relative_error(whole_gradients(model), want) < TOLERANCE


def changed(**parts):
    return WholeBatchLoss(**{"embed": LOSS.embed, "loss": LOSS.loss, "parameters": LOSS.parameters} | parts)


def draws_by_itself(generator=torch.Generator()):  # noqa: B008 - one for all calls is the point
    return lambda model, batch: (model(batch[0]) + torch.rand(4, generator=generator), model(batch[1]))


MODEL = make_model()


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (changed(embed=lambda model, batch: {"left": model(batch[0])}), InvalidArgumentError, "a tensor of rows"),
        (
            changed(embed=lambda model, batch: (model(batch[0]), model.scale[0])),
            InvalidArgumentError,
            "a tensor of row",
        ),
        (changed(loss=lambda left, right, scale: left @ right.T), InvalidArgumentError, "must return one number"),
        (
            changed(loss=lambda left, right: contrast(left, right, MODEL.scale), parameters=None),
            InvalidArgumentError,
            "reads a trained parameter of shape .*return it from parameters",
        ),
        (changed(embed=draws_by_itself()), LossUnitError, "two forwards of the same micro-batch differ on 1 of 1"),
    ],
)
def test_what_cannot_be_right_stops_before_the_first_step(loss, error, message):
    accelerator, _, _ = make(model=MODEL)
    with pytest.raises(error, match=message):
        accelerator.backward_whole_batch(loss, micro_batches(make_pairs(), accelerator, 4))


@on_layouts("ddp2")
def test_ranks_with_different_numbers_of_micro_batches_stop_together(layout):
    accelerator, _, _ = make(layout)
    batches = micro_batches(make_pairs(), accelerator, 4)[accelerator.process_index :]
    with pytest.raises(InvalidArgumentError, match="3 to 4 micro-batches"):
        accelerator.backward_whole_batch(LOSS, batches)


@on_layouts("ddp2")
def test_ranks_may_have_different_numbers_of_rows(layout):
    pairs = make_pairs()
    accelerator, model, _ = make(layout)
    own = pairs[:, :10] if accelerator.process_index == 0 else pairs[:, 10:]
    accelerator.backward_whole_batch(LOSS, list(own.split(4 if accelerator.process_index == 0 else 2, 1)))
    accelerator.clip_grad_norm_(model.parameters(), float("inf"))
    assert relative_error(whole_gradients(model), truth(pairs)[0]) < TOLERANCE


class Stored:
    """Reads in its loss what its embedding has left behind."""

    def embed(self, model, batch):
        self.scale = model.scale.exp()
        return model(batch[0]), model(batch[1])

    def loss(self, left, right):
        return contrast(left, right, self.scale.log())


def test_a_loss_that_reads_more_than_rows_stops_before_the_first_step():
    accelerator, _, _ = make()
    stored = Stored()
    loss = WholeBatchLoss(stored.embed, stored.loss)
    with pytest.raises(InvalidArgumentError, match="reads a trained parameter"):
        accelerator.backward_whole_batch(loss, micro_batches(make_pairs(), accelerator, 4))


@on_layouts("one_rank", "ddp2")
def test_a_micro_batch_may_have_no_rows_of_one_kind(layout):
    pairs = make_pairs()

    def loss(anchors, others, scale):
        return (anchors @ others.T * scale.exp()).logsumexp(1).mean()

    whole = make_model().double()
    loss(whole(pairs[0, 4:].double()), whole(pairs[1].double()), whole.scale).backward()
    accelerator, model, _ = make(layout)
    own = [slice(0, 8), slice(8, 16)][accelerator.process_index : accelerator.process_index + 1]
    cuts = [slice(0, 4), slice(4, 16)] if layout == "one_rank" else own
    batches = [(pairs[0, max(cut.start, 4) : cut.stop], pairs[1, cut]) for cut in cuts]
    accelerator.backward_whole_batch(WholeBatchLoss(LOSS.embed, loss, LOSS.parameters), batches)
    accelerator.clip_grad_norm_(model.parameters(), float("inf"))
    assert relative_error(whole_gradients(model), {n: p.grad for n, p in whole.named_parameters()}) < TOLERANCE


@on_layouts("ddp2")
@pytest.mark.parametrize("what", ["width", "kinds"])
def test_rows_that_differ_between_ranks_stop_on_all(layout, what):
    accelerator, _, _ = make(layout)
    is_first = accelerator.process_index == 0

    def embed(model, batch):
        rows = LOSS.embed(model, batch)
        if is_first:
            return rows
        return (rows[0][:, :3], rows[1]) if what == "width" else rows[:1]

    with pytest.raises(InvalidArgumentError, match="must be alike but for their number"):
        accelerator.backward_whole_batch(changed(embed=embed), micro_batches(make_pairs(), accelerator, 2))


def test_batches_that_the_loader_repeats_are_refused():
    accelerator, _, _ = make()
    loader = accelerator.prepare(torch.utils.data.DataLoader(make_pairs().transpose(0, 1), batch_size=4))
    loader.batch_sampler.__class__ = PaddedShard
    with pytest.raises(InvalidArgumentError, match="join_uneven_inputs repeats"):
        accelerator.backward_whole_batch(LOSS, micro_batches(make_pairs(), accelerator, 2))


def test_an_exception_leaves_nothing_of_the_window():
    pairs = make_pairs()
    accelerator, model, _ = make()
    calls = []

    def embed(model, batch):
        calls.append(1)
        if len(calls) == 6:  # the second pass of the second micro-batch
            raise KeyError("no such row")
        return LOSS.embed(model, batch)

    with pytest.raises(KeyError):
        accelerator.backward_whole_batch(changed(embed=embed), micro_batches(pairs, accelerator, 4))
    assert accelerator.sync_gradients
    assert all(p.grad is None for p in model.parameters())
    accelerator.backward_whole_batch(LOSS, micro_batches(pairs, accelerator, 4))
    accelerator.clip_grad_norm_(model.parameters(), float("inf"))
    assert relative_error(whole_gradients(model), truth(pairs)[0]) < TOLERANCE


class Unused(Pairs):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


@on_layouts("ddp2")
@pytest.mark.parametrize("model_class", [Pairs, Unused])
def test_a_temperature_outside_the_forward_goes_with_unused_parameters(layout, model_class):
    pairs = make_pairs()
    torch.manual_seed(0)
    finds = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator, model, _ = make(layout, model_class(), kwargs_handlers=[finds])
    both_in_one = changed(embed=lambda model, batch: model(batch.flatten(0, 1)).chunk(2))
    accelerator.backward_whole_batch(both_in_one, micro_batches(pairs, accelerator, 2))
    accelerator.clip_grad_norm_(model.parameters(), float("inf"))
    assert relative_error(whole_gradients(model), truth(pairs)[0]) < TOLERANCE


# ---- Several means ----


def make_targets():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(NUM_ROWS, WIDTH, generator=generator)
    labels = torch.randint(4, (NUM_ROWS,), generator=generator)
    labels[torch.rand(NUM_ROWS, generator=generator) < 0.5] = -100
    labels[:4] = -100  # none in the first of four micro-batches
    return x, labels


def terms_of(model, x, labels):
    out = model(x)
    return [(cross_entropy(out, labels), (labels != -100).sum()), (out.square().sum(1).mean(), len(x))]


def truth_of_terms():
    torch.manual_seed(1)
    model, (x, labels) = nn.Linear(WIDTH, 4).double(), make_targets()
    loss = sum(term for term, _ in terms_of(model, x.double(), labels))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


def make_linear():
    torch.manual_seed(1)
    return nn.Linear(WIDTH, 4)


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("accumulation", [1, 4])
def test_each_term_has_a_weight_of_its_own(layout, accumulation):
    accelerator, model, _ = make(layout, make_linear(), gradient_accumulation_steps=accumulation)
    x, labels = (whole.chunk(accelerator.num_processes)[accelerator.process_index] for whole in make_targets())
    if accumulation > 1:
        accelerator.start_window([(labels != -100).sum(), len(x)])
    for batch in zip(x.chunk(accumulation), labels.chunk(accumulation), strict=True):
        with accelerator.accumulate(model):
            accelerator.backward(terms_of(model, *batch))
    accelerator.clip_grad_norm_(model.parameters(), float("inf"))
    want, want_loss = truth_of_terms()
    assert relative_error(whole_gradients(model), want) < TOLERANCE
    assert float(accelerator.report.loss) == pytest.approx(want_loss, rel=TOLERANCE)


def test_control_one_weight_for_both_terms_is_another_gradient():
    model, (x, labels) = make_linear(), make_targets()
    for part in zip(x.chunk(4), labels.chunk(4), strict=True):
        (sum(term.nan_to_num() for term, _ in terms_of(model, *part)) / 4).backward()
    assert relative_error({n: p.grad.nan_to_num() for n, p in model.named_parameters()}, truth_of_terms()[0]) > 0.05


@pytest.mark.parametrize(
    ("counts", "loss", "message"),
    [
        (None, lambda loss: [(loss, 4), (loss, 2)], r"call accelerator.start_window\(\[num_targets, …\]\)"),
        ([16, 8], lambda loss: [(loss, 4)], "1 terms, but start_window was given 2 counts"),
        ([16], lambda loss: [(loss.detach().repeat(2), 4)], "takes a loss and num_targets, or a list of terms"),
        ([16], lambda loss: [loss], "takes a loss and num_targets, or a list of terms"),
        ([16], lambda loss: [(loss, -1)], "must be one number ≥ 0"),
    ],
)
def test_terms_that_cannot_be_weighted_stop_before_the_backward(counts, loss, message):
    accelerator, model, _ = make(model=make_linear(), gradient_accumulation_steps=2)
    if counts:
        accelerator.start_window(counts)
    with accelerator.accumulate(model), pytest.raises(InvalidArgumentError, match=message):
        accelerator.backward(loss(model(make_targets()[0]).sum()))
    assert all(p.grad is None for p in model.parameters())


@on_layouts("one_rank", "ddp2")
def test_counts_that_are_not_those_of_the_micro_batches_stop_before_the_first_step(layout):
    accelerator, model, _ = make(layout, make_linear(), gradient_accumulation_steps=2)
    x, labels = make_targets()
    accelerator.start_window([2 * len(x), 2 * int((labels != -100).sum())])  # the other way round
    with accelerator.accumulate(model):
        accelerator.backward(terms_of(model, x, labels))
    with (
        accelerator.accumulate(model),
        pytest.raises(InvalidArgumentError, match="were counted before its"),
    ):
        accelerator.backward(terms_of(model, x, labels))


@on_layouts("ddp2")
def test_padding_has_no_part_in_the_terms(layout):
    """Three batches over two ranks: one rank repeats its last, which counts for nothing."""
    x, labels = (whole[4:] for whole in make_targets())
    torch.manual_seed(1)
    want = nn.Linear(WIDTH, 4).double()
    sum(term for term, _ in terms_of(want, x[8:].double(), labels[8:])).backward()
    accelerator, model, optimizer = make(layout, make_linear())
    rows = list(zip(x, labels, strict=True))
    loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=4))
    with accelerator.join_uneven_inputs([model], even_batches=False):
        for batch in loader:
            optimizer.zero_grad()
            accelerator.backward(terms_of(model, *batch))
            accelerator.clip_grad_norm_(model.parameters(), float("inf"))
    assert float(accelerator.report.num_targets) == int((labels[8:] != -100).sum())
    assert relative_error(whole_gradients(model), {n: p.grad for n, p in want.named_parameters()}) < TOLERANCE
