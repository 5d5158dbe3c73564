"""Fine-tune with plain torch and the documented utilities: your own loop, without Trainer or accelerate.

    torchrun --nproc_per_node 2 recipes/finetune_utilities.py configs/causal_lm.yaml
    torchrun --nproc_per_node 8 recipes/finetune_utilities.py configs/causal_lm.yaml --shard --bf16

Each micro-batch's loss is turned into a sum over its targets. After the window ``rescale_gradients`` divides by the
targets of all micro-batches and ranks, and ``clip_gradients`` clips to the norm over the whole model. The YAML file
sets fields of ``RecipeArguments`` and ``PlainTorchArguments`` (_shared/arguments.py); flags override it.
"""

import logging
import math
import os
import sys
import time
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import get_scheduler, set_seed

from _shared.arguments import PlainTorchArguments, RecipeArguments, parse_arguments
from _shared.checkpoints import drop_old_checkpoints, find_checkpoint, read_state, write_state
from _shared.classes import find_classes
from _shared.data import load_texts, load_tokenizer
from _shared.errors import UserError, exit_with_error, plain_errors
from _shared.models import load_model
from _shared.overview import Pace, print_overview
from _shared.tokenization import count_targets, make_collator, pad_to_multiple, tokenize
from _shared.tracking import open_tracker
from _shared.training_report import exit_with_check, report_run, sample_outputs
from hf_gradutils import (
    FirstRankPerNode,
    barrier_and_log,
    check_window_invariance,
    clip_gradients,
    get_sync_ctx,
    reduce_loss,
    rescale_gradients,
)
from hf_gradutils.errors import GradUtilsError

RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
NUM_RANKS = int(os.environ.get("WORLD_SIZE", 1))


