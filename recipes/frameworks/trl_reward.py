"""TRL's RewardTrainer, exact: ``exact`` around it.

    accelerate launch recipes/frameworks/trl_reward.py --output_dir outputs/reward

Flags are those of ``RewardConfig``, and the two below.
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import RewardConfig, RewardTrainer

from hf_gradutils import exact


@dataclass
class Paths:
    """Names on the hub, or folders."""

    model: str = "Qwen/Qwen3-0.6B"
    dataset: str = "trl-lib/ultrafeedback_binarized"


def main() -> None:
    paths, training = HfArgumentParser((Paths, RewardConfig)).parse_args_into_dataclasses()
    rows = load_dataset(paths.dataset, split="train")
    trainer = exact(RewardTrainer)(model=paths.model, args=training, train_dataset=rows)
    trainer.train()


if __name__ == "__main__":
    main()
