"""Names of axolotl (0.19) that its documentation does not promise."""

from types import SimpleNamespace
from typing import Any

RL_KEY = "rl"
REWARD_KEYS = ("reward_model", "process_reward_model")


def causal_trainer_class(cfg: Any) -> type[Any]:
    """The class of which axolotl's builder of supervised trainings would make the Trainer, plug-ins asked first."""
    from axolotl.core.builders.causal import HFCausalTrainerBuilder

    # It reads nothing else of the builder, which needs a model to be made.
    chosen: type[Any] = HFCausalTrainerBuilder._get_trainer_cls(SimpleNamespace(cfg=cfg))
    return chosen
