"""What is checked on every rank, by name and by the worlds in which it is."""

from __future__ import annotations

import copy
import os
from functools import cache
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.support.compare import assert_fair, assert_like_eager
from trilith.blocks import LMConfig, build_lm
from trilith.blocks.parallel import (
    context_parallel,
    context_parallel_attention,
    load_checkpoint,
    pipeline_stage,
    save_checkpoint,
    tensor_parallel_plan,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from trilith.blocks.parallel.pipeline import Stage
from trilith.blocks.parallel.vocab import VocabParallel
from trilith.kernels._runtime.launch import observers

SIZES = {"vocab_size": 53, "dim": 32, "n_layers": 2, "n_heads": 8, "mlp_hidden": 24, "max_len": 8}
STYLES = {
    "llama": {"n_kv_heads": 4, "tied": False},
    "gpt": {
        "norm": "layer_norm",
        "mlp": "mlp",
        "activation": "gelu",
        "position": "learned",
        "bias": True,
    },
    "sandwich": {"residual": "sandwich", "position": "sinusoidal", "n_kv_heads": 4},
}
_CHECKS = {}


def check(worlds=(2, 4), kernels=False, **cases):
    """Registers a function, once for each choice of the cases; `kernels`: in the interpreter."""

    def register(function):
        named = {f"{function.__name__}": {}}
        for key, values in cases.items():
            named = {
                f"{name}-{value}": {**given, key: value}
                for name, given in named.items()
                for value in values
            }
        for name, given in named.items():
            _CHECKS[name] = (function, worlds, kernels, given)
        return function

    return register


def names(world, interpreted=None):
    if interpreted is None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return [
        name
        for name, (_, worlds, kernels, _) in _CHECKS.items()
        if world in worlds and kernels == interpreted
    ]


def run(name, folder):
    function, _, _, given = _CHECKS[name]
    parameters = function.__code__.co_varnames[: function.__code__.co_argcount]
    function(**given, **({"folder": folder} if "folder" in parameters else {}))


def model_of(style, **changes):
    """The same weights on every rank; norms and biases are not at their initial 1 and 0."""
    torch.manual_seed(1)
    model = build_lm(LMConfig(**SIZES | STYLES[style] | changes))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def batch(n=4, length=8):
    generator = torch.Generator().manual_seed(2)
    data = torch.randint(0, SIZES["vocab_size"], (n, length + 1), generator=generator)
    return data[:, :-1].contiguous(), data[:, 1:].contiguous()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model):
    """Of all parameters, whole, by the names of one process."""
    return {
        name.removeprefix("module."): whole(p.grad).detach().clone()
        for name, p in model.named_parameters()
    }


@cache
def mesh_of(*sizes):
    return init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[-len(sizes) :])


def expected(model, tokens, targets, **options):
    """Loss and gradients of one process: in float64, and as it rounds them."""
    found = []
    for dtype in (torch.float64, torch.float32):
        twin = copy.deepcopy(model).to(dtype)
        loss = twin(tokens, targets, **options)
        loss.backward()
        found.append((loss.detach(), gradients(twin)))
    return found


