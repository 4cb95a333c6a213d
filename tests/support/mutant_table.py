"""The faults that the suite must notice: each a mistake that libraries of this kind have made."""

from __future__ import annotations

from tests.support.mutants import Mutant

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
_ATTENTION_TESTS = "tests/kernels/test_attention.py"

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
        _NORM_TESTS,
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
        _NORM_TESTS,
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
        _ACT_TESTS,
    ),
    Mutant(
        "gate_read_with_the_strides_of_up",
        _ACT,
        "gate = tl.load(gate_ptr + offsets(rows, cols, inner, gate_strides, ALIGN)",
        "gate = tl.load(gate_ptr + offsets(rows, cols, inner, up_strides, ALIGN)",
        _ACT_TESTS,
    ),
    Mutant(
        "dropout_not_rescaled",
        "trilith.kernels._runtime.elementwise",
        "return tl.where(keep, value * scale, 0.0)",
        "return tl.where(keep, value, 0.0)",
        _DROPOUT_TESTS,
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
        _DROPOUT_TESTS,
    ),
    Mutant(
        "cross_entropy_gradient_cancels_at_the_label",
        _CE,
        "missing[:, None] + p * spread[:, None], dx)",
        "(p - 1.0) * weight[:, None] + p * spread[:, None], dx)",
        _CE_TESTS,
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
        _CE_TESTS,
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
        _CE_TESTS,
    ),
    Mutant(
        "rotary_backward_turns_the_same_way",
        "trilith.kernels.rotary",
        "sin = -sin",
        "sin = sin",
        "tests/kernels/test_rotary.py",
    ),
    Mutant(
        "rotary_pairs_swapped",
        "trilith.kernels.rotary",
        "y1 = (x1 * cos - x2 * sin)",
        "y1 = (x1 * cos + x2 * sin)",
        "tests/kernels/test_rotary.py",
    ),
    Mutant(
        "attention_causal_off_by_one",
        _ATTENTION_TILES,
        "cols <= rows + high",
        "cols < rows + high",
        _ATTENTION_TESTS,
    ),
)
