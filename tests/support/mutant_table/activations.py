"""Faults of activations, dropout and rotary positions, and of the functions they are made of."""

from __future__ import annotations

from tests.support.mutants import Mutant

_CE_TESTS = "tests/kernels/test_cross_entropy.py"
_ACT = "trilith.kernels._activation_kernels"
_FUNCTORS = "trilith.kernels._runtime.functors"
_ACT_TESTS = "tests/kernels/test_activations.py"
_DROPOUT = "trilith.kernels.dropout"
_DROPOUT_TESTS = "tests/kernels/test_dropout.py"
_LOSS_TESTS = "tests/kernels/test_losses.py"
_ELEMENTARY = "trilith.kernels._runtime.elementary"
_ELEMENTARY_TESTS = "tests/kernels/test_elementary.py"
_ROTARY = "trilith.kernels.rotary"
_QKVPACKED_TESTS = "tests/kernels/test_qkvpacked.py"

ACTIVATIONS = (
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
        "quick_gelu_gradient_without_its_factor",
        _FUNCTORS,
        "s * c * 1.702",
        "s * c",
        _ACT_TESTS,
    ),
    Mutant(
        "relu2_gradient_without_its_two",
        _FUNCTORS,
        "g * (2.0 * z)",
        "g * z",
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
        "return tl.where(keep, value, 0.0) * scale",
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
        "rotary_backward_turns_the_same_way",
        _ROTARY,
        "sin = -sin",
        "sin = sin",
        "tests/kernels/test_rotary.py",
    ),
    Mutant(
        "rotary_pairs_swapped",
        _ROTARY,
        "            x1, x2 = x1.to(tl.float32), x2.to(tl.float32)\n",
        "            x2, x1 = x1.to(tl.float32), x2.to(tl.float32)\n",
        "tests/kernels/test_rotary.py",
    ),
    Mutant(
        "rotary_turns_values_too",
        _ROTARY,
        "        turned,\n        D=d,",
        "        None,\n        D=d,",
        _QKVPACKED_TESTS + " -k rotary",
    ),
    Mutant(
        "rotary_of_packed_heads_turns_its_gradient_on",
        "trilith.kernels.rotary_qkvpacked",
        "heads[1], inverse=True, turned",
        "heads[1], turned",
        _QKVPACKED_TESTS + " -k rotary",
    ),
    Mutant(
        "activation_made_again_without_dropout",
        _ACT,
        "            if seed_ptr is not None:\n                y = drop(",
        "            if y_ptr is None:\n                y = drop(",
        "tests/kernels/test_act_linear.py -k 'bias_act and fp32'",
    ),
    Mutant(
        "act_linear_weight_gradient_of_the_input",
        "trilith.kernels.act_linear",
        "return dx, dbias, *parameter_gradients(dy, hidden, needs[2:4])",
        "return dx, dbias, *parameter_gradients(dy, x, needs[2:4])",
        "tests/kernels/test_act_linear.py -k 'bias_act and fp32'",
    ),
    Mutant(
        "dropout_lanes_of_a_quad_swapped",
        "trilith.kernels._runtime.random",
        "lanes = tl.join(tl.join(a, c), tl.join(b, d))",
        "lanes = tl.join(tl.join(b, d), tl.join(a, c))",
        _DROPOUT_TESTS + " -k position_alone",
    ),
    Mutant(
        "dropout_positions_of_32_bits",
        "trilith.kernels._runtime.random",
        "high = (quads >> 32).to(tl.uint32)",
        "high = (quads >> 32).to(tl.uint32) * 0",
        "tests/kernels/test_random.py",
    ),
    Mutant(
        "log1p_by_the_plain_logarithm",
        _ELEMENTARY,
        "tl.where(x < 0.5, series, tl.log(1.0 + x))",
        "tl.log(1.0 + x)",
        _CE_TESTS + " -k confident",
    ),
    Mutant(
        "softplus_by_the_plain_logarithm",
        _ELEMENTARY,
        "return e * (series * e + 1.0)",
        "return tl.log(1.0 + e)",
        _LOSS_TESTS + " -k confident",
    ),
    Mutant(
        "activation_whose_reference_drops_nothing",
        "trilith.kernels.activations",
        "reference_dropout(y, seed, p)",
        "y",
        _ACT_TESTS + " -k dropout",
    ),
    Mutant(
        "elu_by_a_difference",
        _FUNCTORS,
        "tl.where(z > 0, z, expm1(z))",
        "tl.where(z > 0, z, exp(z) - 1.0)",
        _ACT_TESTS,
    ),
    Mutant(
        "expm1_series_a_term_short",
        _ELEMENTARY,
        "series = 1.0 + x * (1 / 6) * (1.0 + x * (1 / 7))",
        "series = 1.0 + x * (1 / 6)",
        _ELEMENTARY_TESTS,
    ),
    Mutant(
        "log1p_series_with_a_wrong_term",
        _ELEMENTARY,
        "zz * (1 / 7 +",
        "zz * (1 / 8 +",
        _ELEMENTARY_TESTS,
    ),
    Mutant(
        "softplus_coefficient_with_a_wrong_digit",
        _ELEMENTARY,
        "0.1060364842414856",
        "0.1060384842414856",
        _ELEMENTARY_TESTS,
    ),
    Mutant(
        "gelu_tail_with_a_wrong_digit",
        _FUNCTORS,
        "1.8406056156667836",
        "1.8406156156667836",
        _ELEMENTARY_TESTS,
    ),
)
