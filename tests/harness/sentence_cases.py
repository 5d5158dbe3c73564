"""A tiny sentence encoder, 16 rows of text, and trainings of one optimizer step with each of its losses."""

import contextlib
import copy
import functools
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_gradutils.trainer import GradUtilsTrainerMixin
from hf_gradutils.upstream.sentence_transformers import GATHERS, with_attribute
from tests.harness.gradients import whole_gradients
from tests.harness.trainer_cases import ONE_STEP, reset_accelerate

st = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

MARKS = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The (Cached)?MultipleNegativesSymmetricRankingLoss is:DeprecationWarning"),
]
NUM_ROWS = 16
DIM = 16
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(5, 40))]


class ExactSentences(GradUtilsTrainerMixin, st.SentenceTransformerTrainer):
    pass


def make_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, **{f"{name}_token": word for name, word in names.items()}
    )


@contextlib.contextmanager
def saved_encoder(seed=11, dropout=0.0):
    """The folder of a tiny BERT and its tokenizer, from which sentence-transformers reads them, on any rank."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": DIM, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(vocab_size=len(WORDS), initializer_range=0.3, max_position_embeddings=32, **sizes, **dropouts)
    with tempfile.TemporaryDirectory() as folder:
        config.to_json_file(Path(folder, "config.json"), use_diff=False)
        save_file(BertModel(config).state_dict(), Path(folder, "model.safetensors"), metadata={"format": "pt"})
        make_tokenizer().save_pretrained(folder)
        yield folder


@functools.cache
def _encoder(seed, dropout):
    with saved_encoder(seed, dropout) as folder:
        return modules.Transformer(folder)


def make_model(seed=11, dropout=0.0):
    encoder = copy.deepcopy(_encoder(seed, dropout))
    return st.SentenceTransformer(modules=[encoder, modules.Pooling(DIM, "mean")], device="cpu")


# ---- Rows of text ----


def make_rows(*columns, label=None, num_rows=NUM_ROWS, seed=5):
    """Texts of 1 to 9 words in each column, and a label if its maker is given: number of the row → label."""
    generator = torch.Generator().manual_seed(seed)

    def text():
        num_words = int(torch.randint(1, 10, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(5, len(WORDS), (num_words,), generator=generator).tolist())

    rows = [{name: text() for name in columns} for _ in range(num_rows)]
    for i, row in enumerate(rows):
        row |= {} if label is None else {"label": label(i)}
    return rows


def numbers(i, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(i)).tolist()


pairs = functools.partial(make_rows, "anchor", "positive")
triplets = functools.partial(make_rows, "anchor", "positive", "negative")
many = functools.partial(make_rows, "anchor", "positive", "negative_1", "negative_2")
scored = functools.partial(pairs, label=lambda i: (i * 7 % NUM_ROWS) / NUM_ROWS)
binary = functools.partial(pairs, label=lambda i: int(i % 3 == 0))
classes = functools.partial(make_rows, "text", label=lambda i: (0, 0, 1, 2, 1, 0, 3, 2)[i % 8])


# ---- Losses ----


@dataclass(frozen=True)
class Case:
    """A loss, the rows it takes, and the group it belongs to."""

    make: Callable
    rows: Callable
    group: str  # mean, whole, sum or tokens


def _wrapped(cls, make, **kwargs):
    return lambda model: cls(model, make(model), **{"matryoshka_dims": [DIM, 8, 4]} | kwargs)


def _with(cls, **kwargs):
    return lambda model: cls(model, **kwargs)


def _guided(cls, **kwargs):
    return lambda model: cls(model, make_model(seed=12), temperature=0.1, **kwargs)


def auto_encoder(model):
    with saved_encoder() as folder:
        model[0].auto_model.config._name_or_path = folder
        torch.manual_seed(4)  # of the decoder's new layers
        return losses.DenoisingAutoEncoderLoss(model, tie_encoder_decoder=True)


BOTH = ("query_to_doc", "doc_to_query")
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
EMBEDDED = functools.partial(pairs, label=lambda i: numbers(i, DIM))
CASES = {
    # Whole batch.
    "mnr": Case(losses.MultipleNegativesRankingLoss, pairs, "whole"),
    "mnr negatives": Case(losses.MultipleNegativesRankingLoss, many, "whole"),
    "mnr symmetric": Case(
        _with(losses.MultipleNegativesRankingLoss, directions=BOTH, partition_mode="per_direction"), pairs, "whole"
    ),
    "mnr all directions": Case(_with(losses.MultipleNegativesRankingLoss, directions=ALL), triplets, "whole"),
    "mnr hardness": Case(
        _with(losses.MultipleNegativesRankingLoss, hardness_mode="all_negatives", hardness_strength=2.0), many, "whole"
    ),
    "mnr gathered": Case(_with(losses.MultipleNegativesRankingLoss, gather_across_devices=True), triplets, "whole"),
    "cached mnr": Case(_with(losses.CachedMultipleNegativesRankingLoss, mini_batch_size=3), many, "whole"),
    "cached mnr gathered": Case(
        _with(losses.CachedMultipleNegativesRankingLoss, mini_batch_size=3, gather_across_devices=True), many, "whole"
    ),
    "old symmetric": Case(losses.MultipleNegativesSymmetricRankingLoss, pairs, "whole"),
    "cached symmetric": Case(
        _with(losses.CachedMultipleNegativesSymmetricRankingLoss, mini_batch_size=3), pairs, "whole"
    ),
    "gist": Case(_guided(losses.GISTEmbedLoss), triplets, "whole"),
    "gist gathered": Case(_guided(losses.GISTEmbedLoss, gather_across_devices=True), pairs, "whole"),
    "cached gist": Case(_guided(losses.CachedGISTEmbedLoss, mini_batch_size=3, margin=0.1), triplets, "whole"),
    "mega batch": Case(_with(losses.MegaBatchMarginLoss, mini_batch_size=3), pairs, "whole"),
    "mega batch plain": Case(_with(losses.MegaBatchMarginLoss, use_mini_batched_version=False), pairs, "whole"),
    "cosent": Case(losses.CoSENTLoss, scored, "whole"),
    "angle": Case(losses.AnglELoss, scored, "whole"),
    "angle triplets": Case(losses.AnglELoss, triplets, "whole"),
    "online contrastive": Case(losses.OnlineContrastiveLoss, binary, "whole"),
    "batch hard": Case(_with(losses.BatchHardTripletLoss, margin=2), classes, "whole"),
    "batch hard soft": Case(losses.BatchHardSoftMarginTripletLoss, classes, "whole"),
    "batch semi hard": Case(_with(losses.BatchSemiHardTripletLoss, margin=2), classes, "whole"),
    "batch all": Case(_with(losses.BatchAllTripletLoss, margin=2), classes, "whole"),
    "orthogonal": Case(losses.GlobalOrthogonalRegularizationLoss, pairs, "whole"),
    "matryoshka mnr": Case(_wrapped(losses.MatryoshkaLoss, losses.MultipleNegativesRankingLoss), many, "whole"),
    "matryoshka cached": Case(
        _wrapped(losses.MatryoshkaLoss, _with(losses.CachedMultipleNegativesRankingLoss, mini_batch_size=3)),
        pairs,
        "whole",
    ),
    "matryoshka cached gist": Case(
        _wrapped(losses.MatryoshkaLoss, _guided(losses.CachedGISTEmbedLoss, mini_batch_size=3)), pairs, "whole"
    ),
    "matryoshka gist": Case(_wrapped(losses.MatryoshkaLoss, _guided(losses.GISTEmbedLoss)), pairs, "whole"),
    "tension in batch": Case(
        losses.ContrastiveTensionLossInBatchNegatives, functools.partial(make_rows, "text"), "whole"
    ),
    "matryoshka batch all": Case(
        _wrapped(losses.MatryoshkaLoss, _with(losses.BatchAllTripletLoss, margin=2)), classes, "whole"
    ),
    "adaptive mnr": Case(
        lambda model: losses.AdaptiveLayerLoss(model, losses.MultipleNegativesRankingLoss(model), n_layers_per_step=-1),
        pairs,
        "whole",
    ),
    "matryoshka 2d mnr": Case(
        _wrapped(
            losses.Matryoshka2dLoss, losses.MultipleNegativesRankingLoss, n_layers_per_step=-1, n_dims_per_step=-1
        ),
        pairs,
        "whole",
    ),
    "matryoshka mnr drawn": Case(
        _wrapped(losses.MatryoshkaLoss, losses.MultipleNegativesRankingLoss, n_dims_per_step=2), pairs, "whole"
    ),
    "2d drawn": Case(_wrapped(losses.Matryoshka2dLoss, losses.MultipleNegativesRankingLoss), pairs, "whole"),
    # A mean over rows.
    "cosine": Case(losses.CosineSimilarityLoss, scored, "mean"),
    "triplet": Case(losses.TripletLoss, triplets, "mean"),
    "contrastive": Case(losses.ContrastiveLoss, binary, "mean"),
    "mse": Case(losses.MSELoss, EMBEDDED, "mean"),
    "embed distill": Case(losses.EmbedDistillLoss, EMBEDDED, "mean"),
    "embed distill projected": Case(
        _with(losses.EmbedDistillLoss, projection_dim=5),
        functools.partial(pairs, label=lambda i: numbers(i, 5)),
        "mean",
    ),
    "margin mse": Case(losses.MarginMSELoss, functools.partial(triplets, label=lambda i: i / 5), "mean"),
    "distill kl": Case(losses.DistillKLDivLoss, functools.partial(many, label=lambda i: numbers(i, 3)), "mean"),
    "softmax": Case(
        _with(losses.SoftmaxLoss, embedding_dimension=DIM, num_labels=3),
        functools.partial(pairs, label=lambda i: i * 5 % 3),
        "mean",
    ),
    "matryoshka cosine": Case(_wrapped(losses.MatryoshkaLoss, losses.CosineSimilarityLoss), scored, "mean"),
    "adaptive cosine": Case(
        lambda model: losses.AdaptiveLayerLoss(model, losses.CosineSimilarityLoss(model), n_layers_per_step=-1),
        scored,
        "mean",
    ),
    "adaptive cosine drawn": Case(
        lambda model: losses.AdaptiveLayerLoss(model, losses.CosineSimilarityLoss(model)), scored, "mean"
    ),
    "auto encoder": Case(auto_encoder, functools.partial(make_rows, "damaged", "text"), "tokens"),
    # Sums over rows.
    "tension": Case(losses.ContrastiveTensionLoss, binary, "sum"),
    "contrastive sum": Case(_with(losses.ContrastiveLoss, size_average=False), binary, "sum"),
}


# ---- A training of one optimizer step ----


def gradients_of(model, loss):
    """Gradients of a model, and of the parameters that only the loss has."""
    own = {id(p) for p in model.parameters()}
    rest = [(name, p) for name, p in loss.named_parameters() if id(p) not in own and p.grad is not None]
    return whole_gradients(model) | {f"loss.{name}": p.grad.detach().clone().double() for name, p in rest}


class SeesGradients:
    """Keeps the gradients before the optimizer's step, also those of the loss's own parameters."""

    seen = None

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        loss = self.loss if isinstance(self.loss, torch.nn.Module) else torch.nn.ModuleDict(self.loss)
        self.seen = gradients_of(model, loss)
        return norm


class Exact(SeesGradients, ExactSentences):
    pass


class Stock(SeesGradients, st.SentenceTransformerTrainer):
    pass


def make_trainer(case, trainer_class, accumulation=1, *, arguments=None, num_ranks=1, dropout=0.0, rows=None, **kwargs):
    reset_accelerate()
    case = CASES[case] if isinstance(case, str) else case
    model = kwargs.pop("model", None) or make_model(dropout=dropout)
    torch.manual_seed(3)  # of the loss's own parameters
    loss = kwargs.pop("loss", None) or case.make(model)
    options = ONE_STEP | {
        "per_device_train_batch_size": NUM_ROWS // (accumulation * num_ranks),
        "gradient_accumulation_steps": accumulation,
    }
    rows = Dataset.from_list(case.rows()) if rows is None else rows
    return trainer_class(
        model=model,
        args=st.SentenceTransformerTrainingArguments(**options | (arguments or {})),
        train_dataset=rows,
        loss=loss,
        **kwargs,
    )


def train(*args, **kwargs):
    """(gradients, logged loss) of one optimizer step over all rows."""
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return trainer.seen, trainer.state.log_history[0]["loss"]


def truth(name, rows=None):
    """Gradient and loss of one process that sees all rows at once, by the library's own loss, in float64."""
    case = CASES[name]
    model = make_model().double()
    torch.manual_seed(3)
    loss = case.make(model).double()
    value = stock_loss(model, loss, rows or case.rows())
    value.backward()
    return gradients_of(model, loss), value.item()


def stock_loss(model, loss, rows):
    """The library's loss of rows, in the draw of the first step."""
    labels = torch.tensor([row["label"] for row in rows]) if "label" in rows[0] else None
    if labels is not None and labels.is_floating_point():
        labels = labels.double()
    features = [model.preprocess([row[name] for row in rows]) for name in rows[0] if name != "label"]
    random.seed("42 0")
    with with_attribute(loss, GATHERS, False):  # other ranks are no part of it
        value = loss(features, labels)
    return torch.stack(list(value.values())).sum() if isinstance(value, dict) else value
