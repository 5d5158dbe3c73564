"""``exact(TrainerClass)``: a class with a name, a docstring, and a way into a pickle and out of it."""

import copy
import pickle
import subprocess
import sys
from abc import ABC
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import hf_gradutils
from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer, GradUtilsTrainerMixin, exact
from hf_gradutils.errors import InvalidArgumentError
from tests.harness.trainer_cases import make_data, make_model, reset_accelerate


class OfAUser(Trainer):
    """Trains what the user has."""

    def __init__(self, *args, factor=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor


class Abstract(Trainer, ABC):
    pass


class Below(exact(OfAUser)):
    pass


def _trainer(trainer_class, tmp_path, **more):
    args = TrainingArguments(
        str(tmp_path),
        gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
        max_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    return trainer_class(make_model("bert classes"), args, train_dataset=make_data("bert classes", 8), **more)


def _norm(trainer):
    trainer.train()
    return trainer.state.log_history[0]["grad_norm"]


def test_it_trains_as_the_mixin_in_front_does(tmp_path):
    class ByHand(GradUtilsTrainerMixin, OfAUser):
        pass

    made = _norm(_trainer(exact(OfAUser), tmp_path, factor=2.0))
    assert made == _norm(_trainer(ByHand, tmp_path))
    assert _norm(_trainer(OfAUser, tmp_path)) == pytest.approx(4 * made, rel=1e-4), "the control: stock is wrong"


@pytest.mark.parametrize("base", [Trainer, OfAUser, Abstract])
def test_the_class_has_a_name_and_is_one(base):
    made = exact(base)
    assert made is exact(base)
    assert made is exact(made)
    assert made.__name__ == made.__qualname__ == f"Exact{base.__name__}"
    assert made.__module__ == base.__module__
    assert made.__doc__.startswith(f"``{base.__name__}``, exact")
    assert (base.__doc__ or "").strip() in made.__doc__
    assert made.__mro__[1:3] == (GradUtilsTrainerMixin, base)


def test_what_is_exact_stays_as_it_is():
    assert exact(GradUtilsTrainer) is GradUtilsTrainer
    assert exact(Below) is Below


WITH_SETTINGS = exact(OfAUser, grad_plugin=GradUtilsPlugin(norm_type=1))


def test_classes_with_settings_are_one_too():
    assert exact(OfAUser, grad_plugin=GradUtilsPlugin(norm_type=1)) is WITH_SETTINGS
    assert exact(exact(OfAUser), grad_plugin=GradUtilsPlugin(norm_type=1)) is WITH_SETTINGS
    other = exact(OfAUser, grad_plugin=GradUtilsPlugin(norm_type=3))
    assert other is not WITH_SETTINGS
    assert other.__name__ == "ExactOfAUser"


class Named(Trainer):
    def __init_subclass__(cls, *, name, **kwargs):
        super().__init_subclass__(**kwargs)


def test_a_class_that_takes_no_subclass_is_an_error():
    with pytest.raises(InvalidArgumentError, match="Named cannot have an exact subclass"):
        exact(Named)


@pytest.mark.parametrize("made", [exact(Trainer), exact(Abstract), Below, exact(Below), WITH_SETTINGS])
def test_classes_can_be_pickled(made):
    assert pickle.loads(pickle.dumps(made)) is made
    assert copy.deepcopy(made) is made


@pytest.mark.parametrize("trainer_class", [exact(OfAUser), exact(OfAUser, grad_plugin=GradUtilsPlugin(norm_type=1))])
def test_trainers_can_be_pickled_and_train(trainer_class, tmp_path):
    reset_accelerate()  # after a training no Trainer can be pickled, transformers' own neither
    trainer = _trainer(trainer_class, tmp_path, factor=3.0)
    again = pickle.loads(pickle.dumps(trainer))
    assert isinstance(again, GradUtilsTrainerMixin)
    assert again.factor == 3.0
    assert again.grad_plugin.norm_type == trainer.grad_plugin.norm_type
    assert _norm(again) == _norm(trainer)


def test_pickles_are_read_by_another_process(tmp_path):
    path = tmp_path / "class.pickle"
    path.write_bytes(pickle.dumps(exact(Trainer, grad_plugin=GradUtilsPlugin(norm_type=3))))
    code = f"import pickle; c = pickle.load(open({str(path)!r}, 'rb')); print(c.__name__, c.default_plugin.norm_type)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ExactTrainer 3\n"


def test_settings_hold_for_trainers_that_are_given_none(tmp_path):
    made = exact(OfAUser, grad_plugin=GradUtilsPlugin(norm_type=1))
    assert issubclass(made, exact(OfAUser))
    assert _trainer(made, tmp_path).grad_plugin.norm_type == 1
    assert _trainer(made, tmp_path, grad_plugin=GradUtilsPlugin()).grad_plugin.norm_type == 2
    assert _trainer(exact(OfAUser), tmp_path).grad_plugin.norm_type == 2


@pytest.mark.parametrize("wrong", [torch.nn.Module, "Trainer", None, GradUtilsTrainerMixin])
def test_what_is_no_trainer_class_is_an_error(wrong):
    with pytest.raises(InvalidArgumentError, match="exact takes a Trainer class, as exact"):
        exact(wrong)


SNIPPET = """
from hf_gradutils import exact

class Base:
    def train(self, epochs: int) -> str: return ""

trainer = exact(Base)()
reveal_type(trainer.train(3))
trainer.train("three")
"""


@pytest.mark.slow
def test_type_checkers_know_what_it_is(tmp_path):
    (tmp_path / "snippet.py").write_text(SNIPPET)
    package = Path(hf_gradutils.__file__).parent
    read = [package / name for name in ("__init__.py", "trainer/__init__.py", "trainer/_exact.py")]
    options = ["--config-file=", "--follow-imports=skip", "--cache-dir", str(tmp_path)]  # the whole takes a minute
    command = [sys.executable, "-m", "mypy", *options, *map(str, read), "snippet.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert 'snippet.py:8: note: Revealed type is "str"' in done.stdout.replace("builtins.", "")
    assert 'snippet.py:9: error: Argument 1 to "train" of "Base" has incompatible type "str"' in done.stdout