def agree(loss, found, model, tokens, targets, **options):
    """What numerics.md asks of products: no worse than one process, by its rule for float32."""
    (loss64, exact), (eager_loss, eager) = expected(model, tokens, targets, **options)
    assert_like_eager(loss.detach()[None], loss64[None], eager_loss[None])
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        try:
            assert_like_eager(gradient, exact[name], eager[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


TINY = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden": 8, "max_len": 4}


@check(style=["llama", "gpt"], sequence=[False, True])
def tensor_parallel(style, sequence):
    tensor_parallel_model(model_of(style), sequence)


@check(worlds=(2,), kernels=True)
def tensor_parallel_kernels():
    tensor_parallel_model(model_of("gpt", **TINY), sequence=True, n=2, length=4)


def tensor_parallel_model(model, sequence, **sizes):
    mesh = mesh_of(dist.get_world_size())
    tokens, targets = batch(**sizes)
    targets[0, :3] = -100
    ours = copy.deepcopy(model)
    parallelize_module(ours, mesh, tensor_parallel_plan(ours, sequence_parallel=sequence))
    assert all(isinstance(p, DTensor) for p in ours.parameters())
    with mock.patch.object(VocabParallel, "logits", pytest.fail):
        loss = ours(tokens, targets)
        loss.backward()
    agree(loss, gradients(ours), model, tokens, targets)
    torch.testing.assert_close(ours(tokens=tokens), model(tokens), rtol=1e-5, atol=1e-5)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == names


@check(worlds=(2,))
def vocabulary_parallel_losses():
    world = dist.get_world_size()
    mesh = mesh_of(world)
    x = torch.randn(9, 16).requires_grad_()
    head, bias = torch.randn(7, 16).requires_grad_(), torch.randn(7).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, 5, 6, -100, 6])
    for reduction in ("none", "mean", "sum"):
        logits = F.linear(x, head, bias)
        plain = F.cross_entropy(logits, target, reduction=reduction)
        dloss = torch.randn_like(plain)
        *wanted, theirs = torch.autograd.grad(plain, (x, head, bias, logits), dloss)
        split = [
            distribute_tensor(t.detach(), mesh, [Shard(0)]).requires_grad_() for t in (head, bias)
        ]
        loss = vocab_parallel_linear_cross_entropy(
            x, split[0], target, linear_bias=split[1], reduction=reduction
        )
        torch.testing.assert_close(loss, plain)
        dx, *rest = torch.autograd.grad(loss, (x, *split), dloss)
        dist.all_reduce(dx)
        for ours, gradient in zip((dx, *map(whole, rest)), wanted, strict=True):
            torch.testing.assert_close(ours, gradient)
        split = distribute_tensor(logits.detach(), mesh, [Shard(1)]).requires_grad_()
        loss = vocab_parallel_cross_entropy(split, target, reduction=reduction)
        torch.testing.assert_close(loss, plain)
        (dlogits,) = torch.autograd.grad(loss, split, dloss)
        torch.testing.assert_close(whole(dlogits), theirs)


@check(worlds=(2,))
def vocabulary_parallel_loss_of_masked_classes():
    """The first and the last class of a rank, all of a rank, a label: by -inf and by -1e9."""
    mesh, target = mesh_of(2), torch.tensor([0, 1, 5, 6, 0, 6, 2])
    masked = ([3, 4], [0, 3], [2, 5], [0, 3], [4, 5, 6, 0], range(4), [2])
    for mask in (-torch.inf, -1e9):
        logits = torch.randn(7, 7)
        for row, classes in enumerate(masked):
            logits[row, list(classes)] = mask
        for rows in (slice(4), slice(7)):
            wide = logits[rows].double().requires_grad_()
            plain = F.cross_entropy(wide, target[rows], reduction="none")
            dloss = torch.randn_like(plain)
            (wanted,) = torch.autograd.grad(plain, wide, dloss)
            split = distribute_tensor(logits[rows], mesh, [Shard(1)]).requires_grad_()
            loss = vocab_parallel_cross_entropy(split, target[rows], reduction="none")
            torch.testing.assert_close(loss.double(), plain, rtol=1e-6, atol=1e-5)
            (dlogits,) = torch.autograd.grad(loss, split, dloss.float())
            torch.testing.assert_close(whole(dlogits).double(), wanted, rtol=1e-5, atol=1e-6)
        x, head, bias = torch.randn(7, 16), torch.randn(7, 16), torch.randn(7)
        bias[3], bias[4] = mask, mask
        plain = F.cross_entropy(F.linear(*(t.double() for t in (x, head, bias))), target)
        split = [distribute_tensor(t, mesh, [Shard(0)]) for t in (head, bias)]
        loss = vocab_parallel_linear_cross_entropy(x, split[0], target, linear_bias=split[1])
        torch.testing.assert_close(loss.double(), plain, rtol=1e-6, atol=1e-5)


