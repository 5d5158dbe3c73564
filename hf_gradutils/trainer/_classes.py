"""The drop-ins for transformers' own Trainers."""

from transformers import Seq2SeqTrainer, Trainer

from hf_gradutils.trainer._trainer import GradUtilsTrainerMixin


class GradUtilsTrainer(GradUtilsTrainerMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer``, exact.

    Takes the arguments of ``Trainer``, and ``grad_plugin=GradUtilsPlugin(…)`` for settings. Gradient, gradient norm and
    logged loss are those of one process with the whole batch, for every accumulation, number of ranks and head. A log
    entry also has ``num_targets``, and the evaluation loss is a mean over all targets of the evaluation set.
    """


class GradUtilsSeq2SeqTrainer(GradUtilsTrainerMixin, Seq2SeqTrainer):  # type: ignore[misc]
    """``transformers.Seq2SeqTrainer``, exact in the same way."""
