"""T5, BART and their kin under FSDP2: their embeddings are one parameter in several modules."""

import copy

import pytest
import torch
from ranks import RankFailure
from torch import nn
from trainer_cases import make_data, make_model, relative_error, run, train, truth
from transformers import Trainer

from hf_gradutils.tied_embeddings import merge_tied_embeddings


@pytest.mark.parametrize("layout", ["fsdp2x2", "hsdp2x2"])
@pytest.mark.parametrize("head", ["t5 seq2seq", "bart seq2seq"])
def test_they_train_exactly(head, layout):
    assert max(run(_error, layout, head)) < 1e-5


def _error(layout, head):
    data = make_data(head)
    _, tap = train(head, 2, layout=layout, data=data)
    return relative_error(tap.steps[0], truth(head, data)[0])


def test_control_accelerate_puts_the_embedding_into_two_groups():
    with pytest.raises(RankFailure, match="is shared with a parameter already managed by another FSDP"):
        run(_stock, "fsdp2x2")


def _stock(layout):
    train("t5 seq2seq", 2, layout=layout, trainer_class=Trainer)


@pytest.mark.parametrize("head", ["t5 seq2seq", "bart seq2seq", "llama causal"])
def test_names_values_and_files_stay_as_they_were(head, tmp_path):
    model = make_model(head)
    before = copy.deepcopy(model)
    merge_tied_embeddings(model)
    for names in ("state_dict", "named_parameters"):
        got, want = (
            dict(getattr(m, names)() if names == "state_dict" else m.named_parameters()) for m in (model, before)
        )
        assert list(got) == list(want)
        assert all(torch.equal(got[name], want[name]) for name in want)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), before.parameters(), strict=True))


class Pair(nn.Module):
    def __init__(self, **told):
        super().__init__()
        self.first = nn.Embedding(5, 2)
        self.second = nn.Embedding(5, 2, **told)
        self.second.weight = self.first.weight


def test_what_differs_in_more_than_its_name_stays_apart():
    same, other, hooked, apart = Pair(), Pair(padding_idx=0), Pair(), Pair()
    hooked.second.register_forward_hook(lambda *_: None)
    apart.second.weight = nn.Parameter(torch.ones(5, 2))
    for pair in (same, other, hooked, apart):
        merge_tied_embeddings(pair)
    assert [pair.first is pair.second for pair in (same, other, hooked, apart)] == [True, False, False, False]
