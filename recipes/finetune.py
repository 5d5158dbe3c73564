"""Fine-tune a language model so that its gradients do not depend on how the batch is cut up.

    accelerate launch recipes/finetune.py configs/causal_lm.yaml
    accelerate launch --multi_gpu --num_processes 2 recipes/finetune.py configs/causal_lm.yaml --max_steps 50

The YAML file holds fields of ``RecipeArguments`` (arguments.py) and of transformers' ``TrainingArguments``;
flags override it. Without ``model_name_or_path`` a small model is made from a configuration, without
``dataset_name`` it learns the docstrings of the Python standard library on this machine.
"""

import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import transformers
from arguments import RecipeArguments, UserError, parse_arguments
from stdlib_docstrings import load_stdlib_docstrings
from tokenizers import ByteLevelBPETokenizer
from training_report import plot_training, print_report, sample_completions, sample_predictions
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_gradutils import FirstRankPerNode, GradUtilsTrainer
from hf_gradutils.errors import GradUtilsError

MASKED = -100  # a label that is no target

AUTO_MODELS = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
}


def main() -> None:
    recipe, training = parse_arguments(sys.argv[1:])
    set_seed(training.seed)

    # One rank reads, tokenizes and downloads, for all nodes that share the cache; the others then find it all there.
    with FirstRankPerNode(scope="auto"):
        train_texts, held_out_texts = load_texts(recipe)
        tokenizer = load_tokenizer(recipe, train_texts)
        classes = find_classes(recipe, train_texts)
        train = tokenize(train_texts, recipe, tokenizer, classes)
        held_out = tokenize(held_out_texts, recipe, tokenizer, classes)
        model = load_model(recipe, tokenizer, classes)
    for name, texts, rows in (("training", train_texts, train), ("held-out", held_out_texts, held_out)):
        if len(rows) == 0:
            raise UserError(
                f"none of the {len(texts)} {name} examples has a target left: a text is empty, a prompt fills "
                f"max_length ({recipe.max_length}), or no class is known; check the columns, raise max_length"
            )

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

    checkpoint = find_checkpoint(training)
    first_step = TrainerState.load_from_json(Path(checkpoint) / "trainer_state.json").global_step if checkpoint else 0
    train_time_s = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
    evaluation = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()

    # Every rank generates, for a sharded model needs all of them; rank 0 shows what came out.
    sample = sample_predictions if recipe.task == "sequence-classification" else sample_completions
    samples = sample(trainer.model, tokenizer, held_out)
    if trainer.is_world_process_zero():
        plot = plot_training(trainer.state.log_history, training.max_grad_norm, Path(training.output_dir))
        print_report(trainer.state.log_history, evaluation, train_time_s, first_step, samples)
        print(f"Saved the model, its tokenizer, trainer_state.json and {plot} in {training.output_dir}", flush=True)


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────────────


