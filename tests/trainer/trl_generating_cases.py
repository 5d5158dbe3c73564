"""Trainings of trl's generating trainers with their completions kept, and the float64 truth about these."""

import copy
import tempfile

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

from hf_gradutils.trainer import GradUtilsTrainerMixin
from tests.harness.trainer_cases import ONE_STEP, GradientTap, reset_accelerate
from tests.trainer.trl_cases import WORDS, make_data, make_llama, make_tokenizer, trl

NUM_GENERATIONS = 4
LONGEST = 8


class Kept:
    """Keeps what is trained: each micro-batch as it was prepared."""

    def _prepare_inputs(self, inputs):
        prepared = super()._prepare_inputs(inputs)
        if self.model.training:
            vars(self).setdefault("kept", []).append(copy.copy(prepared))
        return prepared


class StockGRPO(Kept, trl.GRPOTrainer):
    pass


class StockRLOO(Kept, trl.RLOOTrainer):
    pass


class StockGKD(Kept, GKDTrainer):
    pass


class ExactGRPO(GradUtilsTrainerMixin, StockGRPO):
    pass


class ExactRLOO(GradUtilsTrainerMixin, StockRLOO):
    pass


class ExactGKD(GradUtilsTrainerMixin, StockGKD):
    pass


def reward(completions, **kwargs):
    """Different words, and a bonus for some."""
    return [
        len(set(text.split())) + text.split().count(WORDS[7]) - 0.3 * text.split().count(WORDS[9])
        for text in completions
    ]


class Weights(TrainerCallback):
    """Keeps the weights with which each step begins."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.detach().double().clone() for name, p in model.named_parameters()})


def make_generating(trainer_class, batch_size, accumulation, *, arguments=None, data=None, **kwargs):
    """A trainer that generates for 8 prompts; without steps of its own it stays at the first weights."""
    reset_accelerate()
    options = ONE_STEP | {
        "bf16": False,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
    }
    if issubclass(trainer_class, GKDTrainer):
        options |= {"max_new_tokens": LONGEST, "max_length": 64}
        config = GKDConfig
        rows = [{"messages": row["prompt"] + row["chosen"]} for row in make_data()]
        kwargs.setdefault("teacher_model", make_llama(12))
    else:
        options |= {"num_generations": NUM_GENERATIONS, "max_completion_length": LONGEST}
        config = trl.GRPOConfig if issubclass(trainer_class, trl.GRPOTrainer) else trl.RLOOConfig
        rows = [{"prompt": " ".join(WORDS[4 + (i + k) % 12] for k in range(1 + i % 3))} for i in range(8)]
        kwargs.setdefault("reward_funcs", reward)
    with tempfile.TemporaryDirectory() as folder:
        model = make_llama()
        if not issubclass(trainer_class, GKDTrainer):
            make_llama(12).save_pretrained(folder)  # from where trl loads the reference
            model.config._name_or_path = folder
        return trainer_class(
            args=config(**options | (arguments or {})),
            train_dataset=Dataset.from_list(rows) if data is None else data,
            processing_class=make_tokenizer(),
            **{"model": model} | kwargs,
        )


def train_generating(trainer_class, *args, **kwargs):
    tap, weights = GradientTap(), Weights()
    trainer = make_generating(trainer_class, *args, callbacks=[tap, weights], **kwargs)
    trainer.train()
    return trainer, tap, weights


def rows_of(micro_batches):
    """The rows of this rank's micro-batches, one dict each, without padding; of all ranks where there are several."""
    rows = []
    for batch in micro_batches:
        for i, mask in enumerate(batch["completion_mask"].bool()):
            row = {"prompt": batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]}
            row |= {
                "mask": mask.double(),
                "completion": batch["completion_ids"][i],
                "advantage": batch["advantages"][i],
            }
            row |= {
                name: batch[name][i]
                for name in ("old_per_token_logps", "ref_per_token_logps", "old_logps")
                if name in batch
            }
            rows.append(row)
    return _of_all_ranks(rows)


def _of_all_ranks(rows):
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def truth(loss_type, rows, weights, *, beta=0.0, entropy_coef=0.0, sequence=False, divisor=None):
    """Gradient and loss of all rows at once, in float64 and without trl."""
    model = make_llama().double()
    model.load_state_dict(weights, strict=False)
    sums, means, tokens, entropies = [], [], 0.0, 0.0
    for row in rows:
        mask, advantage = row["mask"], row["advantage"].double()
        ids = torch.cat([row["prompt"], row["completion"]])[None]
        attention = torch.cat([torch.ones(len(row["prompt"])), mask])[None].long()
        logits = model(ids, attention_mask=attention).logits[0, len(row["prompt"]) - 1 : -1]
        every = torch.log_softmax(logits, -1)
        log_p = every.gather(-1, row["completion"][:, None])[:, 0]
        if loss_type == "rloo":
            ratio = ((log_p * mask).sum() - row["old_logps"].double()).exp()
            means.append(-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
            continue
        old = row["old_per_token_logps"].double() if "old_per_token_logps" in row else log_p.detach()
        ratio = (log_p - old).exp()
        if sequence:
            ratio = (((log_p - old) * mask).sum() / mask.sum()).exp().expand(len(mask))
        if loss_type == "cispo":
            loss = -ratio.clamp(max=0.2).detach() * advantage * log_p
        elif loss_type == "sapo":
            temperature = 1.0 if advantage > 0 else 1.05
            loss = -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage
        else:
            loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        if beta:
            difference = row["ref_per_token_logps"].double() - log_p
            loss = loss + beta * ratio * (difference.exp() - difference - 1)
        loss = (loss * mask).sum()
        sums.append(loss)
        means.append(loss / mask.sum().clamp(min=1))
        tokens = tokens + mask.sum()
        entropies = entropies - ((every.exp() * every).sum(-1) * mask).sum()
    if loss_type in ("grpo", "sapo", "rloo"):
        loss = torch.stack(means).mean()
    elif loss_type == "luspo":
        loss = torch.stack(sums).mean()
    elif loss_type == "dr_grpo":
        loss = torch.stack(sums).mean() / LONGEST
    else:
        loss = torch.stack(sums).sum() / (tokens if divisor is None else divisor)
    if entropy_coef:
        loss = loss - entropy_coef * entropies / tokens
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


def distilled(micro_batches):
    """Gradient and loss of a distillation on all rows of these micro-batches, in float64 and without trl."""
    student, teacher = make_llama().double(), make_llama(12).double()
    rows = []
    for batch in micro_batches:
        rows += [
            {k: batch[k][i] for k in ("input_ids", "attention_mask", "labels")} for i in range(len(batch["labels"]))
        ]
    total, num_tokens = 0.0, 0
    for row in _of_all_ranks(rows):
        inputs = {"input_ids": row["input_ids"][None], "attention_mask": row["attention_mask"][None]}
        is_target = row["labels"][1:] != -100
        p = torch.log_softmax(student(**inputs).logits[0, :-1][is_target], -1)
        with torch.no_grad():
            q = torch.log_softmax(teacher(**inputs).logits[0, :-1][is_target], -1)
        middle = ((p.exp() + q.exp()) / 2).log()
        total = total + (q.exp() * (q - middle) + p.exp() * (p - middle)).sum() / 2
        num_tokens += is_target.sum()
    loss = total / num_tokens
    loss.backward()
    return {name: p.grad for name, p in student.named_parameters()}, loss.item()
