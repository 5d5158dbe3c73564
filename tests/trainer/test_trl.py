"""The mixin in front of trl's trainers: supervised fine-tuning by tokens, preferences by pairs."""

import inspect
import re
import tempfile
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from torch.nn.functional import logsigmoid
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
)

from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from hf_gradutils.targets import trl as trl_trainers
from hf_gradutils.trainer import GradUtilsTrainerMixin
from hf_gradutils.upstream.trl import TRL_AUXILIARY, TRL_METRICS
from tests.harness.gradients import norm_of, relative_error
from tests.harness.ranks import run_ranks
from tests.harness.trainer_cases import GradientTap, fsdp_on_cpu, reset_accelerate

trl = pytest.importorskip("trl")
from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",  # trl 1.16 under transformers 5.23
        "ignore:`label_smoothing_factor` is deprecated:FutureWarning",
    ),
]
TOLERANCE = 1e-5
BETA = 0.1
LAYOUTS = ["one_rank", "ddp2"]
WORDS = ["<pad>", "<eos>", "<user>", "<assistant>", *(f"w{i}" for i in range(4, 16))]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


class ExactSFT(GradUtilsTrainerMixin, SFTTrainer):
    pass


class ExactDPO(GradUtilsTrainerMixin, DPOTrainer):
    pass


class ExactReward(GradUtilsTrainerMixin, RewardTrainer):
    pass


