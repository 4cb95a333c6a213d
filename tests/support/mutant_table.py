"""The faults that the suite must notice: each a mistake that libraries of this kind have made."""

from __future__ import annotations

from tests.support.mutants import Mutant
from tests.support.rounding_mutants import ROUNDING

_NORMS = "trilith.kernels._norm_kernels"
_NORM_TESTS = "tests/kernels/test_norms.py"
_CE = "trilith.kernels._cross_entropy_kernels"
_CE_TESTS = "tests/kernels/test_cross_entropy.py"
_ACT = "trilith.kernels.activations"
_FUNCTORS = "trilith.kernels._runtime.functors"
_ACT_TESTS = "tests/kernels/test_activations.py"
_DROPOUT = "trilith.kernels.dropout"
_DROPOUT_TESTS = "tests/kernels/test_dropout.py"
_ATTENTION_TILES = "trilith.kernels.attention.tiles"
_ATTENTION_FORWARD = "trilith.kernels.attention.forward"
_ATTENTION_BACKWARD = "trilith.kernels.attention.backward"
_ATTENTION_QUERIES = "trilith.kernels.attention.backward_queries"
_ATTENTION_TESTS = "tests/kernels/test_attention.py"
_MERGE = "trilith.kernels.attention.merge"
_MERGE_TESTS = "tests/kernels/test_merge_attention.py"
_ROTARY = "trilith.kernels.rotary"
_OP = "trilith.plugins.op"
_OP_TESTS = "tests/plugins/test_op.py"
_CONFORMANCE = "tests/plugins/test_conformance.py"