def main() -> None:
    recipe, training = parse_arguments(sys.argv[1:], RecipeArguments, PlainTorchArguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_gradutils").setLevel(logging.INFO)
    set_seed(training.seed)

    # One rank downloads and tokenizes for every node that shares the cache; the other ranks then load from the cache.
    with plain_errors(), FirstRankPerNode(scope="auto", cache_dir=recipe.cache_dir):
        train_texts, held_out_texts = load_texts(recipe)
        tokenizer = load_tokenizer(recipe, train_texts)
        classes = find_classes(recipe, train_texts)
        train, train_counts = tokenize(train_texts, recipe, tokenizer, classes)
        held_out, held_out_counts = tokenize(held_out_texts, recipe, tokenizer, classes)
        model = load_model(recipe, tokenizer, max_length=recipe.max_length, task=recipe.task, classes=classes)
    print_overview(train, (train_counts, held_out_counts), tokenizer, task=recipe.task, classes=classes)
    barrier_and_log(f"{recipe.task}: {len(train)} training and {len(held_out)} held-out examples, {NUM_RANKS} rank(s)")

    device = join_ranks()
    unwrapped = model.to(device)
    model = spread(unwrapped, training)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=device.type == "cuda"
    )
    collator = make_collator(recipe, tokenizer, unwrapped)
    steps_per_epoch = len(epoch_of(train, collator, training, 0)) / training.gradient_accumulation_steps
    steps_per_epoch = math.ceil(steps_per_epoch)  # the last window may be short
    if steps_per_epoch == 0:
        raise UserError(f"{len(train)} training examples are too few for {NUM_RANKS} ranks")
    num_steps = training.max_steps if training.max_steps > 0 else training.num_train_epochs * steps_per_epoch
    scheduler = get_scheduler(training.lr_scheduler_type, optimizer, training.warmup_steps, num_steps)

    if recipe.check_invariance:
        check(model, train, collator, recipe, training, device)

    step, log_history = 0, []
    if checkpoint := find_checkpoint(training.output_dir, training.resume_from_checkpoint):
        load_checkpoint(checkpoint, model, optimizer, scheduler)
        step, log_history = read_state(checkpoint)
    first_step, start_s = step, time.monotonic()
    track = open_tracker(training) if RANK == 0 else None
    pace = Pace(num_steps, step, write=print if RANK == 0 else None)

    def log(**entry: float) -> None:
        log_history.append({"step": step, "epoch": step / steps_per_epoch, **entry})
        if RANK == 0:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in entry.items())
            print(f"step {step}/{num_steps}  {numbers}", flush=True)
            track(entry, step)

    model.train()
    logged_loss = logged_targets = 0
    while step < num_steps:
        epoch, num_done = divmod(step, steps_per_epoch)
        micro_batches = iter(epoch_of(train, collator, training, epoch, num_steps_done=num_done))
        while step < num_steps and (window := list(islice(micro_batches, training.gradient_accumulation_steps))):
            losses, num_targets = make_gradient(model, window, recipe, training, device)
            grad_norm = clip_gradients(model, training.max_grad_norm or math.inf)
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            pace.after_step(step)

            loss, denominator = reduce_loss(losses, num_targets)
            logged_loss, logged_targets = logged_loss + loss, logged_targets + denominator
            if training.is_due("log", step):  # the only host sync
                loss, num_logged = float(logged_loss / logged_targets), int(logged_targets)
                log(loss=loss, grad_norm=float(grad_norm), learning_rate=learning_rate, num_targets=num_logged)
                logged_loss = logged_targets = 0
            if training.is_due("evaluate", step):
                log(eval_loss=evaluate(model, held_out, collator, recipe, training, device))
            if training.is_due("save", step):
                save_checkpoint(model, optimizer, scheduler, step, log_history, training)
    train_time_s = time.monotonic() - start_s

    evaluation = {"eval_loss": evaluate(model, held_out, collator, recipe, training, device)}
    log(**evaluation)
    output = Path(training.output_dir)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if RANK == 0:
        unwrapped.save_pretrained(output, state_dict=weights)
        tokenizer.save_pretrained(output)
        write_state(output, step, log_history)
    samples = sample_outputs(unwrapped, tokenizer, held_out, recipe.task)  # on all ranks, as sharded models need
    if RANK == 0:
        report_run(training, log_history, evaluation, train_time_s, first_step, samples)
    barrier_and_log("done")
    if dist.is_initialized():
        dist.destroy_process_group()


# ── Ranks and model ──────────────────────────────────────────────────────────────────────────────────────


