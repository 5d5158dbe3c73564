"""Fine-tune on chats with trl and exact gradients: the mixin in front of trl's ``SFTTrainer``.

    accelerate launch recipes/finetune_trl.py configs/chat.yaml
    accelerate launch --multi_gpu --num_processes 2 recipes/finetune_trl.py configs/chat.yaml --max_steps 50

The YAML file sets fields of ``ChatArguments`` (_shared/arguments.py) and of trl's ``SFTConfig``; flags override it.
The default for ``model_name_or_path`` is a small new model, and the default for ``dataset_name`` is questions about
functions of the Python standard library.
"""

import sys

import torch
from transformers import set_seed

from _shared.arguments import ChatArguments, parse_arguments
from _shared.chats import count_chats, prepare_chats
from _shared.checkpoints import find_checkpoint, read_state
from _shared.data import load_chats, load_tokenizer
from _shared.deepspeed import loads_on_all_ranks
from _shared.errors import UserError, exit_with_error, plain_errors
from _shared.models import load_model, split_over_ranks
from _shared.overview import PaceCallback, print_overview
from _shared.training_report import evenly_spaced, exit_with_check, max_new_tokens, report_run
from hf_gradutils import FirstRankPerNode, GradUtilsTrainerMixin, check_invariance, route_first_rank
from hf_gradutils.errors import GradUtilsError

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    exit_with_error(UserError(f"this recipe needs trl: pip install 'hf-gradutils[trl]' ({error})"))


class ExactSFTTrainer(GradUtilsTrainerMixin, SFTTrainer):
    """trl's own data preparation, loss and metrics; our gradients."""


def main() -> None:
    recipe, training = parse_arguments(sys.argv[1:], ChatArguments, SFTConfig)
    set_seed(training.seed)

    # One rank downloads for every node that shares the cache; the other ranks then load from the cache.
    with plain_errors(), FirstRankPerNode(scope="auto", cache_dir=recipe.cache_dir):
        train_texts, held_out_texts = load_chats(recipe)
        tokenizer = load_tokenizer(recipe, train_texts)
        train, dropped = prepare_chats(train_texts, recipe.messages_column, tokenizer)
        held_out, held_out_dropped = prepare_chats(held_out_texts, recipe.messages_column, tokenizer)
        model = None if loads_on_all_ranks() else load_model(recipe, tokenizer, max_length=training.max_length)
    model = model or load_model(recipe, tokenizer, max_length=training.max_length)
    model = split_over_ranks(model, training)

    with plain_errors(), route_first_rank():  # trl tokenizes the chats here, on the first rank of each node first
        trainer = ExactSFTTrainer(
            model=model,
            args=training,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[PaceCallback()],
        )
    if not (len(trainer.train_dataset) and len(trainer.eval_dataset)):
        raise UserError(f"no chat has an answer left after {training.max_length} tokens; raise max_length")
    if trainer.is_world_process_zero():
        counts = (
            count_chats(train_texts, train, dropped, trainer.train_dataset, training.max_length),
            count_chats(held_out_texts, held_out, held_out_dropped, trainer.eval_dataset, training.max_length),
        )
        print_overview(trainer.train_dataset, counts, tokenizer)
        print(
            f"{len(trainer.train_dataset)} training and {len(trainer.eval_dataset)} held-out examples, "
            f"{training.world_size} × {training.device.type}, {training.per_device_train_batch_size} examples × "
            f"{training.gradient_accumulation_steps} accumulated on each",
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

    answers = sample_answers(trainer.model, tokenizer, held_out)
    if trainer.is_world_process_zero():
        report_run(training, trainer.state.log_history, evaluation, train_time_s, first_step, answers)


@torch.no_grad()
def sample_answers(model, tokenizer, chats) -> list[tuple[str, str, str]]:
    """Answer held-out questions; every rank must call it, because generating with a sharded model needs all of them."""
    model.eval()
    answers = []
    for row in evenly_spaced(chats):
        *question, answer = row["messages"]
        if not question:
            continue
        inputs = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        num_new = max_new_tokens(model, inputs["input_ids"].shape[1])
        if num_new < 1:
            continue
        output = model.generate(**inputs, max_new_tokens=num_new, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append((question[-1]["content"], text, answer["content"]))
    return answers


if __name__ == "__main__":
    try:
        main()
    except (UserError, GradUtilsError, KeyboardInterrupt) as error:
        exit_with_error(error)