MUTANTS = (
    Mutant(
        "variance_over_n_minus_1",
        _NORMS,
        "tl.sum(x * x, axis=1) / N +",
        "tl.sum(x * x, axis=1) / (N - 1) +",
        _NORM_TESTS,
    ),
    Mutant(
        "eps_outside_the_root",
        _NORMS,
        "1.0 / tl.sqrt(tl.sum(x * x, axis=1) / N + tl.cast(eps, tl.float32))",
        "1.0 / (tl.sqrt(tl.sum(x * x, axis=1) / N) + tl.cast(eps, tl.float32))",
        _NORM_TESTS + " -k eps",
    ),
    Mutant(
        "padded_lanes_in_the_variance",
        _NORMS,
        "x = tl.where(mask, x - mean[:, None], 0.0)",
        "x = x - mean[:, None]",
        _NORM_TESTS,
    ),
    Mutant(
        "mean_of_g_left_out",
        _NORMS,
        "mean_g = tl.sum(g, axis=1, keep_dims=True) / N",
        "mean_g = 0.0 * tl.sum(g, axis=1, keep_dims=True)",
        _NORM_TESTS,
    ),
    Mutant(
        "norm_weight_gradient_from_the_first_rows_only",
        _NORMS,
        "dweight += dy * x_hat",
        "dweight += tl.where(start == pid * BLOCK_M, dy * x_hat, 0.0)",
        _NORM_TESTS + " -k several_tiles",
    ),
    Mutant(
        "norm_last_column_dropped",
        _NORMS,
        "mask = (rows < M)[:, None] & (cols < N)[None, :]",
        "mask = (rows < M)[:, None] & (cols < N - 1)[None, :]",
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
        "tanh_for_erf_gelu",
        _FUNCTORS,
        '"gelu": Activation(_gelu, _gelu_grad, F.gelu)',
        '"gelu": Activation(_gelu_tanh, _gelu_tanh_grad, F.gelu)',
        _ACT_TESTS,
    ),
    Mutant(
        "silu_gradient_without_its_second_term",
        _FUNCTORS,
        "return g * (s + z * (s * c))",
        "return g * s",
        _ACT_TESTS,
    ),
    Mutant(
        "bias_gradient_of_padded_rows",
        _ACT,
        "dbias += tl.where(mask, dx, 0.0)",
        "dbias += dx + tl.where(mask, 0.0, 1.0)",
        _ACT_TESTS,
    ),
    Mutant(
        "gate_and_up_gradients_swapped",
        _ACT,
        "dup = dy * ACT(gate)",
        "dup = dy * gate",
        _ACT_TESTS + " -k gated_act",
    ),
    Mutant(
        "gate_read_with_the_strides_of_up",
        _ACT,
        "gate_strides, ALIGN), mask=mask, other=0.0)\n    up =",
        "up_strides, ALIGN), mask=mask, other=0.0)\n    up =",
        _ACT_TESTS + " -k gate_and_up",
    ),
    Mutant(
        "dropout_not_rescaled",
        "trilith.kernels._runtime.elementwise",
        "return tl.where(keep, value * scale, 0.0)",
        "return tl.where(keep, value, 0.0)",
        _DROPOUT_TESTS + " -k divided",
    ),
    Mutant(
        "dropout_mask_of_the_tile_not_the_position",
        "trilith.kernels._runtime.elementwise",
        "lanes = first_col // 4 + tl.arange(0, quads)",
        "lanes = first_col * 0 + tl.arange(0, quads)",
        _DROPOUT_TESTS,
    ),
    Mutant(
        "dropout_backward_mask_differs",
        _DROPOUT,
        "dx = drop(dx, seed_ptr, rows, first_col, N, p, scale)",
        "dx = drop(dx, seed_ptr, rows + 1, first_col, N, p, scale)",
        _DROPOUT_TESTS + " -k bias_dropout_add",
    ),
    Mutant(
        "cross_entropy_gradient_cancels_at_the_label",
        _CE,
        "missing[:, None] + p * spread[:, None], dx)",
        "(p - 1.0) * weight[:, None] + p * spread[:, None], dx)",
        _CE_TESTS + " -k confident",
    ),
    Mutant(
        "cross_entropy_ignores_the_upstream_gradient",
        _CE,
        "tl.where(mask, dx * dloss[:, None],",
        "tl.where(mask, dx,",
        _CE_TESTS,
    ),
    Mutant(
        "mean_over_all_rows_instead_of_valid_ones",
        "trilith.kernels.cross_entropy",
        "counted = target != ignore_index",
        "counted = target == target",
        _CE_TESTS + " -k mean",
    ),
    Mutant(
        "label_smoothing_over_all_but_one_class",
        _CE,
        "share = tl.cast(label_smoothing, tl.float32) / N",
        "share = tl.cast(label_smoothing, tl.float32) / (N - 1)",
        _CE_TESTS,
    ),
    Mutant(
        "softcap_without_its_slope",
        _CE,
        "dx *= cap_slope(x, softcap)",
        "dx *= 1.0",
        _CE_TESTS + " -k 'fp32 and softcap'",
    ),
    Mutant(
        "rotary_backward_turns_the_same_way",
        _ROTARY,
        "sin = -sin",
        "sin = sin",
        "tests/kernels/test_rotary.py",
    ),
    Mutant(
        "rotary_pairs_swapped",
        _ROTARY,
        "y1 = (x1 * cos - x2 * sin)",
        "y1 = (x1 * cos + x2 * sin)",
        "tests/kernels/test_rotary.py",
    ),
    Mutant(
        "attention_causal_off_by_one",
        _ATTENTION_TILES,
        "cols <= rows + high",
        "cols < rows + high",
        _ATTENTION_TESTS + " -k test_lengths",
    ),
    Mutant(
        "norm_last_row_unwritten",
        _NORMS,
        "tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)",
        "mask = mask & (rows < M - 1)[:, None]\n"
        "    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)",
        _NORM_TESTS,
    ),
    Mutant(
        "norm_strided_columns_read_as_dense",
        _NORMS,
        "x_offsets = row_offsets(rows, inner, x_strides)[:, None] + (cols * x_strides[2])[None, :]",
        "x_offsets = row_offsets(rows, inner, x_strides)[:, None] + cols[None, :]",
        _NORM_TESTS + " -k any_strides",
    ),
    Mutant(
        "norm_gradient_written_over_the_input",
        _NORMS,
        "dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None",
        "dx = x if needs[0] else None",
        _CONFORMANCE + " -k layer_norm-fp32-nothing_is_written_to",
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
        "cross_entropy_gradient_rounded_before_subtracting_1",
        _CE,
        "missing = weight * expm1(chosen - peak - log_sum)",
        "rounded = tl.exp(chosen - peak - log_sum).to(dx_ptr.dtype.element_ty)\n"
        "    missing = weight * (rounded.to(tl.float32) - 1.0)",
        _CE_TESTS + " -k confident_rows",
    ),
    Mutant(
        "cross_entropy_gradient_of_ignored_rows",
        _CE,
        "mask = live[:, None] & (cols < N)[None, :]\n    x_rows",
        "mask = (rows < M)[:, None] & (cols < N)[None, :]\n    x_rows",
        _CE_TESTS + " -k ignored",
    ),
    Mutant(
        "cross_entropy_gradient_written_over_the_logits",
        "trilith.kernels.cross_entropy",
        "dx = x.new_empty(x.shape)",
        "dx = x",
        _CONFORMANCE + " -k cross_entropy-fp32-nothing_is_written_to",
    ),
    Mutant(
        "attention_padded_keys_scored_0",
        _ATTENTION_TILES,
        'x = tl.where(meets, x, -float("inf"))',
        'x = tl.where(meets | (cols >= S), x, -float("inf"))',
        _ATTENTION_TESTS + " -k test_lengths",
    ),
    Mutant(
        "attention_scale_of_the_padded_head_dim",
        "trilith.kernels.attention.functions",
        "1 / math.sqrt(max(1, q.shape[3]))",
        "1 / math.sqrt(1 << (q.shape[3] - 1).bit_length())",
        _ATTENTION_TESTS + " -k default_scale",
    ),
    Mutant(
        "drop_in_scale_of_the_padded_head_dim",
        "trilith.kernels.attention.functions",
        "1 / math.sqrt(query.shape[-1])",
        "1 / math.sqrt(1 << (query.shape[-1] - 1).bit_length())",
        _ATTENTION_TESTS + " -k default_scale",
    ),
    Mutant(
        "attention_backward_mask_differs",
        _ATTENTION_BACKWARD,
        "band = (low, high, diagonal)",
        "band = (low, high + 1, diagonal)",
        _ATTENTION_TESTS + " -k test_bands",
    ),
    Mutant(
        "attention_delta_left_out",
        _ATTENTION_BACKWARD,
        "delta = tl.sum(",
        "delta = 0.0 * tl.sum(",
        _ATTENTION_TESTS + " -k test_lengths",
    ),
    Mutant(
        "attention_gradient_of_lse_ignored",
        _ATTENTION_BACKWARD,
        "delta -= tl.load(",
        "delta -= 0.0 * tl.load(",
        _ATTENTION_TESTS + " -k lse",
    ),
    Mutant(
        "attention_dk_without_the_scale",
        _ATTENTION_BACKWARD,
        "dk * scalars[0]",
        "dk",
        _ATTENTION_TESTS + " -k test_lengths",
    ),
    Mutant(
        "attention_dk_of_the_first_head_of_a_group",
        _ATTENTION_BACKWARD,
        "for i in range(tiles * G):",
        "for i in range(tiles):",
        _ATTENTION_TESTS + " -k grouped",
    ),
    Mutant(
        "attention_dropout_of_backward_elsewhere",
        _ATTENTION_BACKWARD,
        "offs_m, start_n, sizes[1], scalars[2]",
        "offs_m + 1, start_n, sizes[1], scalars[2]",
        _ATTENTION_TESTS + " -k dropout",
    ),
    Mutant(
        "attention_dq_dropout_elsewhere",
        _ATTENTION_QUERIES,
        "offs_m, start_n, sizes[1], scalars[2]",
        "offs_m + 1, start_n, sizes[1], scalars[2]",
        _ATTENTION_TESTS + " -k dropout",
    ),
    Mutant(
        "attention_lse_in_base_2",
        _ATTENTION_FORWARD,
        "* LN2",
        "* 1.0",
        _ATTENTION_TESTS + " -k 'test_lengths or lse'",
    ),
    Mutant(
        "attention_output_not_rescaled_to_the_new_maximum",
        _ATTENTION_FORWARD,
        "acc * shrink[:, None]",
        "acc",
        _ATTENTION_TESTS + " -k test_lengths",
    ),
    Mutant(
        "attention_sink_not_counted",
        _ATTENTION_FORWARD,
        'tl.where(sink == -float("inf"), 0.0, 1.0)',
        "0.0",
        _ATTENTION_TESTS + " -k sink",
    ),
    Mutant(
        "attention_bias_gradient_of_the_last_sharer",
        _ATTENTION_QUERIES,
        "dbias += ds",
        "dbias = ds",
        _ATTENTION_TESTS + " -k bias",
    ),
    Mutant(
        "attention_gradient_without_the_caps_slope",
        _ATTENTION_BACKWARD,
        "ds = p * (dp - delta[None, :]) * slope_of_cap",
        "ds = p * (dp - delta[None, :])",
        _ATTENTION_TESTS + " -k softcap",
    ),
    Mutant(
        "attention_alignment_lost_by_alibi",
        _ATTENTION_TILES,
        "tl.abs(rows + diagonal - cols)",
        "tl.abs(rows - cols)",
        _ATTENTION_TESTS + " -k slopes",
    ),
    Mutant(
        "merged_lse_left_out_of_the_gradient",
        _MERGE,
        "dots = tl.sum(dout * out, 1) - delta + dlse",
        "dots = tl.sum(dout * out, 1) - delta",
        _MERGE_TESTS + " -k match",
    ),
    Mutant(
        "merged_output_of_a_part_that_saw_nothing",
        _MERGE,
        'seen = mask & (lse != -float("inf"))',
        "seen = mask",
        _MERGE_TESTS + " -k saw",
    ),
    Mutant(
        "double_backward_takes_the_kernels_gradient",
        _OP,
        "if torch.is_grad_enabled() and not torch.compiler.is_compiling():",
        "if False:",
        _OP_TESTS,
    ),
    Mutant(
        "needed_gradients_shifted_by_one",
        _OP,
        "needs = ctx.needs_input_grad[1:]",
        "needs = (*ctx.needs_input_grad[2:], False)",
        _OP_TESTS,
    ),
    Mutant(
        "saved_tensors_in_another_order",
        _OP,
        "for i, value in zip(saved, kept, strict=False):",
        "for i, value in zip(saved[::-1], kept, strict=False):",
        _CONFORMANCE + " -k gated_act-fp32-gradients",
    ),
    Mutant(
        "autocast_reaches_the_kernels",
        _OP,
        'if self.spec.autocast == "low":',
        "if True:",
        _OP_TESTS + " -k TestAutocast",
    ),
    Mutant(
        "dropout_lanes_of_a_quad_swapped",
        "trilith.kernels._runtime.random",
        "lanes = tl.join(even, odd)",
        "lanes = tl.join(odd, even)",
        _DROPOUT_TESTS + " -k position_alone",
    ),
    Mutant(
        "dropout_positions_of_32_bits",
        "trilith.kernels._runtime.random",
        "high = (quads >> 32).to(tl.uint32)",
        "high = (quads >> 32).to(tl.uint32) * 0",
        _DROPOUT_TESTS,
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
        "tensors_of_another_device_let_through",
        "trilith.kernels._runtime.checks",
        "tensor.device != lead.device",
        "tensor.device is None",
        "tests/kernels -k 'error or wrong'",
    ),
    Mutant(
        "attention_slope_gradient_of_the_first_batch",
        "trilith.kernels.attention.launchers",
        "dslopes.sum(2).sum_to_size(slopes.shape)",
        "dslopes.sum(2)[: slopes.shape[0]]",
        _ATTENTION_TESTS + " -k slopes",
    ),
    Mutant(
        "attention_sink_gradient_without_its_sign",
        "trilith.kernels.attention.launchers",
        "dsinks = -torch.where",
        "dsinks = torch.where",
        _ATTENTION_TESTS + " -k sink",
    ),
    Mutant(
        "attention_gradient_of_an_unseen_head_dim",
        "trilith.kernels.attention.config",
        "[max(64, block_d, block_dv)]",
        "[max(64, block_d)]",
        "tests/kernels/test_launch.py",
    ),
    Mutant(
        "attention_cost_of_all_pairs",
        "trilith.kernels.attention.op",
        "(2 if right >= 0 else 1)",
        "1",
        "tests/kernels/test_launch.py -k cost",
    ),
    Mutant(
        "attention_reference_alignment",
        "trilith.kernels.attention.reference",
        'return keys - queries if alignment == "bottom_right" else 0',
        "return 0",
        _ATTENTION_TESTS + " -k test_bands",
    ),
    *ROUNDING,
)
