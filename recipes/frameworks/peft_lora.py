"""PEFT, exact: ``exact`` around the Trainer; the adapter changes nothing.

    accelerate launch recipes/frameworks/peft_lora.py --output_dir outputs/lora

Flags are those of ``TrainingArguments``, and the two below. Rows: a text and its label.
"""

from dataclasses import dataclass

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_gradutils import exact


@dataclass
class Paths:
    """Names on the hub, or folders."""

    model: str = "google-bert/bert-base-uncased"
    dataset: str = "stanfordnlp/imdb"


def main() -> None:
    paths, training = HfArgumentParser((Paths, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(paths.model)
    rows = load_dataset(paths.dataset, split="train")
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True), remove_columns=["text"])
    model = AutoModelForSequenceClassification.from_pretrained(paths.model, num_labels=2)
    # No dropout in the adapter for the same reason as anywhere: its masks depend on how the batch is split.
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0))
    trainer = exact(Trainer)(model=model, args=training, train_dataset=rows, processing_class=tokenizer)
    trainer.train()


if __name__ == "__main__":
    main()
