"""Fine-tune with accelerate's own loop and exact gradients: GradUtilsAccelerator instead of Accelerator.

    accelerate launch recipes/finetune_no_trainer.py configs/causal_lm.yaml
    accelerate launch --multi_gpu --num_processes 2 recipes/finetune_no_trainer.py configs/causal_lm.yaml

The YAML file sets fields of ``RecipeArguments`` and ``LoopArguments`` (_shared/arguments.py); flags override it. The
launcher's configuration chooses the layout and the precision.
"""

import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DataLoaderConfiguration, DeepSpeedPlugin, DistributedDataParallelKwargs
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_scheduler, set_seed
from transformers.trainer_pt_utils import get_model_param_count

from _shared.arguments import LoopArguments, RecipeArguments, parse_arguments
from _shared.checkpoints import drop_old_checkpoints, find_checkpoint, read_state, write_state
from _shared.classes import find_classes
from _shared.data import load_texts, load_tokenizer
from _shared.deepspeed import counted_first, match_deepspeed, uses_deepspeed
from _shared.errors import UserError, exit_with_error, plain_errors
from _shared.models import load_model, split_over_ranks
from _shared.overview import Pace, print_overview
from _shared.tokenization import count_targets, make_collator, pad_to_multiple, tokenize
from _shared.training_report import exit_with_check, report_run, sample_outputs
from hf_gradutils import FirstRankPerNode, GradUtilsAccelerator, GradUtilsPlugin, check_loop_invariance
from hf_gradutils.errors import GradUtilsError


