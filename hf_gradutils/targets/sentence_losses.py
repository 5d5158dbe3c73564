"""The losses of sentence-transformers: which are means over rows, and which compare the rows of the whole batch.

sentence-transformers is optional and never imported. A loss is identified by the first class in its hierarchy that the
library defines, so that users' subclasses are found. Checked on sentence-transformers 6.2;
``tests/trainer/test_sentence_transformers.py`` fails when a name moves.
"""

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from hf_gradutils.targets.counter import CountTargets
from hf_gradutils.upstream.sentence_transformers import DECODERS_TOKENIZER, LIBRARY

Kind = Literal["mean", "whole", "sum", "tokens", "unknown"]

_WHOLE = """
    MultipleNegativesRankingLoss CachedMultipleNegativesRankingLoss MultipleNegativesSymmetricRankingLoss
    CachedMultipleNegativesSymmetricRankingLoss GISTEmbedLoss CachedGISTEmbedLoss MegaBatchMarginLoss CoSENTLoss
    AnglELoss OnlineContrastiveLoss BatchHardTripletLoss BatchHardSoftMarginTripletLoss BatchSemiHardTripletLoss
    BatchAllTripletLoss GlobalOrthogonalRegularizationLoss ContrastiveTensionLossInBatchNegatives SpladeLoss
    CachedSpladeLoss
"""
_MEAN = """
    CosineSimilarityLoss TripletLoss ContrastiveLoss EmbedDistillLoss MSELoss MarginMSELoss DistillKLDivLoss SoftmaxLoss
"""

KINDS: dict[str, Kind] = {
    **dict.fromkeys(_WHOLE.split(), "whole"),
    **dict.fromkeys(_MEAN.split(), "mean"),
    "ContrastiveTensionLoss": "sum",
    "DenoisingAutoEncoderLoss": "tokens",
}
"""Class name → what its loss is: a mean or sum over rows, a mean over tokens, or one of the whole batch."""

WRAPPERS = ("MatryoshkaLoss", "Matryoshka2dLoss", "AdaptiveLayerLoss")
"""Losses that add up another one, their ``loss``, over dimensions or layers."""

_SENTENCE_TRAINERS = ("SentenceTransformerTrainer", "SparseEncoderTrainer")


def losses_of(trainer: Any) -> dict[str | None, Any]:
    """The losses of a trainer of sentence or sparse encoders, by data set; none of another trainer."""
    names = {base.__name__ for base in trainer.__class__.__mro__ if _is_the_librarys(base)}
    if not names & {*_SENTENCE_TRAINERS}:
        return {}
    loss = trainer.loss
    return dict(loss) if isinstance(loss, dict) else {None: loss}


def kind_of(loss: object) -> Kind:
    """What a loss is."""
    name = loss_name(loss)
    if name in WRAPPERS:
        return kind_of(loss.loss)  # type: ignore[attr-defined]
    if name == "ContrastiveLoss" and not loss.size_average:  # type: ignore[attr-defined]
        return "sum"
    return KINDS.get(name, "unknown")


def loss_name(loss: object) -> str:
    """Name of the library's loss that this one is or derives from, of those known here; empty if it is none."""
    names = (base.__name__ for base in type(loss).__mro__ if _is_the_librarys(base))
    return next((name for name in names if name in KINDS or name in WRAPPERS), "")


def innermost(loss: Any) -> Any:
    """The loss inside of wrappers."""
    while loss_name(loss) in WRAPPERS:
        loss = loss.loss
    return loss


def token_counter(loss: Any) -> CountTargets:
    """The count of the tokens that the decoder of a denoising auto-encoder predicts."""
    padding = getattr(innermost(loss), DECODERS_TOKENIZER).pad_token_id

    def count_decoded_tokens(batch: Any) -> Tensor:
        names = [name for name in batch if name.endswith("_input_ids")]
        num_tokens: Tensor = batch[names[1]][:, 1:].ne(padding).sum()
        return num_tokens

    return count_decoded_tokens


def own_parameters(trainer: Any) -> list[nn.Parameter]:
    """Trained parameters of a trainer's losses that are not the model's, but for those of a guide, which is fixed."""
    found: dict[int, nn.Parameter] = {}
    for loss in losses_of(trainer).values():
        guides = {id(p) for part in _chain(loss) for p in _parameters_of(getattr(part, "guide", None))}
        found |= {id(p): p for p in _parameters_of(loss) if p.requires_grad and id(p) not in guides}
    models = {id(p) for p in trainer.model.parameters()}
    return [p for key, p in found.items() if key not in models]


def _parameters_of(module: Any) -> Iterator[nn.Parameter]:
    return module.parameters() if isinstance(module, nn.Module) else iter(())


def _chain(loss: Any) -> Iterator[Any]:
    """A loss, and those inside of wrappers."""
    yield loss
    while loss_name(loss) in WRAPPERS:
        loss = loss.loss
        yield loss


def _is_the_librarys(base: type) -> bool:
    return base.__module__.partition(".")[0] == LIBRARY