def make_gradient(model, window, recipe, training, device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Compute the gradient of one optimizer step; returns each micro-batch's summed loss and this rank's targets."""
    losses, num_targets = [], torch.zeros((), dtype=torch.int64, device=device)
    for i, batch in enumerate(window):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        num_here = count_targets(batch, recipe.task)  # never 0: rows without a target were dropped
        with get_sync_ctx(model, is_optim_step=i == len(window) - 1):
            with autocast(device, training):
                loss = model(**batch).loss
            loss = loss.float() * num_here  # turns the micro-batch's mean into a sum over its targets
            loss.backward()
        losses.append(loss.detach())
        num_targets += num_here
    rescale_gradients(model, num_targets)
    return losses, num_targets


def check(model, rows, collator, recipe, training, device) -> None:
    """Compare gradients with those of one process and one batch, then exit."""

    def run_window(batches):
        loss, denominator = reduce_loss(*make_gradient(model, batches, recipe, training, device))
        return loss / denominator

    def loss_and_targets(model, batch):
        return model(**batch).loss, count_targets(batch, recipe.task)

    exit_with_check(check_window_invariance(model, rows, collator, run_window, loss_and_targets), is_first=RANK == 0)


def join_ranks() -> torch.device:
    """Create the process group that torchrun's variables describe; returns this rank's device."""
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(LOCAL_RANK)
        device = torch.device(torch.accelerator.current_accelerator().type, LOCAL_RANK)
    if "RANK" in os.environ:
        dist.init_process_group(dist.get_default_backend_for_device(device))
    return device


def spread(model: torch.nn.Module, training: PlainTorchArguments) -> torch.nn.Module:
    """Shard the model, or replicate it with DDP."""
    if not dist.is_initialized():
        if training.shard:
            raise UserError("shard needs a launcher: torchrun --nproc_per_node 2 recipes/finetune_utilities.py")
        return model
    if training.shard:
        # bfloat16 keeps 8 bits, too few to sum gradients over ranks and micro-batches or to return a loss.
        precision = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
        options = {"mp_policy": precision} if training.bf16 else {}
        for module in model.modules():
            if type(module).__name__ in (model._no_split_modules or ()):
                fully_shard(module, **options)
        return fully_shard(model, **options)
    devices = None if next(model.parameters()).device.type == "cpu" else [LOCAL_RANK]
    return DistributedDataParallel(
        model, device_ids=devices, find_unused_parameters=training.ddp_find_unused_parameters
    )


def autocast(device: torch.device, training: PlainTorchArguments) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=training.bf16 and not training.shard)


# ── Data and evaluation ──────────────────────────────────────────────────────────────────────────────────


def epoch_of(train, collator, training, epoch, num_steps_done=0) -> DataLoader:
    """Load this rank's micro-batches of an epoch after its first steps; the order depends only on the seed."""
    sampler = DistributedSampler(train, NUM_RANKS, RANK, seed=training.seed, drop_last=True)
    sampler.set_epoch(epoch)
    size = training.per_device_train_batch_size
    order = list(sampler)[num_steps_done * training.gradient_accumulation_steps * size :]
    own_random = torch.Generator()  # a loader would draw from the global generator, and a resumed run see other dropout
    pin = torch.accelerator.is_available()
    return DataLoader(train, size, sampler=order, collate_fn=collator, generator=own_random, pin_memory=pin)


@torch.no_grad()
def evaluate(model, held_out, collator, recipe, training, device) -> float:
    """Return the mean loss over all targets of the held-out rows, each row once: Σ n·L / Σ n."""
    size = training.per_device_eval_batch_size
    rows = pad_to_multiple(held_out, NUM_RANKS * size)
    sampler = DistributedSampler(rows, NUM_RANKS, RANK, shuffle=False)
    losses, num_targets = [], torch.zeros((), dtype=torch.int64, device=device)
    model.eval()
    for batch in DataLoader(rows, size, sampler=sampler, collate_fn=collator):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        num_here = count_targets(batch, recipe.task)
        with autocast(device, training):
            loss = model(**batch).loss
        losses.append(torch.where(num_here > 0, loss.float() * num_here, 0))  # a mean over no target is NaN
        num_targets += num_here
    model.train()
    loss, denominator = reduce_loss(losses, num_targets)
    return float(loss / denominator)


# ── Checkpoints ──────────────────────────────────────────────────────────────────────────────────────────


def save_checkpoint(model, optimizer, scheduler, step, log_history, training) -> None:
    folder = Path(training.output_dir) / f"checkpoint-{step}"
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}
    dcp.save(state, checkpoint_id=folder)
    torch.save(random_states(), folder / f"random-{RANK}.pt")
    barrier_and_log(f"saved {folder}")  # trainer_state.json marks the checkpoint complete, so it comes last
    if RANK == 0:
        write_state(folder, step, log_history)
        drop_old_checkpoints(training.output_dir, training.save_total_limit)


def load_checkpoint(folder: Path, model, optimizer, scheduler) -> None:
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if (random := folder / f"random-{RANK}.pt").exists():  # missing if the first run had fewer ranks
        for restore, state in zip((torch.set_rng_state, torch.cuda.set_rng_state), torch.load(random), strict=False):
            restore(state)


def random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


if __name__ == "__main__":
    try:
        main()
    except (UserError, GradUtilsError, KeyboardInterrupt) as error:
        exit_with_error(error)