def main() -> None:
    recipe, training = parse_arguments(sys.argv[1:], RecipeArguments, LoopArguments)
    deepspeed = match_deepspeed(DeepSpeedPlugin(), training) if uses_deepspeed() else None
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
    model = split_over_ranks(model, training)

    is_cpu = not torch.accelerator.is_available()
    if deepspeed:  # which cpu=True would leave out, without a word
        PartialState(cpu=is_cpu)
    accelerator = GradUtilsAccelerator(
        cpu=is_cpu and not deepspeed,
        deepspeed_plugin=deepspeed,
        gradient_accumulation_plugin=GradUtilsPlugin(num_steps=training.gradient_accumulation_steps),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=training.seed),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=training.ddp_find_unused_parameters)],
        log_with=None if training.report_to == "none" else training.report_to,
        project_dir=training.output_dir,
    )
    if accelerator.parallelism_config and accelerator.parallelism_config.cp_enabled:
        raise UserError("this loop does not split batches for context parallelism; use recipes/finetune.py")
    collator = make_collator(recipe, tokenizer, model)
    size = training.per_device_train_batch_size
    own_random = torch.Generator()  # a loader would draw from the global generator, and a resumed run see other dropout
    loader = DataLoader(train, size, shuffle=True, drop_last=True, collate_fn=collator, generator=own_random)
    loader = accelerator.prepare(loader)
    if len(loader) == 0:
        raise UserError(f"{len(train)} training examples are too few for {accelerator.num_processes} × {size}")
    steps_per_epoch = math.ceil(len(loader) / training.gradient_accumulation_steps)  # the last window may be short
    num_steps = training.max_steps if training.max_steps > 0 else training.num_train_epochs * steps_per_epoch

    size = training.per_device_eval_batch_size
    held_out_rows = pad_to_multiple(held_out, size * accelerator.num_processes)
    eval_loader = accelerator.prepare(DataLoader(held_out_rows, size, collate_fn=collator))
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    # accelerate steps a scheduler once for each rank
    times = accelerator.num_processes
    scheduler = get_scheduler(training.lr_scheduler_type, optimizer, training.warmup_steps * times, num_steps * times)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    if training.report_to != "none":
        settings = {name: value for name, value in (vars(recipe) | vars(training)).items() if value is not None}
        accelerator.init_trackers("finetune_no_trainer", config=settings)
    accelerator.print(
        f"{recipe.task}: {get_model_param_count(model) / 1e6:.1f}M parameters, "
        f"{len(train)} training and {len(held_out)} held-out examples, {accelerator.num_processes} × "
        f"{accelerator.device.type}, {training.per_device_train_batch_size} examples × "
        f"{training.gradient_accumulation_steps} accumulated on each",
        flush=True,
    )

    if recipe.check_invariance:

        def loss_and_targets(model, batch):
            return model(**batch).loss, count_targets(batch, recipe.task)

        report = check_loop_invariance(accelerator, model, train, collator, loss_and_targets)
        exit_with_check(report, is_first=accelerator.is_main_process)

    step, log_history = 0, []
    if checkpoint := find_checkpoint(training.output_dir, training.resume_from_checkpoint):
        accelerator.load_state(str(checkpoint))
        step, log_history = read_state(checkpoint)
    first_step, start_s = step, time.monotonic()
    progress = tqdm(total=num_steps, initial=step, disable=not accelerator.is_main_process)
    pace = Pace(num_steps, step, write=progress.write if accelerator.is_main_process else None)

    def log(**entry: float) -> None:
        log_history.append({"step": step, "epoch": step / steps_per_epoch, **entry})
        accelerator.log(entry, step=step)
        if accelerator.is_main_process:
            progress.write(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in entry.items()))

    model.train()
    reports = []
    while step < num_steps:
        epoch, num_done = divmod(step, steps_per_epoch)
        loader.set_epoch(epoch)
        rest = accelerator.skip_first_batches(loader, num_done * training.gradient_accumulation_steps)
        if deepspeed:  # it averages in the backward, and has to know the targets of a window by then
            count = partial(count_targets, task=recipe.task)
            rest = counted_first(accelerator, rest, training.gradient_accumulation_steps, count)
        for batch in rest:
            learning_rate = scheduler.get_last_lr()[0]
            with accelerator.accumulate(model):
                loss = model(**batch).loss  # the micro-batch's own mean
                accelerator.backward(loss, num_targets=count_targets(batch, recipe.task))
                if accelerator.sync_gradients and training.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            progress.update()
            pace.after_step(step)
            reports.append(accelerator.report)

            if training.is_due("log", step):  # the only host sync
                num_targets = sum(float(report.num_targets) for report in reports)
                loss = sum(float(report.loss) * float(report.num_targets) for report in reports) / num_targets
                grad_norm = float(reports[-1].grad_norm)
                log(loss=loss, grad_norm=grad_norm, learning_rate=learning_rate, num_targets=int(num_targets))
                reports = []
            if training.is_due("evaluate", step):
                log(eval_loss=evaluate(accelerator, model, eval_loader, recipe))
            if training.is_due("save", step):
                save_checkpoint(accelerator, step, log_history, training)
            if step == num_steps:
                break
    progress.close()
    train_time_s = time.monotonic() - start_s

    evaluation = {"eval_loss": evaluate(accelerator, model, eval_loader, recipe)}
    log(**evaluation)
    output = Path(training.output_dir)
    weights = accelerator.get_state_dict(model)
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(output, state_dict=weights, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(output)
        write_state(output, step, log_history)
    samples = sample_outputs(unwrapped, tokenizer, held_out, recipe.task)  # on all ranks, as sharded models need
    if accelerator.is_main_process:
        report_run(training, log_history, evaluation, train_time_s, first_step, samples)
    accelerator.end_training()


@torch.no_grad()
def evaluate(accelerator, model, eval_loader, recipe) -> float:
    """Return the mean loss over all targets of the held-out rows, each row once: Σ n·L / Σ n."""
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    model.eval()
    for batch in eval_loader:
        num_targets = count_targets(batch, recipe.task)
        loss = model(**batch).loss
        loss = torch.where(num_targets > 0, loss.double() * num_targets, 0)  # a mean over no target is NaN
        sums += torch.stack((loss, num_targets.double()))
    model.train()
    loss, num_targets = accelerator.reduce(sums).tolist()
    return loss / num_targets


def save_checkpoint(accelerator, step, log_history, training) -> None:
    folder = Path(training.output_dir) / f"checkpoint-{step}"
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()  # trainer_state.json marks the checkpoint complete, so it comes last
    if accelerator.is_main_process:
        write_state(folder, step, log_history)
        drop_old_checkpoints(training.output_dir, training.save_total_limit)


if __name__ == "__main__":
    try:
        main()
    except (UserError, GradUtilsError, KeyboardInterrupt) as error:
        exit_with_error(error)