@check(worlds=(2,))
def vocabulary_parallel_losses_refuse_what_the_plain_ones_do():
    mesh, x, labels = mesh_of(2), torch.randn(4, 6), torch.tensor([0, 1, 2, -100])
    head = distribute_tensor(torch.randn(5, 6), mesh, [Shard(0)])
    logits = distribute_tensor(torch.randn(4, 5), mesh, [Shard(1)])

    def of_head(labels=labels, **options):
        return vocab_parallel_linear_cross_entropy(x, head, labels, **options)

    torch.testing.assert_close(of_head(ignore_index=None), of_head())
    few = labels[[0, 1, 2, 0]]
    torch.testing.assert_close(of_head(few.byte()), of_head(few))
    for error, message, options in (
        (ValueError, "num_items must be None unless", {"reduction": "sum", "num_items": 5}),
        (ValueError, "reduction must be one of", {"reduction": "median"}),
        (ValueError, r"target must have shape \(4,\)", {"labels": labels[:3]}),
        (RuntimeError, "target must be int64", {"labels": labels.int()}),
        (TypeError, "target must be a tensor", {"labels": [0, 1, 2, 3]}),
    ):
        with pytest.raises(error, match=message):
            of_head(**options)
    for error, message, given in (
        (ValueError, r"target must have shape \(4,\)", labels[:3]),
        (RuntimeError, "target must be int64", labels.int()),
    ):
        with pytest.raises(error, match=message):
            vocab_parallel_cross_entropy(logits, given)


@check(style=["llama", "gpt"])
def data_parallel(style):
    """DDP: each rank has its rows of the batch."""
    model, (tokens, targets) = model_of(style), batch()
    ours = DistributedDataParallel(copy.deepcopy(model))
    loss = ours(*mine(tokens, targets))
    loss.backward()
    agree(averaged(loss), gradients(ours), model, tokens, targets)


@check(style=["llama", "gpt", "sandwich"])
def fully_sharded(style):
    fully_sharded_model(model_of(style))


@check(worlds=(2,), kernels=True)
def fully_sharded_kernels():
    """The fused paths read children's parameters past their forwards."""
    launched = []
    observers.append(lambda kernel, *_: launched.append(kernel.fn.__name__))
    fully_sharded_model(model_of("llama", **TINY), n=2, length=4)
    observers.pop()
    assert any("norm" in name for name in launched), launched


def fully_sharded_model(model, **sizes):
    """FSDP2: of each block, then of the whole."""
    tokens, targets = batch(**sizes)
    ours = sharded(copy.deepcopy(model))
    for _ in range(2):  # the second pass meets what the first one resharded
        ours.zero_grad()
        loss = ours(*mine(tokens, targets))
        loss.backward()
    agree(averaged(loss), gradients(ours), model, tokens, targets)


@check(worlds=(2,))
def fully_sharded_in_mixed_precision():
    """As one process with bfloat16 weights, but for where gradients are summed: in float32."""
    model, (tokens, targets) = model_of("llama"), batch()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ours = sharded(copy.deepcopy(model), mp_policy=policy)
    loss = ours(*mine(tokens, targets))
    loss.backward()
    low = copy.deepcopy(model).bfloat16()
    low(tokens, targets).backward()
    exact = copy.deepcopy(low).double()
    exact.zero_grad()
    exact(tokens, targets).backward()
    eager = gradients(low)
    for name, gradient in gradients(exact).items():
        found = gradients(ours)[name]
        assert found.dtype == torch.float32
        error, usual = (found - gradient).norm(), (eager[name].double() - gradient).norm()
        assert error <= 2 * usual, f"{name}: {error} against {usual}"


