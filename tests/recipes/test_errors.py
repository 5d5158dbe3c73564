"""Errors in the preparation are one line on each rank, and the launcher names the rank that failed as root cause."""

import json

import pytest

from _shared.data import load_tokenizer
from _shared.errors import UserError, exit_with_error, line_of, plain_errors
from _shared.models import load_model
from hf_gradutils.errors import FirstRankError, InvalidArgumentError


@pytest.mark.parametrize(
    "error", [KeyError("x"), OSError(28, "No space left"), RuntimeError("two\n\nlines"), TypeError()]
)
def test_what_nothing_has_foreseen_is_one_line_with_its_place(error):
    with pytest.raises(UserError) as raised, plain_errors():
        raise error
    line = str(raised.value)
    assert line.startswith(type(error).__name__)
    assert "(unexpected, in recipes/test_errors.py:" in line
    assert "RECIPE_TRACEBACK=1" in line
    assert "\n" not in line
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [UserError("mine"), InvalidArgumentError("ours"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_plain_already_stays(error):
    with pytest.raises(type(error)) as raised, plain_errors():
        raise error
    assert raised.value is error


def test_ranks_that_waited_say_which_rank_failed_and_why():
    error = FirstRankError("any")
    error.global_rank, error.reason = 0, "_shared.errors.UserError: my.csv, row 3: bad\nand long"
    assert line_of(error) == "rank 0 could not prepare the data: my.csv, row 3: bad and long"
    error.reason = "KeyError: 'x'"
    assert line_of(error) == "rank 0 could not prepare the data: KeyError: 'x'"
    error.reason = "KeyboardInterrupt"
    assert line_of(error) == "interrupted, as rank 0 was"
    error.reason, error.global_rank = "has ended (killed, or left early)", None
    assert line_of(error) == "the first rank of this node could not prepare the data: has ended (killed, or left early)"
    assert line_of(FirstRankError("timed out\nsomewhere")) == "timed out somewhere"


@pytest.fixture
def exit_of(monkeypatch, tmp_path, capsys):
    """Let a rank end with an error: after which second it exits, the time it reports and what it prints."""

    def end(rank, error, num_ranks=2):
        now, report = [1000.0], tmp_path / f"{rank}.json"
        monkeypatch.setattr("_shared.errors.time.time", lambda: now[0])
        monkeypatch.setattr("_shared.errors.time.sleep", lambda seconds: now.append(now.pop() + seconds))
        variables = {"RANK": rank, "WORLD_SIZE": num_ranks, "TORCHELASTIC_ERROR_FILE": report}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit) as ended:
            exit_with_error(error)
        assert ended.value.code == 1
        cause = json.loads(report.read_text())["message"]
        printed = capsys.readouterr().err
        assert printed.endswith(f"{cause['message']}\n")
        return now[0] - 1000, int(cause["extraInfo"]["timestamp"]) - 1000, printed

    return end


@pytest.mark.parametrize("other", [UserError("bad flag"), FirstRankError("rank 0 failed")])
def test_rank_0_ends_first_and_reports_the_earliest_time(exit_of, other):
    exits_s, reported_s, printed = exit_of(0, UserError("bad flag"))
    assert (exits_s, reported_s, printed) == (5, 0, "rank 0: error: bad flag\n")
    later_s, later_reported_s, _ = exit_of(1, other)
    assert later_s >= exits_s + 5, "time for the launcher to see rank 0"
    assert later_reported_s > reported_s


def test_a_rank_with_an_error_of_its_own_ends_before_those_that_wait_for_it(exit_of):
    waiting_s, reported_s, _ = exit_of(0, FirstRankError("rank 1 failed"))
    own_s, own_reported_s, _ = exit_of(1, UserError("no space"))
    assert (own_s < waiting_s, own_reported_s < reported_s) == (True, True)


def test_one_rank_ends_at_once_and_the_traceback_is_there_when_asked_for(exit_of, monkeypatch):
    error = UserError("bad")
    error.__cause__ = KeyError("deep")
    assert exit_of(0, error, num_ranks=1)[::2] == (0, "rank 0: error: bad\n")
    monkeypatch.setenv("RECIPE_TRACEBACK", "1")
    _, _, printed = exit_of(0, error, num_ranks=1)
    assert "KeyError: 'deep'" in printed


def test_an_interrupted_rank_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        exit_with_error(KeyboardInterrupt())
    assert ended.value.code == 130
    with pytest.raises(SystemExit), plain_errors():
        raise SystemExit(3)
    assert capsys.readouterr().err == "rank 1: interrupted\nrank 1: interrupted, exit code 3\n"


def test_a_broken_model_folder_is_one_line(tmp_path, recipe):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "intermediate_size": 8}))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    arguments = recipe(model_name_or_path=str(tmp_path))
    with pytest.raises(UserError, match=r"cannot load the tokenizer of '[^']+': \S"):
        load_tokenizer(arguments, None)
    with pytest.raises(UserError, match=r"cannot load '[^']+': Error while deserializing header"):
        load_model(arguments, None, max_length=8)
