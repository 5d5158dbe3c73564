"""Private names of torch and transformers that the package leans on: this fails when one of them moves."""

import ast
import inspect
import math
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer
from transformers.distributed import DistributedConfig
from transformers.loss import loss_for_object_detection

import hf_gradutils
from hf_gradutils.trainer import GradUtilsTrainerMixin
from hf_gradutils.upstream.accelerate import ACCELERATOR_ATTRIBUTES, without_accelerate_state
from hf_gradutils.upstream.dtensor import unscaling_local_parts
from hf_gradutils.upstream.fsdp import (
    _fsdp2_groups,
    fsdp2_has_not_run,
    fsdp2_honours_grad_dtype,
    fsdp2_keep_losses,
    fsdp2_sync_flags,
    fsdp2_widened_new_gradients,
    restore_fsdp2_sync_flags,
)
from hf_gradutils.upstream.torch import default_store, foreach_mul_in_fp32_, foreach_norm, why_ddp_has_not_averaged
from hf_gradutils.upstream.transformers import TRAINER_ATTRIBUTES, TRAINER_METHODS, take_accumulated_all_reduces
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import reset_accelerate

PACKAGE = Path(hf_gradutils.__file__).parent


def test_the_methods_of_trainer_take_what_we_think():
    for name, parameters in TRAINER_METHODS.items():
        theirs = tuple(inspect.signature(getattr(Trainer, name)).parameters)
        assert theirs[: len(parameters)] == parameters, name


def test_every_private_name_of_trainer_that_is_used_is_listed():
    mixins = [c for c in GradUtilsTrainerMixin.__mro__ if c.__module__.startswith("hf_gradutils")]
    own = {name for mixin in mixins for name in vars(mixin) if name.startswith("_")}
    files = (PACKAGE / "trainer").glob("*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    theirs = {name for name in used | own if hasattr(Trainer, name) and not name.startswith("__")}
    assert theirs <= set(TRAINER_METHODS)
    source = inspect.getsource(Trainer)
    for name in TRAINER_ATTRIBUTES:
        assert name in used
        assert f"self.{name}" in source, f"Trainer no longer keeps {name}"


def test_accelerates_backward_asks_for_nothing_that_ours_does_not_know():
    names = {
        *("distributed_type", "DistributedType", "DEEPSPEED", "deepspeed_engine_wrapped"),
        "MEGATRON_LM",  # refused
        *("has_lomo_optimizer", "lomo_backward", "get"),
        *("gradient_accumulation_steps", "sync_gradients", "scaler", "scale", "backward"),
    }
    assert set(Accelerator.backward.__code__.co_names) == names


def test_the_accelerator_still_keeps_what_it_has_prepared():
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    for name in ACCELERATOR_ATTRIBUTES:
        assert getattr(accelerator, name) == []
    linear = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(linear, torch.optim.SGD(linear.parameters()))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    loader = accelerator.prepare(torch.utils.data.DataLoader([1]))
    assert [getattr(accelerator, name) for name in ACCELERATOR_ATTRIBUTES] == [
        [model],
        [optimizer],
        [scheduler],
        [loader],
    ]


def test_trainer_still_calls_the_two_hooks_before_the_step():
    source = inspect.getsource(Trainer._run_epoch)
    clip, norm, step = (
        source.index(x) for x in ("self._clip_grad_norm(model)", "self._get_grad_norm(", "optimizer.step()")
    )
    assert clip < norm < step


def test_no_other_file_uses_private_names_of_torch():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "upstream":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and isinstance(node.value, ast.Name):
                assert node.value.id not in ("torch", "dist"), f"{path.name}: {node.value.id}.{node.attr}"


def test_the_multi_tensor_kernels_do_what_we_think():
    tensors = [torch.randn(7), torch.randn(3, 2).bfloat16()]
    norms = foreach_norm(tensors, 2.0, torch.float64)
    assert [n.dtype for n in norms] == [torch.float64] * 2
    assert norms[0].item() == torch.linalg.vector_norm(tensors[0].double()).item()
    maxima = foreach_norm(tensors, math.inf, torch.float64)
    assert maxima[1].item() == tensors[1].abs().max().item()
    half = [torch.randn(5).bfloat16()]
    want = (half[0].float() * 0.3).bfloat16()
    foreach_mul_in_fp32_(half, torch.tensor(0.3))
    assert torch.equal(half[0], want)


@ranks(2)
def test_the_flags_of_fsdp2_can_be_read_and_written_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model[0])
    fully_shard(model)
    model.set_requires_gradient_sync(False)
    flags = fsdp2_sync_flags(model)
    assert [(reduce, all_reduce) for _, reduce, all_reduce in flags] == [(False, False)]
    model.set_requires_gradient_sync(True)
    assert [flag[1:] for flag in fsdp2_sync_flags(model)] == [(True, True)]
    restore_fsdp2_sync_flags(flags)
    assert [flag[1:] for flag in fsdp2_sync_flags(model)] == [(False, False)]
    assert default_store() is not None


