"""TRL's SFTTrainer, exact: ``exact`` around it.

    accelerate launch recipes/frameworks/trl_sft.py --output_dir outputs/sft

Flags are those of ``SFTConfig``, and the two below.
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from hf_gradutils import exact


@dataclass
class Paths:
    """Names on the hub, or folders."""

    model: str = "Qwen/Qwen3-0.6B"
    dataset: str = "trl-lib/Capybara"


def main() -> None:
    paths, training = HfArgumentParser((Paths, SFTConfig)).parse_args_into_dataclasses()
    rows = load_dataset(paths.dataset, split="train")
    trainer = exact(SFTTrainer)(model=paths.model, args=training, train_dataset=rows)
    trainer.train()


if __name__ == "__main__":
    main()
