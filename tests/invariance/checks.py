"""Checks and trainings of one model, for the tests of the check."""

from functools import partial

from hf_gradutils import check_invariance
from hf_gradutils.errors import GradUtilsError
from tests.harness.trainer_cases import train

HEAD = "llama causal"
COPIES, TRAINING, PARTS, LAYOUT = range(4)


def checking(trainer_class, **options):
    """A Trainer that checks itself before it trains, as a user would."""

    class Checking(trainer_class):
        report = None

        def train(self, *args, **kwargs):
            if self.report is None:
                self.report = "under way"
                self.report = check_invariance(self, **{"num_samples": 8} | options)
            return super().train(*args, **kwargs)

    return Checking


class EnoughError(Exception):
    """Ends a test's training after the check."""


def report_of(trainer_class, head=HEAD, layout="one_rank", *, num_samples=8, **options):
    """The report of a check, without the training after it."""
    return report_of_training(partial(train, layout=layout), trainer_class, head, num_samples=num_samples, **options)


def report_of_training(train, trainer_class, head, *, num_samples=8, **options):
    """The same, with a training of another kind."""
    reports = []

    class Checking(trainer_class):
        def train(self, *args, **kwargs):
            if reports:
                return super().train(*args, **kwargs)
            reports.append("under way")
            reports[0] = check_invariance(self, num_samples=num_samples)
            raise EnoughError

    try:
        train(head, 4, trainer_class=Checking, **options)
    except EnoughError:
        return reports[0]
    raise AssertionError("the check did not end")


def trains_exactly(trainer_class, want, layout="one_rank", head=HEAD, **options):
    """Whether one optimizer step over 4 micro-batches has the gradient ``want``; False if it stops with an error."""
    try:
        _, tap = train(head, 4, layout=layout, trainer_class=trainer_class, **options)
    except (GradUtilsError, ValueError, TypeError, AttributeError):
        return False
    error = sum((tap.steps[0][name] - grad).square().sum() for name, grad in want.items())
    return bool(error < 1e-10 * sum(grad.square().sum() for grad in want.values()))


def of(*parts):
    """The class of these mixins in front of a Trainer class."""
    return type("Planted", parts, {})