@check(worlds=(4,), style=["llama", "gpt"])
def fully_sharded_and_tensor_parallel(style):
    model, (tokens, targets) = model_of(style), batch()
    mesh = mesh_of(2, 2)
    ours = copy.deepcopy(model)
    parallelize_module(ours, mesh["tp"], tensor_parallel_plan(ours, sequence_parallel=True))
    ours = sharded(ours, mesh=mesh["dp"])
    loss = ours(*mine(tokens, targets, mesh["dp"]))
    loss.backward()
    agree(averaged(loss), gradients(ours), model, tokens, targets)
    norm = torch.nn.utils.clip_grad_norm_(ours.parameters(), 1e-3)
    model(tokens, targets).backward()
    torch.testing.assert_close(
        whole(norm), torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3), rtol=1e-4, atol=0
    )


@check(worlds=(2,))
def a_tied_embedding_sharded_apart_is_refused():
    model = model_of("gpt")
    fully_shard(model.embedding)
    with pytest.raises(ValueError, match="tied embedding with the whole model"):
        fully_shard(model)(*batch())


@check(worlds=(4,))
def heads_that_do_not_divide_are_refused():
    model = model_of("llama", n_heads=8, n_kv_heads=2)
    with pytest.raises(
        ValueError, match="attention.branch.n_kv_heads must be divisible by the 4 ranks .*got 2"
    ):
        parallelize_module(model, mesh_of(4), tensor_parallel_plan(model))


def sharded(model, **options):
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def mine(tokens, targets, mesh=None):
    """This rank's rows."""
    rank, world = (
        (dist.get_rank(), dist.get_world_size())
        if mesh is None
        else (mesh.get_local_rank(), mesh.size())
    )
    return tokens.chunk(world)[rank], targets.chunk(world)[rank]


def averaged(loss):
    total = loss.detach().float()
    dist.all_reduce(total)
    return total / dist.get_world_size()


@check(style=["llama", "gpt"])
def context_is_parallel(style):
    """Each rank has its run of every sequence, and DDP averages their gradients."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, (tokens, targets) = model_of(style), batch()
    ours = context_parallel(copy.deepcopy(model), mesh_of(world))
    ours = DistributedDataParallel(ours)
    loss = ours(*(t.chunk(world, 1)[rank] for t in (tokens, targets)))
    loss.backward()
    agree(averaged(loss), gradients(ours), model, tokens, targets)
    with pytest.raises(ValueError, match="at most max_len=8 tokens, got"):
        ours(*batch(length=8))


@check(causal=[False, True])
def context_parallel_attentions(causal):
    attention_over_ranks(causal)


@check(worlds=(2,), kernels=True)
def context_parallel_attentions_kernels():
    attention_over_ranks(causal=True)


def attention_over_ranks(causal):
    world, rank = dist.get_world_size(), dist.get_rank()
    shapes = [(2, 4, 8, 16), (2, 2, 8, 16), (2, 2, 8, 24), (2, 4, 8, 24)]
    *inputs, dout = map(torch.randn, shapes)
    results = []
    for kind in (torch.float64, torch.float32):
        leaves = [t.to(kind).requires_grad_() for t in inputs]
        out = F.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dout.to(kind))))
    leaves = [t.chunk(world, 2)[rank].clone().requires_grad_() for t in inputs]
    out = context_parallel_attention(*leaves, mesh_of(world), causal=causal)
    found = (out.detach(), *torch.autograd.grad(out, leaves, dout.chunk(world, 2)[rank]))
    for ours, exact, eager in zip(found, *results, strict=True):
        exact, eager = (t.chunk(world, 2)[rank] for t in (exact, eager))
        assert_fair(ours, exact, eager)


@check(schedule=["gpipe", "1f1b"])
def pipelined(schedule):
    """The gradients of a stage are the model's, under the model's names."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, (tokens, targets) = model_of("llama", n_layers=5), batch(8)
    stage = pipeline_stage(copy.deepcopy(model), rank, world)
    kind = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[schedule]
    run = kind(stage, n_microbatches=4, loss_fn=stage.submod.loss)
    losses = []
    if rank == 0:
        run.step(tokens)
    elif rank == world - 1:
        hidden = run.step(target=targets, losses=losses)
        logits = stage.submod.logits(hidden)
        torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-5)
    else:
        run.step()
    (loss64, exact), (eager_loss, eager) = expected(model, tokens, targets)
    if losses:
        assert_like_eager(torch.stack(losses).mean()[None], loss64[None], eager_loss[None])
    found = gradients(stage.submod)
    assert found and set(found) <= set(exact)
    for name, gradient in found.items():
        assert_like_eager(gradient, exact[name], eager[name])
    held = [None] * world
    dist.all_gather_object(held, list(stage.submod.state_dict()))
    assert sorted(sum(held, [])) == sorted(model.state_dict())


