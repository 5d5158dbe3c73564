"""Drop-ins for transformers' Trainers with exact gradients."""

from hf_gradutils.trainer._trainer import GradUtilsSeq2SeqTrainer, GradUtilsTrainer, GradUtilsTrainerMixin

__all__ = ["GradUtilsSeq2SeqTrainer", "GradUtilsTrainer", "GradUtilsTrainerMixin"]
