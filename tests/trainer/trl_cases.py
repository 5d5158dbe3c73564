"""Models, conversations and trainings of one optimizer step for the tests of trl's trainers, and the float64 truth."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_gradutils.trainer import GradUtilsTrainerMixin
from tests.harness.trainer_cases import ONE_STEP, GradientTap, reset_accelerate

trl = pytest.importorskip("trl")

MARKS = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",  # trl 1.16 under transformers 5.23
        "ignore:`label_smoothing_factor` is deprecated:FutureWarning",
    ),
]
BETA = 0.1
WORDS = ["<pad>", "<eos>", "<user>", "<assistant>", *(f"w{i}" for i in range(4, 16))]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


class ExactSFT(GradUtilsTrainerMixin, trl.SFTTrainer):
    pass


class ExactDPO(GradUtilsTrainerMixin, trl.DPOTrainer):
    pass


class ExactReward(GradUtilsTrainerMixin, trl.RewardTrainer):
    pass


def make_tokenizer():
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )


SIZES = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.3}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
SIZES |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}


def make_llama(seed=11):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def make_data(num_rows=16, *, seed=5):
    """Conversations whose answers have 1 to 11 words; ``completion`` is what SFT trains, the others DPO."""
    generator = torch.Generator().manual_seed(seed)

    def say(role, num_words):
        words = torch.randint(4, len(WORDS), (num_words,), generator=generator).tolist()
        return [{"role": role, "content": " ".join(WORDS[i] for i in words)}]

    rows = []
    for i in range(num_rows):
        row = {"prompt": say("user", 1 + i % 5)}
        rows.append(row | {k: say("assistant", 1 + i * step % 11) for k, step in (("chosen", 5), ("rejected", 3))})
    return rows


def log_probs(model, row, answer="chosen"):
    """Of every token of the answer (its words and <eos>): what the model gives it, and the mean over all words."""
    tokenizer = make_tokenizer()
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    ids = torch.tensor(tokenizer.apply_chat_template(row["prompt"] + row[answer], return_dict=False))
    every = torch.log_softmax(model(ids[None]).logits[0, len(prompt) - 1 : -1], -1)
    return every.gather(-1, ids[len(prompt) :, None])[:, 0], every.mean(-1)


def truth(loss_type, data):
    """Gradient and loss of one process that sees every row by itself, in float64 and without trl."""
    model, reference = make_llama().double(), make_llama(12).double()
    log_p, uniform = (torch.cat(parts) for parts in zip(*(log_probs(model, row) for row in data), strict=True))
    if loss_type in ("nll", "sft"):
        loss = -log_p.mean()
    elif loss_type == "dft":
        loss = -(log_p * log_p.exp().detach()).mean()
    elif loss_type == "smoothed":
        loss = -(0.9 * log_p + 0.1 * uniform).mean()
    else:
        loss = torch.stack([_preference(loss_type, model, reference, row) for row in data]).mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


def _preference(loss_type, model, reference, row):
    ratios = []
    for answer in ("chosen", "rejected"):
        with torch.no_grad():
            base = log_probs(reference, row, answer)[0]
        ratio = log_probs(model, row, answer)[0] - base
        ratios.append(ratio.mean() if loss_type == "ipo" else ratio.sum())
    delta = ratios[0] - ratios[1]
    return (delta - 1 / (2 * BETA)) ** 2 if loss_type == "ipo" else -logsigmoid(BETA * delta)


def make_trainer(trainer_class, batch_size, accumulation=1, *, data=None, eval_data=None, arguments=None, **kwargs):
    """DPO starts away from its reference, where every pair has a loss of its own."""
    reset_accelerate()
    options = ONE_STEP | {
        "bf16": False,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
    }
    if issubclass(trainer_class, trl.SFTTrainer):
        config, as_dataset = trl.SFTConfig, _as_prompt_and_completion
    else:
        config, as_dataset = trl.DPOConfig, Dataset.from_list
        if issubclass(trainer_class, trl.RewardTrainer):
            config = trl.RewardConfig
        else:
            kwargs.setdefault("ref_model", make_llama(12))
    return trainer_class(
        args=config(**options | (arguments or {})),
        train_dataset=as_dataset(data or make_data()),
        eval_dataset=as_dataset(eval_data or make_data(1)),
        processing_class=make_tokenizer(),
        **{"model": make_llama()} | kwargs,
    )


def train(*args, **kwargs):
    """One optimizer step."""
    tap = GradientTap()
    trainer = make_trainer(*args, callbacks=[tap], **kwargs)
    trainer.train()
    return trainer, tap


def _as_prompt_and_completion(rows):
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