@check(worlds=(2,))
def stages_that_cannot_be_are_refused():
    tied, untied = model_of("gpt"), model_of("llama")
    for model, index, count, message in (
        (tied, 0, 2, "build it with tied=False"),
        (untied, 0, 3, "count must be from 1 to the model's 2 blocks, got 3"),
        (untied, 2, 2, r"index must be in \[0, 2\), got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline_stage(model, index, count)


@check(worlds=(2,), sequence=[False, True])
def dropout_is_in_step_and_apart(sequence):
    """What all ranks hold is dropped alike; what each has of its own by masks of its own."""
    mesh, model = mesh_of(2), model_of("llama", dropout=0.5)
    parallelize_module(model, mesh, tensor_parallel_plan(model, sequence_parallel=sequence))
    tokens, targets = batch()
    heads, streams = [], []
    block = model.blocks[0]
    block.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].detach()))
    inner = block.attention.branch
    drawn = inner.register_forward_pre_hook(lambda *_: heads.append(torch.rand(4)))
    torch.manual_seed(11)
    losses = [model(tokens, targets) for _ in range(2)]
    sum(losses).backward()
    assert losses[0] != losses[1]
    for ours, alike in (
        (torch.rand(4), True),
        (heads[0], False),
        (streams[0] == 0, not sequence),
        (torch.stack(losses).detach(), True),
    ):
        theirs = [torch.empty_like(ours) for _ in range(2)]
        dist.all_gather(theirs, ours)
        assert torch.equal(*theirs) == alike
    drawn.remove()
    model.eval()
    before = torch.get_rng_state()
    model(tokens)
    assert torch.equal(torch.get_rng_state(), before)


