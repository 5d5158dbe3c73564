"""Cross-encoders and sparse encoders, tiny and local, with the stock trainers of sentence-transformers."""

import contextlib
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from tests.harness.sentence_cases import WORDS, make_rows, make_tokenizer, scored, st, triplets
from tests.harness.trainer_cases import ONE_STEP, reset_accelerate

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"vocab_size": len(WORDS), "initializer_range": 0.3, "max_position_embeddings": 32}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@contextlib.contextmanager
def _saved(head, **options):
    torch.manual_seed(11)
    config = BertConfig(**SIZES, architectures=[head.__name__], **options)
    with tempfile.TemporaryDirectory() as folder:
        config.to_json_file(Path(folder, "config.json"), use_diff=False)
        state = {name: value.clone() for name, value in head(config).state_dict().items()}
        save_file(state, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        make_tokenizer().save_pretrained(folder)
        yield folder


def _arguments(kind, accumulation, num_ranks, **more):
    size = {"per_device_train_batch_size": 16 // (accumulation * num_ranks)}
    return kind(**ONE_STEP | size | {"gradient_accumulation_steps": accumulation} | more)


def make_cross(loss, accumulation, num_ranks=1, *, trainer_class=None, **options):
    """``loss``: of the library's cross-encoders, by name."""
    from sentence_transformers import cross_encoder as ce

    reset_accelerate()
    num_labels = 3 if loss == "CrossEntropyLoss" else 1
    rows = make_rows("query", "answer", label=lambda i: i % 3 if num_labels == 3 else float(i % 2))
    if loss == "LambdaLoss":
        texts = make_rows("query", "a", "b", "c")
        rows = [
            {"query": row["query"], "docs": [row[name] for name in "abc"], "labels": [1.0, 0.0, i % 2]}
            for i, row in enumerate(texts)
        ]
    with _saved(BertForSequenceClassification, num_labels=num_labels) as folder:
        model = ce.CrossEncoder(folder, num_labels=num_labels, device="cpu")
    # The pooler of some heads gets no gradient, in stock too.
    more = {"ddp_find_unused_parameters": False} if num_ranks > 1 else {}
    return (trainer_class or ce.CrossEncoderTrainer)(
        model=model,
        args=_arguments(ce.CrossEncoderTrainingArguments, accumulation, num_ranks, **more),
        train_dataset=Dataset.from_list(rows),
        loss=getattr(ce.losses, loss)(model),
        **options,
    )


def make_sparse(accumulation, num_ranks=1, *, inner="SparseMarginMSELoss", trainer_class=None, weight=0.1):
    """SpladeLoss, whose regularizers compare all rows of a batch and have weight 0 in the first step."""
    from sentence_transformers import sparse_encoder as sparse

    reset_accelerate()
    with _saved(BertForMaskedLM) as folder:
        transformer = st.sentence_transformer.modules.Transformer(folder, transformer_task="fill-mask")
    model = sparse.SparseEncoder(modules=[transformer, sparse.modules.SpladePooling("max")], device="cpu")
    rows = triplets(label=lambda i: i / 5) if inner == "SparseMarginMSELoss" else scored()
    loss = getattr(sparse.losses, inner)(model)
    if weight:
        loss = sparse.losses.SpladeLoss(model, loss, document_regularizer_weight=weight, query_regularizer_weight=0.1)
    return (trainer_class or sparse.SparseEncoderTrainer)(
        model=model,
        args=_arguments(sparse.SparseEncoderTrainingArguments, accumulation, num_ranks),
        train_dataset=Dataset.from_list(rows),
        loss=loss,
    )