@ranks(2)
def test_fsdp2_keeps_what_it_accumulates_where_we_look():
    if fsdp2_honours_grad_dtype():
        return  # torch 2.15 widens by itself
    model = nn.Linear(4, 4)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16))
    state = model._get_fsdp_state()
    assert state._mp_policy.output_dtype == torch.bfloat16
    assert fsdp2_has_not_run(model)
    model.set_requires_gradient_sync(False)
    model(torch.ones(1, 4)).sum().backward()
    (group,) = _fsdp2_groups(model)
    assert not fsdp2_has_not_run(model)
    assert group._reduce_dtype == torch.float32
    for parameter in group.fsdp_params:
        assert parameter._unsharded_param.dtype == torch.bfloat16
        assert parameter.unsharded_accumulated_grad.dtype == torch.float32
    model.set_requires_gradient_sync(True)
    group.fsdp_params[0].unsharded_accumulated_grad = None
    with fsdp2_widened_new_gradients([model]):
        dtypes = [parameter._unsharded_param.grad_dtype for parameter in group.fsdp_params]
        assert dtypes == [torch.float32, torch.bfloat16], "of the one that has none"
    assert all(parameter._unsharded_param.grad_dtype == torch.bfloat16 for parameter in group.fsdp_params)
    fsdp2_keep_losses(model)
    fsdp2_keep_losses(model)
    assert state._mp_policy.output_dtype is None
    assert len(model._forward_hooks) == 2, "FSDP2's own, and ours once"
    assert model(torch.ones(1, 4)).dtype == torch.bfloat16


def test_torchs_scaler_unscales_by_the_method_that_we_replace():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 8.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # makes the scale
    with unscaling_local_parts(scaler) as found:
        scaler.unscale_(optimizer)
    assert weight.grad.tolist() == [2.0, 2.0]
    [flag] = found[id(optimizer)]
    flag.fill_(1.0)
    scaler.step(optimizer)
    assert weight.tolist() == [1.0, 1.0], "the flag is the one that the step asks"
    assert "_unscale_grads_" not in vars(scaler)


@ranks(2)
def test_ddp_says_whether_it_has_averaged():
    model = nn.Module()
    model.used, model.unused = nn.Linear(2, 2), nn.Linear(2, 2)
    model.forward = lambda x: model.used(x)
    wrapped = DistributedDataParallel(model)
    assert why_ddp_has_not_averaged(wrapped) == ""
    wrapped(torch.ones(1, 2)).sum().backward()
    assert why_ddp_has_not_averaged(wrapped).startswith("Parameter indices which did not receive grad")


def test_the_detection_losses_ask_the_state_that_we_hide():
    source = inspect.getsource(loss_for_object_detection.ImageLoss.forward)
    assert "PartialState._shared_state" in source
    PartialState(cpu=True)
    with without_accelerate_state():
        assert PartialState._shared_state == {}
    assert PartialState._shared_state
    AcceleratorState._reset_state(True)


@ranks(2)
def test_the_hooks_of_replicated_norms_under_tensor_parallelism_are_found():
    config = Qwen3Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4)
    config.update({"num_attention_heads": 2, "num_key_value_heads": 2})
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    Qwen3ForCausalLM(config).save_pretrained(folder[0])
    dist.barrier()
    model = Qwen3ForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))
    dist.barrier()
    taken = take_accumulated_all_reduces(model)
    attention = model.model.layers[0].self_attn
    assert {module for module, _ in taken} == {attention.q_norm, attention.k_norm}
    assert {group.size() for _, group in taken} == {2}
    assert take_accumulated_all_reduces(model) == []
    model(torch.arange(4)[None]).logits.sum().backward()
    assert not attention.q_norm.weight._post_accumulate_grad_hooks, "nothing hooks it again"
