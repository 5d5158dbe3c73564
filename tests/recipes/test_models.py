"""Named models: the order of a head's classes, and positions, of which a table has only so many."""

import types

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from _shared.classes import find_classes
from _shared.errors import UserError
from _shared.files import Source, Texts
from _shared.lines import ROW
from _shared.models import load_model, num_positions
from _shared.training_report import max_new_tokens, sample_outputs

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 300}


def texts_of(labels, features=None):
    rows = datasets.Dataset.from_dict({"text": ["one"] * len(labels), "label": labels}, features=features)
    return Texts(rows=rows.add_column(ROW, list(range(1, len(rows) + 1))), source=Source(name="my.jsonl"))


@pytest.fixture
def classifier(tmp_path):
    """A fine-tuned classifier with these classes."""

    def save(*names):
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        config = AutoConfig.for_model("bert", **SMALL, max_position_embeddings=16, **labels)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


@pytest.mark.parametrize(
    ("head", "labels", "classes"),
    [
        (["neg", "pos"], ["pos", "pos", "neg"], ["neg", "pos"]),
        (["neg", "neutral", "pos"], ["pos", "pos", "neg"], ["neg", "neutral", "pos"]),
        (["neg", "pos"], [1, 1, 0], ["0", "1"]),
        (["LABEL_0", "LABEL_1"], ["b", "b", "a"], ["b", "a"]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], [1, 1, 0], ["0", "1", "2"]),
    ],
)
def test_a_fine_tuned_head_keeps_the_order_of_its_classes(head, labels, classes, classifier, recipe):
    arguments = recipe(task="sequence-classification", model_name_or_path=classifier(*head))
    assert find_classes(arguments, texts_of(labels)) == classes


def test_the_order_of_the_head_is_said(classifier, recipe, capsys):
    arguments = recipe(task="sequence-classification", model_name_or_path=classifier("b", "c", "a"))
    find_classes(arguments, texts_of(["a", "b"]))
    assert capsys.readouterr().out.endswith("model: 'b', 'c', 'a'\n")


def test_a_head_that_does_not_fit_is_one_line(classifier, recipe):
    arguments = recipe(task="sequence-classification", model_name_or_path=classifier("neg", "pos"))
    with pytest.raises(UserError, match=r"has 2 classes \('neg', 'pos'\), and column 'label' has 3 \('pos', 'bad', "):
        find_classes(arguments, texts_of(["pos", "bad", "other"]))


def test_a_class_label_keeps_its_order_and_so_do_the_most_frequent_of_its_classes(recipe):
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    texts = texts_of([2, 2, 1, 1, 0], datasets.Features(features))
    assert find_classes(recipe(task="sequence-classification"), texts) == ["a", "b", "c"]
    assert find_classes(recipe(task="sequence-classification", max_labels=2), texts) == ["b", "c"]


@pytest.mark.parametrize(
    ("kind", "size", "num"),
    [
        ("bert", {"max_position_embeddings": 16}, 16),
        ("roberta", {"max_position_embeddings": 18, "pad_token_id": 1}, 16),
        ("gpt2", {"n_positions": 16, "n_embd": 8, "n_head": 2, "n_layer": 1}, 16),
        ("bart", {"max_position_embeddings": 16, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}, 16),
        ("llama", {"max_position_embeddings": 16}, None),
        ("t5", {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}, None),
    ],
)
def test_a_table_of_positions_has_room_for_so_many(kind, size, num):
    own = SMALL if kind in ("bert", "roberta", "llama") else {"vocab_size": 300}
    if kind == "bart":
        size = {**size, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    assert num_positions(AutoModel.from_config(AutoConfig.for_model(kind, **own, **size))) == num


def test_more_tokens_than_positions_are_one_line_and_samples_stay_within(tokenizer, recipe, tmp_path):
    config = AutoConfig.for_model("gpt2", vocab_size=300, n_positions=16, n_embd=8, n_head=2, n_layer=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    arguments = recipe(model_name_or_path=str(tmp_path))
    with pytest.raises(UserError, match=r"max_length is 17, and '.*' has 16 positions; pass --max_length 16"):
        load_model(arguments, tokenizer, max_length=17)
    model = load_model(arguments, tokenizer, max_length=16)
    rows = datasets.Dataset.from_list([{"input_ids": [9] * 16, "labels": [-100] * 14 + [9] * 2}])
    assert max_new_tokens(model, 14) == 2
    ((given, _, _),) = sample_outputs(model, tokenizer, rows, "causal-lm")  # a token more would be an IndexError
    assert given


def test_the_states_of_an_encoder_are_no_logits():
    from tests.harness.recipe_cases import RECIPES

    source = types.ModuleType("finetune")
    exec(compile((RECIPES / "finetune.py").read_text(), "finetune.py", "exec"), vars(source))
    logits = torch.tensor([[0.0, 1.0]])
    assert source.most_likely_class((logits, torch.zeros(1, 3, 8)), None).tolist() == [1]
    assert source.most_likely_class(logits, None).tolist() == [1]