def load_texts(recipe: RecipeArguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load the training and the held-out rows, as they are."""
    if recipe.dataset_name is None:
        train, held_out = load_stdlib_docstrings(recipe.cache_dir)
    else:
        path, options = recipe.dataset_name, {"name": recipe.dataset_config_name, "cache_dir": recipe.cache_dir}
        if Path(path).is_file():
            if not Path(path).stat().st_size:
                raise UserError(f"the data set {path!r} needs rows to train on and rows to hold out, got an empty file")
            path, options["data_files"] = "json", path
        try:
            train = datasets.load_dataset(path, split=recipe.train_split, **options)
            if recipe.eval_split:
                held_out = datasets.load_dataset(path, split=recipe.eval_split, **options)
            else:
                shuffled, num_held_out = train.shuffle(seed=0), -(-len(train) // 20)
                held_out, train = shuffled.take(num_held_out), shuffled.skip(num_held_out)
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            raise UserError(f"cannot load the data set {recipe.dataset_name!r}: {one_line(error)}") from error
    if len(train) == 0 or len(held_out) == 0:
        raise UserError(
            f"the data set {recipe.dataset_name or 'of docstrings'!r} needs rows to train on and rows to hold out, "
            f"got {len(train)} and {len(held_out)}; check the file and its splits"
        )

    wanted = [recipe.messages_column] if recipe.messages_column else [recipe.text_column, recipe.prompt_column]
    wanted += [recipe.label_column] if recipe.task == "sequence-classification" else []
    for column in wanted:
        if column and column not in train.column_names:
            raise UserError(f"the data set has no column {column!r}; it has {', '.join(train.column_names)}")
    return limit(train, recipe.max_examples), limit(held_out, recipe.max_eval_examples)


def limit(rows: datasets.Dataset, num_rows: int | None) -> datasets.Dataset:
    return rows if num_rows is None or num_rows >= len(rows) else rows.shuffle(seed=0).take(num_rows)


def load_tokenizer(recipe: RecipeArguments, train: datasets.Dataset) -> transformers.PreTrainedTokenizerBase:
    """Load the model's tokenizer, or train a byte-level BPE tokenizer on the training texts, once."""
    folder = recipe.model_name_or_path
    if not folder:
        columns = [column for column in (recipe.prompt_column, recipe.text_column) if column]
        key = datasets.fingerprint.Hasher.hash((train._fingerprint, columns, recipe.vocab_size))
        folder = Path(recipe.cache_dir) / "hf_gradutils_tokenizers" / key
    if not recipe.model_name_or_path and not (folder / "tokenizer_config.json").exists():
        bpe = ByteLevelBPETokenizer()
        texts = (row[column] or "" for row in train.select_columns(columns) for column in columns)
        special_tokens = {"pad_token": "<pad>", "eos_token": "<eos>"}
        bpe.train_from_iterator(
            texts, recipe.vocab_size, special_tokens=[*special_tokens.values()], show_progress=False
        )
        PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special_tokens).save_pretrained(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {str(folder)!r}: {one_line(error)}") from error
    if recipe.messages_column and not tokenizer.chat_template:
        raise UserError(f"messages_column needs a chat template, and the tokenizer of {str(folder)!r} has none")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # The first truncation changes the tokenizer, and with it the key under which datasets caches its work.
    tokenizer("warm up", truncation=True, max_length=recipe.max_length)
    return tokenizer


def find_classes(recipe: RecipeArguments, train: datasets.Dataset) -> dict[str, str]:
    """Map the label column's values, written as strings, to the names of the classes, most frequent first."""
    if recipe.task != "sequence-classification":
        return {}
    kind = train.features[recipe.label_column]
    if getattr(kind, "dtype", "").startswith("float"):
        raise UserError(f"label_column must hold strings, integers or classes, got {kind.dtype}")
    counts = Counter(str(label) for label in train[recipe.label_column] if label is not None)
    values = [value for value, _ in counts.most_common(recipe.max_labels)]
    return {value: kind.names[int(value)] if isinstance(kind, datasets.ClassLabel) else value for value in values}


def tokenize(
    rows: datasets.Dataset,
    recipe: RecipeArguments,
    tokenizer: transformers.PreTrainedTokenizerBase,
    classes: dict[str, str],
) -> datasets.Dataset:
    """Turn rows into ``input_ids`` and ``labels``; rows that are left without a target are dropped."""
    if recipe.task == "sequence-classification":
        encode, columns = encode_class, {"text": recipe.text_column, "label": recipe.label_column}
        columns["classes"] = list(classes)
    elif recipe.messages_column:
        encode, columns = encode_chat, {"messages": recipe.messages_column}
    else:
        encode, columns = encode_text, {"text": recipe.text_column, "prompt": recipe.prompt_column}
    if recipe.task == "seq2seq":
        encode = {encode_chat: encode_chat_pair, encode_text: encode_text_pair}[encode]
    options = {"tokenizer": tokenizer, "max_length": recipe.max_length, **columns}
    encoded = rows.map(encode, fn_kwargs=options, remove_columns=rows.column_names)
    return encoded.filter(has_target, input_columns="labels")


def has_target(labels) -> bool:
    return labels != MASKED if isinstance(labels, int) else any(label != MASKED for label in labels)


def encode_text(row, tokenizer, max_length, text, prompt):
    """Causal LM: every token of the text is a target, no token of the prompt is."""
    before = token_ids(tokenizer, row[prompt], max_length) if prompt else []
    after = token_ids(tokenizer, row[text], max_length, add_special_tokens=not prompt)
    after = ended(after, tokenizer, max_length) if row[text] else []
    return causal_example(before + after, [False] * len(before) + [True] * len(after), max_length)


def encode_text_pair(row, tokenizer, max_length, text, prompt):
    """Seq2seq: the encoder reads the prompt, the decoder writes the text."""
    target = tokenizer(text_target=row[text] or "", truncation=True, max_length=max_length).input_ids
    return {
        "input_ids": ended(token_ids(tokenizer, row[prompt], max_length), tokenizer, max_length),
        "labels": ended(target, tokenizer, max_length) if row[text] else [],
    }


def encode_chat(row, tokenizer, max_length, messages):
    """Causal LM on a chat: the assistant's tokens are targets where the template marks them.

    Where it does not (no ``{% generation %}``), only the last assistant turn is.
    """
    chat = until_last_answer(row[messages])
    if not chat:
        return {"input_ids": [], "labels": []}
    if re.search(r"\{%-?\s*generation", tokenizer.get_chat_template()):
        encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        return causal_example(encoded["input_ids"], encoded["assistant_masks"], max_length)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    if not whole.startswith(prompt):  # a template may write a turn differently when it is the last one
        prompt = whole[: next(i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b)]
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    after = tokenizer(whole[len(prompt) :], add_special_tokens=False).input_ids
    return causal_example(before + after, [False] * len(before) + [True] * len(after), max_length)


def encode_chat_pair(row, tokenizer, max_length, messages):
    """Seq2seq on a chat: the last assistant turn is written from everything before it."""
    chat = until_last_answer(row[messages])
    if not chat:
        return {"input_ids": [], "labels": []}
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    pair = {"prompt": prompt, "text": chat[-1]["content"]}
    return encode_text_pair(pair, tokenizer, max_length, text="text", prompt="prompt")


def encode_class(row, tokenizer, max_length, text, label, classes):
    """Classification: a text and the index of its class; MASKED where the class is not kept."""
    known = row[text] and str(row[label]) in classes
    ids = token_ids(tokenizer, row[text], max_length)
    return {"input_ids": ids, "labels": classes.index(str(row[label])) if known else MASKED}


def token_ids(tokenizer, text, max_length, **options):
    return tokenizer(text or "", truncation=True, max_length=max_length, **options).input_ids


def ended(ids, tokenizer, max_length):
    """End a text with the end token, unless the tokenizer did so or the text was cut."""
    return ids if ids[-1:] == [tokenizer.eos_token_id] or len(ids) >= max_length else [*ids, tokenizer.eos_token_id]


def causal_example(ids, is_target, max_length):
    """Mask and cut; the first token has nothing before it to be predicted from, so it is no target."""
    is_target = [False, *is_target[1:]]
    labels = [token if target else MASKED for token, target in zip(ids, is_target, strict=True)]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def until_last_answer(messages):
    """Drop what follows the last assistant turn, and the keys that datasets filled up with None."""
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages or []]
    while chat and chat[-1]["role"] != "assistant":
        chat.pop()
    return chat


