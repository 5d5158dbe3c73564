"""Drop-ins for transformers' Trainers with exact gradients."""

from hf_gradutils.trainer._classes import GradUtilsSeq2SeqTrainer, GradUtilsTrainer
from hf_gradutils.trainer._exact import exact
from hf_gradutils.trainer._trainer import GradUtilsTrainerMixin

__all__ = ["GradUtilsSeq2SeqTrainer", "GradUtilsTrainer", "GradUtilsTrainerMixin", "exact"]
