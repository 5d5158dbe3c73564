"""sentence-transformers, exact: ``exact`` around its Trainer.

    accelerate launch recipes/frameworks/sentence_transformers_pairs.py --output_dir outputs/pairs

Flags are those of ``SentenceTransformerTrainingArguments``, and the two below. Rows: two sentences and how alike they
are. Losses that compare the rows of a batch (MultipleNegativesRankingLoss and its kin) work the same way.
"""

from dataclasses import dataclass

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from transformers import HfArgumentParser

from hf_gradutils import exact


@dataclass
class Paths:
    """Names on the hub, or folders."""

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    dataset: str = "sentence-transformers/stsb"


def main() -> None:
    paths, training = HfArgumentParser((Paths, SentenceTransformerTrainingArguments)).parse_args_into_dataclasses()
    model = SentenceTransformer(paths.model)
    trainer = exact(SentenceTransformerTrainer)(
        model=model,
        args=training,
        train_dataset=load_dataset(paths.dataset, split="train"),
        loss=CosineSimilarityLoss(model),
    )
    trainer.train()


if __name__ == "__main__":
    main()