# ── Model and training ───────────────────────────────────────────────────────────────────────────────────


def load_model(
    recipe: RecipeArguments, tokenizer: transformers.PreTrainedTokenizerBase, classes: dict[str, str]
) -> transformers.PreTrainedModel:
    """Load the named model, or make a small one: T5 for seq2seq, else Llama."""
    auto = AUTO_MODELS[recipe.task]
    names = dict(enumerate(classes.values()))
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}} if classes else {}
    if recipe.model_name_or_path:
        try:
            model = auto.from_pretrained(recipe.model_name_or_path, dtype=recipe.dtype, **labels)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load {recipe.model_name_or_path!r}: {one_line(error)}") from error
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return model
    size = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "num_attention_heads": recipe.num_heads,
        "num_hidden_layers": recipe.num_layers,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if recipe.task == "seq2seq":
        size |= {"d_kv": recipe.hidden_size // recipe.num_heads, "d_ff": 2 * recipe.hidden_size, "dropout_rate": 0.0}
        # Named as T5 names it: under transformers' common name the decoder would keep its default of 6 layers.
        size |= {"num_layers": size.pop("num_hidden_layers"), "num_decoder_layers": recipe.num_layers}
        size |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": tokenizer.pad_token_id}
        return auto.from_config(AutoConfig.for_model("t5", **size))
    size |= {"intermediate_size": 3 * recipe.hidden_size, "max_position_embeddings": recipe.max_length}
    size |= {"tie_word_embeddings": True, "bos_token_id": None, "use_cache": False}
    return auto.from_config(AutoConfig.for_model("llama", **size, **labels))


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def most_likely_class(logits, labels):
    return logits.argmax(dim=-1)


def find_checkpoint(training: transformers.TrainingArguments) -> str | None:
    """Resolve ``--resume_from_checkpoint``: a folder, or "last" for the newest one in output_dir."""
    wanted = training.resume_from_checkpoint
    if wanted in (None, "false", "False"):
        return None
    last = wanted in ("last", "true", "True")
    folder = (os.path.isdir(training.output_dir) and get_last_checkpoint(training.output_dir)) if last else wanted
    if not folder or not os.path.isfile(os.path.join(folder, "trainer_state.json")):
        raise UserError(f"no checkpoint to resume from in {training.output_dir if last else wanted!r}")
    return folder


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def exit_with_error(error: Exception) -> None:
    """Show what the user can put right in one line per rank; the launcher repeats it as its root cause."""
    message = f"rank {os.environ.get('RANK', 0)}: error: {one_line(error)}"
    print(message, file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        cause = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": cause}))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        time.sleep(5)  # once one rank is gone the launcher ends the others: let them all say their line
    sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except (UserError, GradUtilsError) as error:
        exit_with_error(error)