@check(worlds=(4,), style=["llama", "gpt"])
def checkpoints_fit_any_number_of_ranks(style, folder):
    """Saved by four, in two dimensions; loaded by two, and by one for itself."""
    mesh, rank, path = mesh_of(2, 2), dist.get_rank(), folder / f"checkpoint-{style}"
    saved = model_of(style)
    parallelize_module(saved, mesh["tp"], tensor_parallel_plan(saved))
    saved = sharded(saved, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(saved.parameters(), lr=1e-2)
    saved(*mine(*batch(), mesh["dp"])).backward()
    optimizer.step()
    save_checkpoint(path, saved, optimizer)
    exact = [whole(p) for p in saved.parameters()]
    moments = [whole(optimizer.state[p]["exp_avg"]) for p in saved.parameters()]
    assert not [file for file in path.iterdir() if file.suffix != ".safetensors"]

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = DeviceMesh.from_group(pairs[rank // 2], "cpu")
    torch.manual_seed(rank)
    loaded = build_lm(LMConfig(**SIZES | STYLES[style]))
    options = {"group": pair.get_group()}
    if rank in (0, 1):
        sharded(loaded, mesh=pair)
    elif style == "llama":
        torch.manual_seed(0)
        parallelize_module(loaded, pair, tensor_parallel_plan(loaded))
    else:
        options = {}
    again = torch.optim.AdamW(loaded.parameters(), lr=1e-2)
    load_checkpoint(path, loaded, again, **options)
    for ours, value, moment in zip(loaded.parameters(), exact, moments, strict=True):
        assert torch.equal(whole(ours), value)
        assert torch.equal(whole(again.state[ours]["exp_avg"]), moment)
        assert again.state[ours]["step"] == 1
    dist.barrier()
    with pytest.raises(CheckpointException, match="Missing key in checkpoint.*blocks.2"):
        load_checkpoint(path, model_of(style, n_layers=3))


@check(worlds=(2,))
def a_tensor_parallel_model_generates():
    """Greedily, over a cache of each rank's heads."""
    model = model_of("llama")
    prompts, _ = batch(length=3)
    wanted = model.generate(prompts, 4)
    parallelize_module(model, mesh_of(2), tensor_parallel_plan(model))
    found = model.generate(prompts, 4)
    assert all(map(torch.equal, found, wanted))
    split = model_of("llama")
    parallelize_module(split, mesh_of(2), tensor_parallel_plan(split, sequence_parallel=True))
    with pytest.raises(NotImplementedError, match="whole sequences, got .* sequence_parallel"):
        split.generate(prompts, 4)


@check(worlds=(2,))
def what_cannot_be_split_is_refused():
    """By name, before anything is changed."""
    deep = model_of("llama", stochastic_depth=0.5)
    tensor_parallel_plan(deep)
    with pytest.raises(NotImplementedError, match="StochasticDepth"):
        tensor_parallel_plan(deep, sequence_parallel=True)
    with pytest.raises(NotImplementedError, match="StochasticDepth"):
        context_parallel(deep, mesh_of(2))
    sloped = model_of("llama", position="alibi", n_kv_heads=8)
    with pytest.raises(NotImplementedError, match="blocks.0.attention.branch.position .* Alibi"):
        tensor_parallel_plan(sloped)
    with pytest.raises(NotImplementedError, match="position must not be Alibi"):
        context_parallel(sloped, mesh_of(2))
    strange = model_of("llama")
    strange.blocks[1].mlp.branch.up = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(NotImplementedError, match="blocks.1.mlp.branch.up must be .*got Bilinear"):
        tensor_parallel_plan(strange)
    whole_rows = model_of("llama")
    parallelize_module(
        whole_rows, mesh_of(2), tensor_parallel_plan(whole_rows, sequence_parallel=True)
    )
    with pytest.raises(ValueError, match="T divisible by the 2 ranks of the mesh, got"):
        whole_rows(*batch(length=5))
    logits = distribute_tensor(torch.zeros(3, 1), mesh_of(2), [Shard(1)])
    with pytest.raises(ValueError, match="each of 2 ranks must have a class, got 1 classes"):
        vocab_parallel_cross_entropy(logits, torch.zeros(3, dtype=torch.long))


@check(worlds=(2,))
def nothing_is_dropped_of_spread_sequences_in_evaluation():
    model, mesh = model_of("llama", dropout=0.5).eval(), mesh_of(2)
    tokens, _ = batch()
    wanted = model(tokens)
    context_parallel(model, mesh)
    found = model(tokens=tokens.chunk(2, 1)[dist.get_rank()])
    torch.testing.assert_close(found, wanted.chunk(2, 1)[dist.get_rank()])


@check(worlds=(2,))
def stages_recompute_what_the_model_would():
    stage, calls = Stage(model_of("llama", checkpoint_activations=True), 0, 2), []
    stage.blocks["0"].register_forward_pre_hook(lambda *_: calls.append(0))
    stage(batch()[0]).sum().backward()
    assert len(calls) == 2


@check(worlds=(2,))
def a_frozen_head_stays_frozen():
    model = model_of("llama")
    model.head.requires_grad_(False)
    parallelize_module(model, mesh_of(2), tensor_parallel_plan(model))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]
