"""Fine-tune a language model with gradients that do not depend on how the batch is split.

    accelerate launch recipes/finetune.py configs/causal_lm.yaml
    accelerate launch --multi_gpu --num_processes 2 recipes/finetune.py configs/causal_lm.yaml --max_steps 50
    accelerate launch recipes/finetune.py --model Qwen/Qwen3-0.6B --dataset_name my.csv --text_column body

The YAML file, which may be left out, sets fields of ``RecipeArguments`` (_shared/arguments.py) and of transformers'
``TrainingArguments``; flags override it. The default for ``model_name_or_path`` is a small new model, and the default
for ``dataset_name`` is the docstrings of the Python standard library on this machine.
"""

import sys
from functools import partial

import transformers
from transformers import TrainingArguments, set_seed
from transformers.trainer_pt_utils import get_model_param_count

from _shared.arguments import RecipeArguments, parse_arguments
from _shared.checkpoints import find_checkpoint, read_state
from _shared.classes import find_classes
from _shared.data import load_texts, load_tokenizer
from _shared.deepspeed import loads_on_all_ranks
from _shared.errors import UserError, exit_with_error, plain_errors
from _shared.models import load_model, split_over_ranks
from _shared.overview import PaceCallback, print_overview
from _shared.tokenization import make_collator, tokenize
from _shared.training_report import exit_with_check, report_run, sample_outputs
from hf_gradutils import FirstRankPerNode, GradUtilsTrainer, check_invariance
from hf_gradutils.errors import GradUtilsError


def main() -> None:
    recipe, training = parse_arguments(sys.argv[1:], RecipeArguments, TrainingArguments)
    set_seed(training.seed)

    # One rank downloads and tokenizes for every node that shares the cache; the other ranks then load from the cache.
    with plain_errors(), FirstRankPerNode(scope="auto", cache_dir=recipe.cache_dir):
        train_texts, held_out_texts = load_texts(recipe)
        tokenizer = load_tokenizer(recipe, train_texts)
        classes = find_classes(recipe, train_texts)
        train, train_counts = tokenize(train_texts, recipe, tokenizer, classes)
        held_out, held_out_counts = tokenize(held_out_texts, recipe, tokenizer, classes)
        load = partial(load_model, recipe, tokenizer, max_length=recipe.max_length, task=recipe.task, classes=classes)
        model = None if loads_on_all_ranks() else load()
    print_overview(train, (train_counts, held_out_counts), tokenizer, task=recipe.task, classes=classes)
    model = split_over_ranks(model or load(), training)

    metrics = {}
    if recipe.task == "sequence-classification":
        metrics = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": most_likely_class}
    trainer = GradUtilsTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=make_collator(recipe, tokenizer, model),
        processing_class=tokenizer,
        callbacks=[PaceCallback()],
        **metrics,
    )
    if trainer.is_world_process_zero():
        num_parameters = get_model_param_count(model)  # whole ones, also of ZeRO 3's shards
        print(
            f"{recipe.task}: {num_parameters / 1e6:.1f}M parameters, {len(train)} training and {len(held_out)} "
            f"held-out examples, {training.world_size} × {training.device.type}, "
            f"{training.per_device_train_batch_size} examples × {training.gradient_accumulation_steps} "
            "accumulated on each",
            flush=True,
        )

    if recipe.check_invariance:
        exit_with_check(check_invariance(trainer), is_first=trainer.is_world_process_zero())
    checkpoint = find_checkpoint(training.output_dir, training.resume_from_checkpoint)
    first_step, _ = read_state(checkpoint) if checkpoint else (0, [])
    train_time_s = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics["train_runtime"]
    evaluation = trainer.evaluate()
    if trainer.is_fsdp_enabled:  # checkpoints may stay sharded; the final model is one file
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.save_state()

    samples = sample_outputs(trainer.model, tokenizer, held_out, recipe.task)  # on all ranks, as sharded models need
    if trainer.is_world_process_zero():
        report_run(training, trainer.state.log_history, evaluation, train_time_s, first_step, samples)


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def most_likely_class(logits, labels):
    logits = logits[0] if isinstance(logits, tuple) else logits  # T5 and BART also return their encoder's states
    return logits.argmax(dim=-1)


if __name__ == "__main__":
    try:
        main()
    except (UserError, GradUtilsError, KeyboardInterrupt) as error:
        exit_with_error(error)
