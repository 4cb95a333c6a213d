"""Faults of the norms, alone, after a residual sum, before a linear layer, and over a batch."""

from __future__ import annotations

from tests.support.mutants import Mutant

_FORWARD = "trilith.kernels._norm_forward"
_BACKWARD = "trilith.kernels._norm_backward"
_NORM_TESTS = "tests/kernels/test_norms.py"
_CONFORMANCE = "tests/plugins/test_conformance.py"

NORMS = (
    Mutant(
        "variance_over_n_minus_1",
        _FORWARD,
        "tl.sum(x * x, axis=1) / N +",
        "tl.sum(x * x, axis=1) / (N - 1) +",
        _NORM_TESTS,
    ),
    Mutant(
        "eps_outside_the_root",
        _FORWARD,
        "1.0 / tl.sqrt(tl.sum(x * x, axis=1) / N + tl.cast(eps, tl.float32))",
        "1.0 / (tl.sqrt(tl.sum(x * x, axis=1) / N) + tl.cast(eps, tl.float32))",
        _NORM_TESTS + " -k eps",
    ),
    Mutant(
        "padded_lanes_in_the_variance",
        _FORWARD,
        "x = tl.where(mask, x - mean[:, None], 0.0)",
        "x = x - mean[:, None]",
        _NORM_TESTS,
    ),
    Mutant(
        "mean_of_g_left_out",
        _BACKWARD,
        "mean_g = sum_g / N",
        "mean_g = 0.0 * sum_g",
        _NORM_TESTS,
    ),
    Mutant(
        "norm_weight_gradient_of_one_row_a_tile",
        _BACKWARD,
        "tile = tl.sum(tile, axis=0, keep_dims=True)",
        "tile = tl.max(tile, axis=0, keep_dims=True)",
        _NORM_TESTS + " -k several_tiles",
    ),
    Mutant(
        "norm_weight_gradient_from_the_first_rows_only",
        _BACKWARD,
        "dweight += _share(dy * x_hat, SHARES)",
        "dweight += _share(tl.where(start == pid * BLOCK_M, dy * x_hat, 0.0), SHARES)",
        _NORM_TESTS + " -k several_tiles",
    ),
    Mutant(
        "norm_last_column_dropped",
        _FORWARD,
        "mask = (rows < M)[:, None] & (cols < N)[None, :]",
        "mask = (rows < M)[:, None] & (cols < N - 1)[None, :]",
        _NORM_TESTS,
    ),
    Mutant(
        "norm_last_row_unwritten",
        _FORWARD,
        "tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)",
        "mask = mask & (rows < M - 1)[:, None]\n"
        "    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)",
        _NORM_TESTS,
    ),
    Mutant(
        "norm_strided_columns_read_as_dense",
        _FORWARD,
        "x_offsets = row_offsets(rows, inner, x_strides)[:, None] + (cols * x_strides[2])[None, :]",
        "x_offsets = row_offsets(rows, inner, x_strides)[:, None] + cols[None, :]",
        _NORM_TESTS + " -k any_strides",
    ),
    Mutant(
        "norm_gradient_written_over_the_input",
        _BACKWARD,
        "dx = x.new_empty(x.shape) if needs[0] else None",
        "dx = x if needs[0] else None",
        _CONFORMANCE + " -k layer_norm-fp32-nothing_is_written_to",
    ),
    Mutant(
        "sum_left_out_of_the_norms_gradient",
        _BACKWARD,
        "dx += dsum.to(tl.float32)",
        "dx += 0.0 * dsum.to(tl.float32)",
        "tests/kernels/test_add_norm.py -k unused",
    ),
    Mutant(
        "norm_of_a_sum_drops_elsewhere_in_backward",
        _BACKWARD,
        "dx = drop(dx, seed_ptr, rows, first_col, N, p, scale)",
        "dx = drop(dx, seed_ptr, rows + 1, first_col, N, p, scale)",
        "tests/kernels/test_add_norm.py -k 'row_length and fp32'",
    ),
    Mutant(
        "sums_gradient_of_the_wrong_input_is_shared",
        "trilith.kernels.add_norm",
        'return {"x": "residual"} if p == 0.0 and x_dtype is None else {}',
        'return {"x": "residual"}',
        "tests/kernels/test_add_norm.py -k 'row_length and fp32'",
    ),
    Mutant(
        "norm_linear_keeps_what_it_makes_again",
        "trilith.kernels._norm_linear_ops",
        'save_outputs={2: "residual"},',
        "save_outputs=(0, 2),",
        "tests/kernels/test_norm_linear.py -k kept",
    ),
    Mutant(
        "norm_linear_second_weight_takes_the_firsts_gradient",
        "trilith.kernels._norm_linear_ops",
        "parameter_gradients(dys[1], y, needs[5:7])",
        "parameter_gradients(dys[0], y, needs[5:7])",
        "tests/kernels/test_norm_linear.py -k 'eager and fp32'",
    ),
    Mutant(
        "norm_linear_drops_outside_of_training",
        "trilith.kernels.norm_linear",
        "as_lead(x, residual.dtype), p if training else 0.0",
        "as_lead(x, residual.dtype), p",
        "tests/kernels/test_arguments.py -k 'training and norm_linear'",
    ),
    Mutant(
        "norm_made_again_without_its_bias",
        _BACKWARD,
        "bias if more.y is not None else None,",
        "None,",
        "tests/kernels/test_norm_linear.py -k 'eager and fp32'",
    ),
    Mutant(
        "norm_statistics_written_beyond_the_last_row",
        _FORWARD,
        "tl.store(rstd_ptr + rows, rstd, mask=rows < M)",
        "tl.store(rstd_ptr + rows, rstd)",
        _CONFORMANCE + " -k layer_norm-fp32-guard_bands",
    ),
    Mutant(
        "batch_norm_shares_merged_without_their_distance",
        "trilith.kernels._batch_norm_kernels",
        "var = tl.sum(squares + count * apart * apart, axis=0) / R",
        "var = tl.sum(squares, axis=0) / R",
        "tests/kernels/test_batch_norm.py -k float64",
    ),
    Mutant(
        "batch_norm_tiles_merged_without_their_distance",
        "trilith.kernels._batch_norm_kernels",
        "change = tile_mean - mean",
        "change = tile_mean",
        "tests/kernels/test_batch_norm.py -k several_tiles",
    ),
    Mutant(
        "batch_norm_mean_read_past_the_last_channel",
        "trilith.kernels._batch_norm_kernels",
        "mean = tl.load(mean_ptr + cols * vector_strides[0], mask=inside, other=0.0)",
        "mean = tl.load(mean_ptr + cols * vector_strides[0])",
        "tests/plugins/test_conformance.py -k batch_norm-fp32-reads_stay",
    ),
    Mutant(
        "batch_norm_running_variance_biased",
        "trilith.kernels.batch_norm",
        "var.detach() * (count / max(1, count - 1))",
        "var.detach() * 1.0",
        "tests/kernels/test_batch_norm.py -k running",
    ),
)
