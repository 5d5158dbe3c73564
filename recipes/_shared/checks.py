"""Checks of the training arguments that need no data: preparing it may take hours."""

import os
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from transformers import SchedulerType, TrainingArguments
from transformers.integrations import get_available_reporting_integrations, integration_utils

from _shared.deepspeed import match_deepspeed
from _shared.errors import UserError


def check_at_least(arguments: Any, least: float, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) < least:
            raise UserError(f"{name} must be at least {least}, got {getattr(arguments, name)}")


def check_training(training: Any) -> None:
    """Raise UserError for sizes, folders and trackers that would stop the run later."""
    check_at_least(training, 1, "per_device_train_batch_size", "per_device_eval_batch_size")
    check_at_least(training, 1, "gradient_accumulation_steps")
    if (limit := training.max_grad_norm) < 0:
        raise UserError(f"max_grad_norm must be >= 0, got {limit}; 0 turns clipping off, 1.0 is usual")
    if plugin := getattr(training, "deepspeed_plugin", None):
        match_deepspeed(plugin, training)
    schedulers = [scheduler.value for scheduler in SchedulerType]
    if training.lr_scheduler_type not in schedulers:
        known = ", ".join(schedulers)
        raise UserError(f"lr_scheduler_type must be one of {known}, got {training.lr_scheduler_type!r}")
    check_folder(Path(training.output_dir).expanduser())
    names = training.report_to if isinstance(training.report_to, list) else [training.report_to]
    known, available = trackers(training)
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in known:
            raise UserError(f"report_to must be none or one of {', '.join(sorted(known))}, got {name!r}")
        if name not in available:
            raise UserError(f"report_to={name!r} needs a package: pip install {name}")


def check_folder(folder: Path) -> None:
    """Raise UserError if the folder cannot be written or made."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"output_dir is {str(folder)!r}, and {str(there)!r} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output_dir is {str(folder)!r}, and {str(there)!r} cannot be written")


def trackers(training: Any) -> tuple[set[str], set[str]]:
    """Return the names that ``report_to`` may have, and those whose packages are installed."""
    if isinstance(training, TrainingArguments):
        return set(integration_utils.INTEGRATION_TO_CALLBACK), set(get_available_reporting_integrations())
    return {*LoggerType.list()} - {"all"}, {LoggerType(name).value for name in get_available_trackers()}
