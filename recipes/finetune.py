"""Fine-tune a language model so that its gradients do not depend on how the batch is cut up.

    accelerate launch recipes/finetune.py configs/causal_lm.yaml
    accelerate launch --multi_gpu --num_processes 2 recipes/finetune.py configs/causal_lm.yaml --max_steps 50

The YAML file holds fields of ``RecipeArguments`` (arguments.py) and of transformers' ``TrainingArguments``;
flags override it. Without ``model_name_or_path`` a small model is made from a configuration, without
``dataset_name`` it learns the docstrings of the Python standard library on this machine.
"""

import sys
from pathlib import Path

import transformers
from arguments import RecipeArguments, parse_arguments
from checkpoints import find_checkpoint, read_state
from data import load_texts, load_tokenizer
from errors import UserError, exit_with_error
from models import load_model, split_over_ranks
from tokenization import MASKED, check_targets, find_classes, tokenize
from training_report import exit_with_check, plot_training, print_report, sample_completions, sample_predictions
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, TrainingArguments, set_seed

from hf_gradutils import FirstRankPerNode, GradUtilsTrainer, check_invariance
from hf_gradutils.errors import GradUtilsError


def main() -> None:
    recipe, training = parse_arguments(sys.argv[1:], RecipeArguments, TrainingArguments)
    set_seed(training.seed)

    # One rank reads, tokenizes and downloads, for all nodes that share the cache; the others then find it all there.
    with FirstRankPerNode(scope="auto"):
        train_texts, held_out_texts = load_texts(recipe)
        tokenizer = load_tokenizer(recipe, train_texts)
        classes = find_classes(recipe, train_texts)
        train = tokenize(train_texts, recipe, tokenizer, classes)
        held_out = tokenize(held_out_texts, recipe, tokenizer, classes)
        model = load_model(recipe, tokenizer, max_length=recipe.max_length, task=recipe.task, classes=classes)
    check_targets(recipe, training=(train_texts, train), held_out=(held_out_texts, held_out))
    model = split_over_ranks(model, training)

    if recipe.task == "sequence-classification":
        collator = DataCollatorWithPadding(tokenizer)
        metrics = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": most_likely_class}
    else:
        collator = DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=MASKED)
        metrics = {}
    trainer = GradUtilsTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=tokenizer,
        **metrics,
    )
    if trainer.is_world_process_zero():
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
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
    if trainer.is_fsdp_enabled:  # checkpoints may be sharded; the model is saved in one piece
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.save_state()

    # Every rank generates, for a sharded model needs all of them; rank 0 shows what came out.
    sample = sample_predictions if recipe.task == "sequence-classification" else sample_completions
    samples = sample(trainer.model, tokenizer, held_out)
    if trainer.is_world_process_zero():
        plot = plot_training(trainer.state.log_history, training.max_grad_norm, Path(training.output_dir))
        print_report(trainer.state.log_history, evaluation, train_time_s, first_step, samples)
        print(f"Saved the model, its tokenizer, trainer_state.json and {plot} in {training.output_dir}", flush=True)


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def most_likely_class(logits, labels):
    return logits.argmax(dim=-1)


if __name__ == "__main__":
    try:
        main()
    except (UserError, GradUtilsError) as error:
        exit_with_error(error)
