"""Faults of what makes an op of a kernel, and of the blocks."""

from __future__ import annotations

from tests.support.mutants import Mutant

_OP = "trilith.plugins.op"
_AUTOGRAD = "trilith.plugins.autograd"
_OP_TESTS = "tests/plugins/test_op.py"
_BACKWARD_TESTS = "tests/plugins/test_op_backward.py"
_CONFORMANCE = "tests/plugins/test_conformance.py"
_SHARDING_TESTS = "tests/plugins/test_sharding.py"

OPS = (
    Mutant(
        "parts_of_a_gradient_taken_for_the_whole",
        "trilith.plugins.sharding",
        "own = Partial()",
        "own = Replicate()",
        _SHARDING_TESTS + " -k 'reference and norms'",
    ),
    Mutant(
        "autograds_threads_are_in_no_scope",
        _OP,
        "return name if name is not None else selection.scope_of_caller(self)",
        "return name",
        "tests/plugins/test_scopes.py -k autograds_threads",
    ),
    Mutant(
        "cached_text_positions_start_anew",
        "trilith.blocks.generation",
        "position.offsets = self.starts",
        "position.offsets = 0 * self.starts",
        "tests/blocks/test_generation.py -k cached_tokens",
    ),
    Mutant(
        "double_backward_takes_the_kernels_gradient",
        _AUTOGRAD,
        "if is_eager and (torch.is_grad_enabled() or _are_batched(grads)):",
        "if False:",
        _OP_TESTS,
    ),
    Mutant(
        "batched_backwards_take_the_kernel",
        _AUTOGRAD,
        "(torch.is_grad_enabled() or _are_batched(grads))",
        "torch.is_grad_enabled()",
        f"{_BACKWARD_TESTS} -k as_one",
    ),
    Mutant(
        "dual_numbers_take_the_kernel",
        "trilith.plugins.op",
        "if _transforms_are_active() or _forward_mode._current_level >= 0 or _tracing_state():",
        "if _transforms_are_active():",
        f"{_OP_TESTS} -k 'dual or trace'",
    ),
    Mutant(
        "needed_gradients_shifted_by_one",
        _AUTOGRAD,
        "needs = ctx.needs_input_grad[2:]",
        "needs = (*ctx.needs_input_grad[3:], False)",
        _BACKWARD_TESTS,
    ),
    Mutant(
        "saved_tensors_in_another_order",
        _AUTOGRAD,
        "pooled = (None, *constants, *saved)",
        "pooled = (None, *constants, *saved[::-1])",
        _CONFORMANCE + " -k gated_act-fp32-gradients",
    ),
    Mutant(
        "autocast_reaches_the_kernels",
        _OP,
        'if self.spec.autocast != "low":',
        "if False:",
        _OP_TESTS + " -k TestAutocast",
    ),
    Mutant(
        "backward_is_under_its_callers_autocast",
        "trilith.plugins.autograd",
        "if is_any_autocast_enabled():",
        "if False:",
        "tests/plugins/test_op.py -k backward_is_under_none",
    ),
    Mutant(
        "a_negative_bit_is_passed_over",
        "trilith.plugins.library",
        "(tensor.is_neg() or tensor.is_meta)",
        "tensor.is_meta",
        "tests/plugins/test_op.py -k negative_bit",
    ),
    Mutant(
        "meta_tensors_run_kernels",
        "trilith.plugins.library",
        "(tensor.is_neg() or tensor.is_meta)",
        "tensor.is_neg()",
        "tests/plugins/test_op.py -k without_memory",
    ),
)