class MeanOfMeansSFT(SFTTrainer):
    """A control: every micro-batch counts the same."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


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
    options = {
        "output_dir": str(Path(tempfile.gettempdir()) / "hf_gradutils-tests"),  # nothing is saved there
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    if issubclass(trainer_class, SFTTrainer):
        config, as_dataset = SFTConfig, _as_prompt_and_completion
    else:
        config, as_dataset = DPOConfig, Dataset.from_list
        if issubclass(trainer_class, RewardTrainer):
            config = RewardConfig
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


def run(function, layout, *args):
    return [function(layout, *args)] if layout == "one_rank" else run_ranks(function, 2, layout, *args)


# ---- Supervised fine-tuning: a mean over the answers' tokens ----


def count(batch):
    return batch["labels"][:, 1:].ne(-100).sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_takes_the_step_of_the_whole_batch(layout):
    run(_sft_is_exact, layout)


def _sft_is_exact(layout):
    for loss_type, accumulations in (("nll", (1, 4, 8)), ("dft", (4,)), ("smoothed", (4,))):
        want, want_loss = truth(loss_type, make_data())
        arguments = {"label_smoothing_factor": 0.1} if loss_type == "smoothed" else {"loss_type": loss_type}
        for accumulation in accumulations:
            batch_size = 16 // accumulation // (2 if layout == "ddp2" else 1)
            trainer, tap = train(ExactSFT, batch_size, accumulation, arguments=arguments)
            assert relative_error(tap.steps[0], want) < TOLERANCE, (loss_type, accumulation)
            entry = trainer.state.log_history[0]
            assert entry["loss"] == pytest.approx(want_loss, rel=1e-5)
            assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)
            assert entry["num_targets"] == sum(2 + i * 5 % 11 for i in range(16)), "words and <eos>"


@pytest.mark.parametrize("plugin", [GradUtilsPlugin(loss_unit="shifted_tokens"), GradUtilsPlugin(count_targets=count)])
def test_smoothing_shifts_whoever_counts(plugin):
    _, tap = train(ExactSFT, 4, 4, arguments={"label_smoothing_factor": 0.1}, grad_plugin=plugin)
    assert relative_error(tap.steps[0], truth("smoothed", make_data())[0]) < TOLERANCE


def test_control_a_mean_of_means_is_wrong_for_sft():
    _, tap = train(MeanOfMeansSFT, 4, 4)
    assert relative_error(tap.steps[0], truth("nll", make_data())[0]) > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_without_padding_is_exact(layout):
    run(_flattened_is_exact, layout)


FLATTENED = {"padding-free": {"padding_free": True, "max_length": None}, "packed": {"packing": True, "max_length": 24}}


def _flattened_is_exact(layout):
    want, _ = truth("nll", make_data())
    for how, num_rows in (("padding-free", 16), ("packed", 10)):
        arguments = FLATTENED[how] | {"num_train_epochs": 1}
        trainer, tap = train(ExactSFT, 2 if how == "padding-free" else 1, 16, arguments=arguments)
        assert len(trainer.train_dataset) == num_rows
        assert relative_error(tap.steps[0], want) < TOLERANCE, how


# ---- Preferences: a mean over pairs, whose rows are all chosen ones, then all rejected ones ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dpo_takes_the_step_of_the_whole_batch(layout):
    run(_dpo_is_exact, layout)


def _dpo_is_exact(layout):
    # 15 pairs leave a last micro-batch that is smaller; trl gathers rewards, so on two ranks all must be as large.
    num_pairs, cuts = (15, ((15, 1), (4, 4), (1, 15))) if layout == "one_rank" else (16, ((8, 1), (1, 8)))
    data = make_data(num_pairs)
    for loss_type in ("sigmoid", "ipo"):
        want, want_loss = truth(loss_type, data)
        for batch_size, accumulation in cuts if loss_type == "sigmoid" else cuts[1:2]:
            trainer, tap = train(ExactDPO, batch_size, accumulation, data=data, arguments={"loss_type": [loss_type]})
            assert relative_error(tap.steps[0], want) < TOLERANCE, (loss_type, accumulation)
            entry = trainer.state.log_history[0]
            assert entry["loss"] == pytest.approx(want_loss, rel=1e-5)
            assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)
            assert entry["num_targets"] == num_pairs


def test_control_the_stock_dpo_trainer_is_wrong_on_the_same_data():
    data = make_data(15)
    assert relative_error(train(DPOTrainer, 4, 4, data=data)[1].steps[0], truth("sigmoid", data)[0]) > 1e-2


MEANS_OVER_PAIRS = dict.fromkeys(["sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair"], 1.0)
MEANS_OVER_PAIRS |= dict.fromkeys(["apo_zero", "apo_down", "discopop", "sigmoid_norm"], 1.0)
MEANS_OVER_PAIRS |= {"ipo": 0.1, "sppo_hard": 0.01}
"""``loss_type`` → a weight that leaves none of them unseen beside the others."""


def test_a_mix_of_dpo_losses_is_exact():
    data = make_data(15)
    arguments = {"loss_type": list(MEANS_OVER_PAIRS), "loss_weights": list(MEANS_OVER_PAIRS.values())}
    arguments |= {"label_smoothing": 0.1, "precompute_ref_log_probs": True}
    double = {"model": make_llama().double(), "ref_model": make_llama(12).double()}
    _, want = train(DPOTrainer, 15, 1, data=data, arguments=arguments, **double)
    _, got = train(ExactDPO, 4, 4, data=data, arguments=arguments)
    assert relative_error(got.steps[0], want.steps[0]) < TOLERANCE


def test_every_dpo_loss_of_trl_is_known():
    types = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    assert types == set(MEANS_OVER_PAIRS) | set(trl_trainers.DPO_WITHOUT_UNIT)


@pytest.mark.parametrize("loss_type", ["sft", "aot", "aot_unpaired"])
def test_dpo_losses_that_are_no_mean_over_pairs_are_refused(loss_type):
    arguments = {"loss_type": ["sigmoid", loss_type], "loss_weights": [1.0, 0.5]}
    reason = "mean over the tokens of the chosen" if loss_type == "sft" else "sorts the pairs of its micro-batch"
    with pytest.raises(LossUnitError, match=f"cannot be split exactly: loss_type '{loss_type}' .*{reason}"):
        train(ExactDPO, 4, 4, data=make_data(15), arguments=arguments)


def count_chosen(batch):
    return batch["completion_mask"].chunk(2)[0][:, 1:].sum()


def test_dpo_with_a_count_of_the_users_own_is_exact():
    data = make_data(15)
    plugin = GradUtilsPlugin(count_targets=count_chosen)
    _, tap = train(ExactDPO, 4, 4, data=data, arguments={"loss_type": ["sft"]}, grad_plugin=plugin)
    assert relative_error(tap.steps[0], truth("sft", data)[0]) < TOLERANCE


def test_a_wrong_count_of_the_users_own_is_refused():
    with pytest.raises(LossUnitError, match=r"\(count_targets=count_chosen\): L\(AB\)"):
        train(ExactDPO, 4, 4, data=make_data(15), grad_plugin=GradUtilsPlugin(count_targets=count_chosen))


def test_rewards_are_learnt_exactly():
    data = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in make_data(15)]
    data = [row | {"margin": i / 9} for i, row in enumerate(data)]
    arguments = {"center_rewards_coefficient": 0.1}

    def step(trainer_class, batch_size, accumulation, dtype=torch.float32):
        torch.manual_seed(11)
        model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).to(dtype)
        trainer, tap = train(
            trainer_class, batch_size, accumulation, data=data, eval_data=data, arguments=arguments, model=model
        )
        return tap.steps[0], trainer.evaluate()["eval_loss"]

    want, want_loss = step(RewardTrainer, 15, 1, torch.float64)
    got, got_loss = step(ExactReward, 4, 4)
    assert relative_error(got, want) < TOLERANCE
    assert got_loss == pytest.approx(want_loss, rel=1e-5)
    assert relative_error(step(RewardTrainer, 4, 4)[0], want) > 1e-2


# ---- All: mixtures of experts, sharding, metrics, evaluation ----


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_auxiliary_loss_of_a_mixture_is_weighted_like_its_micro_batch(kind):
    is_sft = kind == "sft"
    data = make_data(15)

    def step(trainer_class, accumulation, dtype):
        torch.manual_seed(11)
        config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
        kwargs = {} if is_sft else {"ref_model": make_llama(12).to(dtype)}
        kwargs["model"] = MixtralForCausalLM(config).to(dtype)
        arguments = {"router_aux_loss_coef": 0.1, "max_steps": 4 // accumulation}
        return train(trainer_class, 4, accumulation, data=data, arguments=arguments, **kwargs)

    stock, parts = step(SFTTrainer if is_sft else DPOTrainer, 1, torch.float64)
    trainer, got = step(ExactSFT if is_sft else ExactDPO, 4, torch.float32)
    counts = [count(batch).item() for batch in stock.get_train_dataloader()] if is_sft else [4, 4, 4, 3]
    want = {
        name: sum(n * part[name] for n, part in zip(counts, parts.steps, strict=True)) / sum(counts)
        for name in parts.steps[0]
    }
    assert relative_error(got.steps[0], want) < TOLERANCE
    aux_losses = [entry["aux_loss"] for entry in stock.state.log_history[:4]]
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(sum(aux_losses) / 4, rel=1e-5)


def test_shards_are_exact():
    run_ranks(_shards_are_exact, 2)


def _shards_are_exact():
    arguments = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    for trainer_class, loss_type in ((ExactSFT, "nll"), (ExactDPO, "sigmoid")):
        with fsdp_on_cpu():
            trainer, tap = train(trainer_class, 2, 4, arguments=arguments)
        assert all(isinstance(p, DTensor) for p in trainer.model_wrapped.parameters())
        assert relative_error(tap.steps[0], truth(loss_type, make_data())[0]) < TOLERANCE, loss_type


METRICS = ["entropy", "mean_token_accuracy", "num_tokens"]
REWARDS = ["rewards/chosen", "rewards/margins", "logps/rejected", "logits/chosen"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_are_those_of_the_stock_trainer(layout):
    run(_metrics_are_stock, layout)


def _metrics_are_stock(layout):
    cases = ((ExactSFT, SFTTrainer, METRICS), (ExactDPO, DPOTrainer, METRICS + REWARDS))
    for exact, stock, names in cases:
        logs = []
        for trainer_class in (exact, stock):
            arguments = {"per_device_eval_batch_size": 3}
            trainer, _ = train(trainer_class, 2, 4, eval_data=make_data(13, seed=8), arguments=arguments)
            trainer.evaluate()
            logs.append(trainer.state.log_history[0] | trainer.state.log_history[-1])
        for name in (*names, *(f"eval_{name}" for name in names)):
            assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-6), name
            assert logs[0][name] != 0, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_evaluation_loss_is_that_of_one_batch(layout):
    run(_eval_loss, layout)


def _eval_loss(layout):
    data = make_data(13, seed=8)  # does not divide: ranks are handed copies to fill up
    wants = {ExactSFT: truth("nll", data)[1], ExactDPO: truth("sigmoid", data)[1]}
    cases = [(trainer_class, size, {}) for trainer_class in wants for size in (1, 3, 8)]
    cases += [(ExactSFT, size, arguments) for arguments in FLATTENED.values() for size in (1, 3)]
    for trainer_class, batch_size, arguments in cases:
        arguments = {"per_device_eval_batch_size": batch_size} | arguments
        trainer = make_trainer(trainer_class, 4, eval_data=data, arguments=arguments)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(wants[trainer_class], rel=1e-5), arguments


# ---- Preparing data ----


def test_the_first_rank_tokenizes_before_the_others():
    first, second = run_ranks(_prepares, 2)
    assert second - first >= 0.3


def _prepares():
    """When this rank began to tokenize, which takes a while."""
    started = []

    class Watched(ExactSFT):
        def _prepare_dataset(self, *args, **kwargs):
            with PartialState().main_process_first():
                started.append(time.monotonic())
                time.sleep(0.3)
            return super()._prepare_dataset(*args, **kwargs)

    make_trainer(Watched, 4)
    assert PartialState.main_process_first.__module__.startswith("accelerate"), "and all is as before"
    return started[0]


# ---- What weighs or batches by itself ----


class ExactGRPO(GradUtilsTrainerMixin, GRPOTrainer):
    pass


def test_a_trainer_that_normalises_by_itself_is_refused(tmp_path):
    reset_accelerate()
    with pytest.raises(InvalidArgumentError, match="GRPOTrainer divides its loss by a count of its own"):
        ExactGRPO(
            model=make_llama(),
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[]),
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in make_data()]),
            processing_class=make_tokenizer(),
        )


@pytest.mark.parametrize("name", sorted(trl_trainers.NOT_EXACT))
def test_trainers_that_are_refused_are_known_by_their_classes(name):
    theirs = getattr(trl, name)
    mine = type(f"My{name}", (GradUtilsTrainerMixin, theirs), {})
    assert trl_trainers.why_not_exact(mine.__new__(mine)) == trl_trainers.NOT_EXACT[name]


def test_every_trainer_of_trl_is_known():
    assert {name for name in dir(trl) if name.endswith("Trainer")} == {*trl_trainers.EXACT, *trl_trainers.NOT_EXACT}


def test_a_trainer_that_overrides_an_exact_one_is_not_taken_for_it():
    of_trl = type("DistilledSFTTrainer", (SFTTrainer,), {"__module__": "trl.experimental.distilled"})
    mine = type("DistilledSFTTrainer", (SFTTrainer,), {"__module__": "my_project"})
    assert "not known" in trl_trainers.why_not_exact(of_trl.__new__(of_trl))
    assert trl_trainers.why_not_exact(mine.__new__(mine)) == ""
    assert trl_trainers.why_not_exact(object()) == ""


# ---- Names of trl that the package leans on ----


@pytest.mark.parametrize("trainer_class", [SFTTrainer, DPOTrainer, RewardTrainer])
def test_the_attributes_of_trl_are_still_there(trainer_class):
    assert trainer_class.__name__ in trl_trainers.EXACT
    source = inspect.getsource(trainer_class)
    for name in TRL_METRICS:
        assert f"self.{name} = " in source, f"{trainer_class.__name__} no longer keeps {name}"
    if trainer_class is not RewardTrainer:
        for name in TRL_AUXILIARY:
            assert f"self.{name} = " in source
            assert f"if self.{name}:" in source


@pytest.mark.parametrize("trainer_class", [SFTTrainer, DPOTrainer, RewardTrainer])
def test_the_mixin_hides_nothing_of_trls_trainers_but_what_it_calls(trainer_class):
    mixins = [c for c in GradUtilsTrainerMixin.__mro__ if c.__module__.startswith("hf_gradutils")]
    ours = {name for mixin in mixins for name in vars(mixin) if not name.startswith("__")}
    theirs = {name for c in trainer_class.__mro__ if c.__module__.startswith("trl") for name in vars(c)}
    attributes = set(re.findall(r"self\.(\w+) = ", inspect.getsource(trainer_class)))
    assert {name for name in ours & (theirs | attributes) if not hasattr(Trainer, name)} == set()
