"""TensorBoard and wandb for a loop without Trainer and accelerate."""

from collections.abc import Callable

from _shared.arguments import PlainTorchArguments
from _shared.errors import UserError


def open_tracker(training: PlainTorchArguments) -> Callable[[dict[str, float], int], None]:
    """Open the tracker that ``report_to`` names; returns a function of a log entry and its step."""
    if training.report_to == "none":
        return lambda entry, step: None
    try:
        if training.report_to == "wandb":
            import wandb

            run = wandb.init(dir=training.output_dir, config=vars(training))
            return lambda entry, step: run.log(entry, step=step)
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"report_to={training.report_to!r} needs a package: pip install {training.report_to}"
        ) from error
    writer = SummaryWriter(training.output_dir)
    return lambda entry, step: [writer.add_scalar(name, value, step) for name, value in entry.items()]
