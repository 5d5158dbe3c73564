"""``exact_trainers`` and ``check_trainers``: blocks around functions that make Trainers inside."""

import multiprocessing

import pytest
from transformers import Trainer

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainerMixin, check_trainers, exact, exact_trainers
from hf_gradutils.errors import InvalidArgumentError
from tests.harness.layouts import on_layouts
from tests.trainer.test_exact import OfAUser, _norm, _trainer


def test_trainers_that_a_framework_builds_are_exact_in_the_block(tmp_path):
    stock = _norm(_trainer(OfAUser, tmp_path))
    with exact_trainers():
        made = _trainer(OfAUser, tmp_path, factor=2.0)
        norm = _norm(made)
    assert isinstance(made, GradUtilsTrainerMixin)
    assert made.factor == 2.0
    assert stock == pytest.approx(4 * norm, rel=1e-4)
    after = _trainer(OfAUser, tmp_path)
    assert type(after) is OfAUser
    assert _norm(after) == stock, "the hook does nothing any more"


def test_the_inner_block_decides_and_errors_end_blocks(tmp_path):
    with exact_trainers(GradUtilsPlugin(norm_type=1)):
        with pytest.raises(InvalidArgumentError), exact_trainers(GradUtilsPlugin(norm_type=3)):  # noqa: PT012
            assert _trainer(Trainer, tmp_path).grad_plugin.norm_type == 3
            exact("no class")
        assert _trainer(Trainer, tmp_path).grad_plugin.norm_type == 1
    assert type(_trainer(Trainer, tmp_path)) is Trainer


def test_settings_of_a_class_stay_and_classes_are_one(tmp_path):
    own = exact(OfAUser, grad_plugin=GradUtilsPlugin(norm_type=1))
    with exact_trainers(GradUtilsPlugin(norm_type=3)):
        first, second = _trainer(Trainer, tmp_path), _trainer(Trainer, tmp_path)
        assert _trainer(own, tmp_path).grad_plugin.norm_type == 1
    assert type(first) is type(second)
    assert first.grad_plugin.norm_type == 3


class WithNew(Trainer):
    def __new__(cls, *args, **kwargs):
        made = super().__new__(cls)
        made.new_was_called = True
        return made


def test_a_class_with_a_new_of_its_own_is_exact_too(tmp_path):
    with exact_trainers():
        made = _trainer(WithNew, tmp_path)
    assert isinstance(made, GradUtilsTrainerMixin)
    assert made.new_was_called


def test_a_trainer_of_before_the_block_is_an_error(tmp_path):
    before = _trainer(Trainer, tmp_path)
    with exact_trainers():
        for _ in 1, 2:  # and again, though a program goes on after the first error
            with pytest.raises(InvalidArgumentError, match="this Trainer was built before the block"):
                before.train()
    assert before.state.global_step == 0


def test_a_trainer_that_cannot_be_exact_is_an_error(tmp_path):
    def build():
        trainer = _trainer(Trainer, tmp_path)
        trainer.args.max_grad_norm = -1.0
        return Trainer(trainer.model, trainer.args)

    build()
    with exact_trainers(), pytest.raises(InvalidArgumentError, match="max_grad_norm must be > 0"):
        build()


def test_the_first_training_is_checked_and_the_block_left(tmp_path):
    trained, train = [], Trainer.train
    trainer = _trainer(Trainer, tmp_path)
    with check_trainers(num_samples=8) as reports:
        try:
            trainer.train()
        except Exception:
            trained.append("after an error")
        trained.append("after")
    assert trained == []
    assert [report.verdict for report in reports] == ["FAILED"]
    assert Trainer.train is train
    assert trainer.state.global_step == 0
    trainer.train()
    assert trainer.state.global_step == 1


def test_all_trainers_are_checked_and_trained(tmp_path):
    with check_trainers(num_samples=8, all_trainers=True) as reports, exact_trainers():
        norms = [_norm(_trainer(trainer_class, tmp_path)) for trainer_class in (Trainer, OfAUser)]
    assert [report.verdict for report in reports] == ["passed", "passed"]
    with exact_trainers():
        assert norms == [_norm(_trainer(Trainer, tmp_path))] * 2, "the check changes nothing"


@on_layouts("ddp2")
def test_ranks_check_together(layout, tmp_path):
    with check_trainers(num_samples=8) as reports:
        _trainer(Trainer, tmp_path).train()
    assert [report.verdict for report in reports] == ["FAILED"]


def test_a_process_that_the_block_starts_is_told_what_to_do(tmp_path):
    trainer = _trainer(Trainer, tmp_path)

    def train(queue):
        try:
            trainer.train()
        except InvalidArgumentError as error:
            queue.put(str(error))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=train, args=(queue,))
    with pytest.raises(InvalidArgumentError, match="no Trainer began to train in the block"), check_trainers():
        process.start()
    message = queue.get(timeout=60)
    process.join()
    assert "put the block into the function that the process runs" in message
