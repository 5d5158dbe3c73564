"""Proof that the gradient of the same samples depends neither on the accumulation nor on the ranks.

    accelerate launch --multi_gpu --num_processes 2 recipes/accumulation_proof.py outputs/demo

Computes the gradient g of one optimizer step on 8 docstrings per rank, at accumulation 1, 4 and 8, with
``GradUtilsTrainer`` and ``transformers.Trainer``, and prints the relative error ‖g − h‖ / ‖h‖ over all parameters; h is
the gradient of all samples in one batch, computed without any Trainer. The models are the one in the given folder, a
small T5 and a small classifier; like most heads of transformers, the last two ignore the count of targets that the
Trainer passes. Writes accumulation.json and, if matplotlib is there, accumulation.png into the folder.
"""

import copy
import json
import logging
import sys
from pathlib import Path

import datasets
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from _shared.accumulation_picture import TOLERANCE, draw_accumulation
from _shared.stdlib_docstrings import load_stdlib_docstrings
from hf_gradutils import FirstRankPerNode, GradUtilsTrainer

SAMPLES_PER_RANK = 8
ACCUMULATIONS = (1, 4, 8)
MAX_LENGTH = 96


class GradientTap(TrainerCallback):
    """Copies the gradient just before the optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Store the gradients of all parameters as one vector."""
        self.gradient = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def gradient(trainer_class, model, rows, collator, accumulation):
    """The gradient of one optimizer step over all rows and ranks."""
    tap = GradientTap()
    arguments = TrainingArguments(
        output_dir=folder,  # nothing is saved
        per_device_train_batch_size=SAMPLES_PER_RANK // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,  # no clipping: it would hide a wrong scale
        learning_rate=0.0,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model=copy.deepcopy(model), args=arguments, train_dataset=rows, data_collator=collator, callbacks=[tap]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return tap.gradient


def whole_batch_gradient(model, rows, collator):
    """The gradient of one batch of all rows, in float64."""
    device = TrainingArguments(output_dir=folder, use_cpu=not torch.accelerator.is_available()).device
    model = copy.deepcopy(model).double().train().to(device)
    model(**collator(rows).to(device)).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def errors(model, rows, collator):
    """Relative errors, one per accumulation, of the stock Trainer and of ours."""
    whole = whole_batch_gradient(model, rows, collator)
    found = {}
    for name, trainer_class in (("transformers.Trainer", Trainer), ("GradUtilsTrainer", GradUtilsTrainer)):
        gradients = [gradient(trainer_class, model, rows, collator, accumulation) for accumulation in ACCUMULATIONS]
        found[name] = [float(f"{(g - whole).norm() / whole.norm():.3g}") for g in gradients]
    return found


set_seed(0)
logging.getLogger("accelerate").setLevel(logging.ERROR)
folder = sys.argv[1]
world_size = TrainingArguments(output_dir=folder, use_cpu=not torch.accelerator.is_available()).world_size

with FirstRankPerNode():
    train, _ = load_stdlib_docstrings(str(datasets.config.HF_DATASETS_CACHE))
tokenizer = AutoTokenizer.from_pretrained(folder)
docstrings = [row for row in train.shuffle(seed=1).take(2000) if row["package"]][: SAMPLES_PER_RANK * world_size]
packages = sorted({row["package"] for row in docstrings})

causal_rows, seq2seq_rows, class_rows = [], [], []
for row in docstrings:
    prompt, text = tokenizer(row["prompt"]).input_ids, tokenizer(row["docstring"]).input_ids
    prompt, text = prompt[: MAX_LENGTH // 2], text[: MAX_LENGTH // 2]
    causal_rows.append({"input_ids": prompt + text, "labels": [-100] * len(prompt) + text})
    seq2seq_rows.append({"input_ids": prompt, "labels": text})
    class_rows.append({"input_ids": text, "labels": packages.index(row["package"])})

causal = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
small = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
t5_size = {"d_model": 96, "d_kv": 16, "d_ff": 192, "num_heads": 6, "num_layers": 2, "dropout_rate": 0.0}
seq2seq = AutoModelForSeq2SeqLM.from_config(
    AutoConfig.for_model("t5", **small, **t5_size, decoder_start_token_id=tokenizer.pad_token_id)
)
bert_size = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 192}
bert_size |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
classifier = AutoModelForSequenceClassification.from_config(
    AutoConfig.for_model("bert", **small, **bert_size, num_labels=len(packages))
)
pad, pad_pairs = DataCollatorWithPadding(tokenizer), DataCollatorForSeq2Seq(tokenizer)
cases = [
    ("causal LM (Llama)", causal, causal_rows, pad_pairs),
    ("seq2seq (T5)", seq2seq, seq2seq_rows, pad_pairs),
    ("classification (BERT)", classifier, class_rows, pad),
]
results = {name: errors(model, rows, collator) for name, model, rows, collator in cases}
if torch.distributed.is_initialized():
    is_rank_0 = torch.distributed.get_rank() == 0
    torch.distributed.destroy_process_group()
else:
    is_rank_0 = True
if is_rank_0:
    data = {"ranks": world_size, "samples": len(docstrings), "accumulation": ACCUMULATIONS, "errors": results}
    (Path(folder) / "accumulation.json").write_text(json.dumps(data, indent=1) + "\n")
    print(
        f"Proof: {len(docstrings)} samples on {world_size} rank(s); relative error of the gradient beside that of one "
        "batch on one device"
    )
    print(f"  {'accumulation':<46}" + "".join(f"{accumulation:>9}" for accumulation in ACCUMULATIONS))
    for head, of_trainers in results.items():
        for trainer, numbers in of_trainers.items():
            wrong = "   <- wrong" if max(numbers) > TOLERANCE else ""
            print(f"  {head:<24}{trainer:<22}" + "".join(f"{number:>9.1e}" for number in numbers) + wrong)
    print("  (rounding in float32 is about 1e-7; 7.0 means that the gradient is eight times too large)")
    picture = draw_accumulation(Path(folder) / "accumulation.json", Path(folder) / "accumulation.png")
    names = ["accumulation.json", *([picture.name] if picture else [])]
    print(f"  written to {folder}: {', '.join(names)}", flush=True)
    if any(max(of_trainers["GradUtilsTrainer"]) > TOLERANCE for of_trainers in results.values()):
        sys.exit("error: the gradient of GradUtilsTrainer depends on the accumulation or on the ranks")
