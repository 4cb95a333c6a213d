"""What an op costs beside its kernels, of every registered op's samples.

Its launchers follow plans, the host waits for nothing, what is not saved is freed, and of a
gradient that nobody wants there is no work.
"""

import gc

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from perf.meters.aten import syncs
from perf.meters.live import live_bytes
from tests.support.devices import DEVICE, INTERPRETING
from tests.support.launches import import_kernels
from trilith.kernels._runtime import plan
from trilith.kernels._runtime.launch import observers
from trilith.plugins import registry
from trilith.plugins.autograd import asked_of_backward
from trilith.plugins.conformance import backward_arguments, covering, floating, samples_of

pytestmark = pytest.mark.skipif(not (INTERPRETING or DEVICE == "cuda"), reason="needs Triton")

import_kernels()

DEVICE = torch.device(DEVICE)
NAMES = [name for name in registry.op_names() if name.startswith("trilith::")]
every_op = pytest.mark.parametrize("name", NAMES)

READS_LABELS = "the labels of CPU tensors are checked, which is a number read"
# (op, direction) -> why no plan is followed.
UNPLANNED = {
    ("cross_entropy", "forward"): READS_LABELS,
    ("linear_cross_entropy", "forward"): "products of thousands of classes outlast the host",
    ("linear_cross_entropy", "backward"): "scales what forward made, if at all",
}
if DEVICE.type == "cuda":
    del UNPLANNED["cross_entropy", "forward"]
# op -> operators that make the host wait.
WAITS = {"cross_entropy": READS_LABELS, "linear_cross_entropy": READS_LABELS}
# op -> inputs whose gradients one kernel makes together: without one of them it runs as before.
TOGETHER = {
    "attention": (("q", "slopes"), ("k", "v")),
    "attention_qkvpacked": (("qkv", "slopes"),),
    "varlen_attention": (("q", "slopes"), ("k", "v")),
    "batch_norm": (("x", "weight", "bias"),),  # x's is made of the others
    "batch_norm_given": (("weight", "bias"),),
    "cross_entropy": (("x", "weight"),),
    "merge_attention": (("outs", "lses"),),
    "rotary": (("x", "cos", "sin"),),
    "rotary_qkvpacked": (("qkv", "cos", "sin"),),
}


def calls_of(name):
    """The op, and arguments of which its samples together give every tensor."""
    op = registry.op(name)
    samples = covering(op, samples_of(op, DEVICE, torch.float32))
    return op, [op.parameters.bind(sample.args, sample.kwargs) for sample in samples]


def short(name):
    return name.removeprefix("trilith::")


def with_grad(op, args):
    wanted = floating(args) if op.spec.backward else ()
    return [a.detach().requires_grad_() if i in wanted else a for i, a in enumerate(args)]


def pull(op, leaves, out, *, empty=False):
    """Gradients from the outputs that have elements; also from `empty` ones, as compiled code."""
    outputs = [out] if isinstance(out, Tensor) else out
    used = [o for o in outputs if o.requires_grad and (empty or o.numel())]
    inputs = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
    if used:
        torch.autograd.grad(used, inputs, [torch.ones_like(o) for o in used], allow_unused=True)


@pytest.mark.parametrize("empty", [False, True])
@every_op
def test_the_third_call_follows_a_plan(name, empty, monkeypatch):
    followed, follow = [], plan._run
    monkeypatch.setattr(plan, "_run", lambda *args: followed.append(args) or follow(*args))
    op, calls = calls_of(name)
    for args in calls:
        for _ in range(3):
            found = []
            leaves = with_grad(op, args)
            for direction in ("forward", "backward"):
                followed.clear()
                if direction == "forward":
                    out = op(*leaves)
                else:
                    pull(op, leaves, out, empty=empty)
                found.append(bool(followed))
        expected = [
            (short(name), "forward") not in UNPLANNED,
            op.spec.backward is not None and (short(name), "backward") not in UNPLANNED,
        ]
        assert found == expected


@every_op
def test_the_host_waits_for_nothing(name):
    op, calls = calls_of(name)
    for args in calls:
        leaves = with_grad(op, args)
        with syncs() as waits:
            pull(op, leaves, op(*leaves))
        assert bool(waits) == (short(name) in WAITS), waits


@every_op
def test_nothing_is_kept_beside_what_is_saved(name):
    op, calls = calls_of(name)
    if op.spec.backward is None:
        return
    for args in calls:
        packed = {}

        def pack(tensor, packed=packed):
            packed[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        leaves = with_grad(op, args)
        with live_bytes() as live:
            given = [a.clone() if isinstance(a, Tensor) else a for a in leaves]
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = op(*given)
            node = (out if isinstance(out, Tensor) else out[0]).grad_fn
            del given, out
            gc.collect()  # the interpreter leaves cycles
            assert node is not None
            assert live.now == sum(packed.values())


@every_op
def test_there_is_no_work_for_gradients_that_nobody_wants(name):
    op = registry.op(name)
    if op.spec.backward is None:
        return
    names = op.parameters.names
    with FakeTensorMode():
        for sample in samples_of(op, DEVICE, torch.float32):
            args = op.parameters.bind(sample.args, sample.kwargs)
            inputs = floating(args)
            all_made, all_launches, sources = work(op, args, inputs)
            for left_out in groups(op, args, sources):
                made, launches, _ = work(op, args, [i for i in inputs if i not in left_out])
                own = sum(args[i].nbytes for i in left_out if names[i] not in sources)
                what = f"{sample}, without {', '.join(names[i] for i in left_out)}"
                assert launches <= all_launches, what
                assert made <= all_made - own, what


def groups(op, args, sources):
    """The inputs one by one, those together whose gradients are made together."""
    together = [*TOGETHER.get(short(op.spec.name), ())]
    together += [pair for pair in sources.items() if isinstance(pair[1], str)]
    found = {}
    for i in floating(args):
        name = op.parameters.names[i]
        found.setdefault(next((pair for pair in together if name in pair), name), []).append(i)
    return list(found.values())


def work(op, args, wanted):
    """Bytes allocated, and kernels launched, where the gradients at these positions are wanted; and
    which inputs' gradients are others'."""
    launched = []

    def observe(*launch):
        launched.append(launch)

    needs = [i in wanted for i in range(len(args))]
    asked_in_forward = (needs,) if op.parameters.asks_needs else ()
    observers.append(observe)
    try:
        with live_bytes() as live:
            results = op.torch_ops.run_forward(*args, op.spec.provider, *asked_in_forward)
            outputs = results[: op.spec.outputs]
            grads = [torch.empty_like(o) if o.is_floating_point() else None for o in outputs]
            *call, _ = backward_arguments(op, args, op.spec.provider, results, grads)
            inputs = call[len(grads) : len(grads) + len(args)]
            sources = op.spec.shared_gradients(*inputs) if op.spec.shared_gradients else {}
            asked = asked_of_backward(op, needs, sources)
            if any(asked):
                op.torch_ops.run_backward(*call, asked)
    finally:
        observers.remove(observe)
    return live.made, len(launched), sources
