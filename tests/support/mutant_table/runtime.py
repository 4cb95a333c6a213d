"""Faults of what all kernels share: rows, reductions, plans, launches, devices, checks."""

from __future__ import annotations

from tests.support.mutants import Mutant

_NORM_TESTS = "tests/kernels/test_norms.py"
_CONFORMANCE = "tests/plugins/test_conformance.py"
_SHARDING_TESTS = "tests/plugins/test_sharding.py"

RUNTIME = (
    Mutant(
        "whole_bias_on_split_columns",
        "trilith.kernels._runtime.sharding",
        "0 if dim == last else None",
        "None",
        _SHARDING_TESTS + " -k 'reference and activations'",
    ),
    Mutant(
        "second_of_two_row_sums_of_one_column",
        "trilith.kernels._runtime.rows",
        "return a + more_a, b + more_b",
        "return a + more_a, b",
        _NORM_TESTS,
    ),
    Mutant(
        "partial_sums_of_the_last_programs_lost",
        "trilith.kernels._runtime.reduce",
        "rows[:, None] < P",
        "rows[:, None] < P - 1",
        "tests/kernels/test_reduce.py " + _NORM_TESTS,
    ),
    Mutant(
        "offsets_of_32_bits",
        "trilith.kernels._runtime.rows",
        "rows = rows.to(tl.int64)",
        "rows = rows.to(tl.int32)",
        _CONFORMANCE + " -k layer_norm-fp32-offsets_beyond",
    ),
    Mutant(
        "inner_rows_numbered_by_the_outer_stride",
        "trilith.kernels._runtime.rows",
        "(rows - outer * inner) * strides[1]",
        "(rows - outer * inner) * strides[0]",
        _NORM_TESTS + " -k any_strides",
    ),
    Mutant(
        "input_gradient_of_the_last_weight_alone",
        "trilith.kernels._runtime.matrix",
        "torch.addmm(as_matrix(total), as_matrix(dy), weight)",
        "torch.mm(as_matrix(dy), weight)",
        "tests/kernels/test_norm_linear.py -k 'eager and fp32'",
    ),
    Mutant(
        "launch_of_an_empty_grid",
        "trilith.kernels._runtime.launch",
        "if 0 in grid:",
        "if False:",
        "tests/kernels/test_launch.py",
    ),
    Mutant(
        "launch_on_the_current_device",
        "trilith.kernels._runtime.launch",
        "first.device.index != torch.cuda.current_device()",
        "first.device.index is None",
        "tests/kernels/test_launch.py",
    ),
    Mutant(
        "architecture_of_another_generation",
        "trilith.kernels._runtime.device",
        '{8: "sm_80", 9: "sm_90"}.get(major,',
        '{8: "sm_80"}.get(major,',
        "tests/kernels/test_launch.py",
    ),
    Mutant(
        "keys_of_triton_by_what_ran_before",
        "trilith.kernels._runtime.keys",
        "for name in function.fn.__code__.co_names:",
        "for name in ():",
        "tests/kernels/test_keys.py",
    ),
    Mutant(
        "tiles_of_large_shared_memory_on_cards_with_99_kib",
        "trilith.kernels._runtime.device",
        "(major, minor) in ((8, 6), (8, 9))",
        "(major, minor) == (8, 6)",
        "tests/kernels/test_launch.py",
    ),
    Mutant(
        "tensors_of_another_device_let_through",
        "trilith.kernels._runtime.checks",
        "tensor.device != lead.device",
        "tensor.device is None",
        "tests/kernels -k 'error or wrong'",
    ),
    Mutant(
        "plan_followed_for_other_strides",
        "trilith.kernels._runtime.plan",
        "kind += (arg.shape, arg.stride(), arg.dtype, address % _ALIGNED == 0)",
        "kind += (arg.shape, arg.dtype, address % _ALIGNED == 0)",
        "tests/kernels/test_plan.py -k another_kind",
    ),
    Mutant(
        "plan_frees_what_it_returns",
        "trilith.kernels._runtime.plan",
        "read = returned | set(range(self._given))",
        "read = set(range(self._given))",
        "tests/kernels/test_plan.py",
    ),
    Mutant(
        "a_wide_residual_is_added_in_float32",
        "trilith.kernels._runtime.lead",
        "x.double() if dtype == torch.float64 else x",
        "x",
        "tests/kernels/test_arguments.py -k float64_residual",
    ),
    Mutant(
        "a_plan_is_followed_under_autocast",
        "trilith.kernels._runtime.plan",
        "here.recorder is not None or is_any_autocast_enabled()",
        "here.recorder is not None",
        "tests/kernels/test_plan.py -k autocast",
    ),
    Mutant(
        "last_tile_left_out",
        "trilith.kernels._runtime.sizes",
        "return -(-a // b)",
        "return max(1, a // b)",
        "tests/kernels/test_activations.py -k adds_the_bias",
    ),
    Mutant(
        "packed_lengths_read_by_the_host",
        "trilith.kernels.attention.varlen",
        "q, k, v = map(_as_batch, (q, k, v))",
        "q, k, v, _ = *map(_as_batch, (q, k, v)), cu_q.tolist()",
        "tests/perf/test_every_op.py -k 'waits and varlen'",
    ),
)
