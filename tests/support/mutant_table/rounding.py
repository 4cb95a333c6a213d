"""Faults of rounding: right in fp32, and so for the 16-bit tests alone to notice.

Each rounds once too often, too early, or the wrong way.
"""

from __future__ import annotations

from tests.support.mutants import Mutant

_NORM_FORWARD = "trilith.kernels._norm_forward"
_NORM_BACKWARD = "trilith.kernels._norm_backward"
_NORM_TESTS = "tests/kernels/test_norms.py"
_CE, _CE_TESTS = "trilith.kernels._cross_entropy_kernels", "tests/kernels/test_cross_entropy.py"
_ACT, _ACT_TESTS = "trilith.kernels._activation_kernels", "tests/kernels/test_activations.py"
_DROPOUT, _DROPOUT_TESTS = "trilith.kernels.dropout", "tests/kernels/test_dropout.py"
_ROTARY, _ROTARY_TESTS = "trilith.kernels.rotary", "tests/kernels/test_rotary.py"
_FORWARD = "trilith.kernels.attention.forward"
_BACKWARD = "trilith.kernels.attention.backward"
_QUERIES = "trilith.kernels.attention.backward_queries"
_ATTENTION_TESTS = "tests/kernels/test_attention.py"
_HALF = " -k 'bf16 or fp16'"


def _rounded(value: str, dtype: str = "y_ptr.dtype.element_ty") -> str:
    return f"({value}).to({dtype}).to(tl.float32)"


ROUNDING = (
    Mutant(
        "norm_rstd_in_16_bits",
        _NORM_FORWARD,
        "y = x * rstd[:, None]",
        f"y = x * {_rounded('rstd')}[:, None]",
        _NORM_TESTS + _HALF,
    ),
    Mutant(
        "norm_rounded_before_the_weight",
        _NORM_FORWARD,
        "y = x * rstd[:, None]",
        f"y = {_rounded('x * rstd[:, None]')}",
        _NORM_TESTS + _HALF,
    ),
    Mutant(
        "norm_truncated_instead_of_rounded",
        _NORM_FORWARD,
        "tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)",
        "y = (y.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)\n"
        "    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)",
        _NORM_TESTS + " -k bf16",
    ),
    Mutant(
        "norm_weight_gradient_rounded_per_program",
        _NORM_BACKWARD,
        "partials = rstd.new_empty((len(dtypes), programs, n))",
        "partials = rstd.new_empty((len(dtypes), programs, n), dtype=x.dtype)",
        _NORM_TESTS + _HALF,
    ),
    Mutant(
        "norm_weight_gradient_summed_in_16_bits",
        _NORM_BACKWARD,
        "dweight += _share(dy * x_hat, SHARES)",
        f"dweight = {_rounded('dweight + _share(dy * x_hat, SHARES)', 'x_ptr.dtype.element_ty')}",
        _NORM_TESTS + _HALF,
    ),
    Mutant(
        "norm_gradient_of_a_rounded_product",
        _NORM_BACKWARD,
        "g = dy * weight\n",
        f"g = {_rounded('dy * weight', 'dx_ptr.dtype.element_ty')}\n",
        _NORM_TESTS + _HALF,
    ),
    Mutant(
        "partial_sums_added_in_16_bits",
        "trilith.kernels._runtime.reduce",
        "total = tl.sum(acc, axis=0)",
        f"total = tl.sum({_rounded('acc', 'first_ptr.dtype.element_ty')}, axis=0)",
        _NORM_TESTS + _HALF,
    ),
    Mutant(
        "rms_norm_default_eps_of_16_bits",
        "trilith.kernels.norms",
        "torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps",
        "torch.finfo(x.dtype).eps",
        _NORM_TESTS + " -k eps_none",
    ),
    Mutant(
        "cross_entropy_sum_of_exponentials_in_16_bits",
        _CE,
        "others = tl.sum(lane_sum, axis=1)",
        f"others = {_rounded('tl.sum(lane_sum, axis=1)', 'x_rows.dtype.scalar.element_ty')}",
        _CE_TESTS + _HALF,
    ),
    Mutant(
        "cross_entropy_gradient_rounded_before_the_upstream",
        _CE,
        "tl.where(mask, dx * dloss[:, None],",
        f"tl.where(mask, {_rounded('dx', 'x.dtype')} * dloss[:, None],",
        _CE_TESTS + _HALF,
    ),
    Mutant(
        "activation_of_a_rounded_sum",
        _ACT,
        "y = ACT(z)\n    if",
        f"y = ACT({_rounded('z')})\n    if",
        _ACT_TESTS + " -k 'adds_the_bias and (bf16 or fp16)'",
    ),
    Mutant(
        "gated_act_of_a_rounded_activation",
        _ACT,
        "y = ACT(gate.to(tl.float32)) * up.to(tl.float32)",
        f"y = {_rounded('ACT(gate.to(tl.float32))')} * up.to(tl.float32)",
        _ACT_TESTS + " -k 'gated_act_and and (bf16 or fp16)'",
    ),
    Mutant(
        "gate_gradient_of_a_rounded_product",
        _ACT,
        "dgate = DACT(gate, dy * up)",
        "dgate = DACT(gate, " + _rounded("dy * up", "dgate_ptr.dtype.element_ty") + ")",
        _ACT_TESTS + " -k 'gated_act_and and (bf16 or fp16)'",
    ),
    Mutant(
        "bias_gradient_of_rounded_elements",
        _ACT,
        "dbias += tl.where(mask, dx, 0.0)",
        f"dbias += tl.where(mask, {_rounded('dx', 'x_ptr.dtype.element_ty')}, 0.0)",
        _ACT_TESTS + _HALF,
    ),
    Mutant(
        "dropout_rounded_before_the_residual",
        _DROPOUT,
        "    if residual_ptr is not None:\n        residual_tile",
        f"    y = {_rounded('y', 'x_ptr.dtype.element_ty')}\n"
        "    if residual_ptr is not None:\n        residual_tile",
        _DROPOUT_TESTS + " -k 'bias_dropout_add_and and (bf16 or fp16)'",
    ),
    Mutant(
        "rotary_products_rounded",
        _ROTARY,
        "            y_half = y_head",
        f"            y1 = {_rounded('x1 * cos')} - {_rounded('x2 * sin')}\n"
        "            y_half = y_head",
        _ROTARY_TESTS + _HALF,
    ),
    Mutant(
        "rotary_tables_in_the_dtype_of_x",
        _ROTARY,
        "    if INVERSE:",
        f"    cos = {_rounded('cos')}\n    if INVERSE:",
        _ROTARY_TESTS + " -k 'matches_float64 and (bf16 or fp16)'",
    ),
    Mutant(
        "attention_output_accumulated_in_16_bits",
        _FORWARD,
        "acc * shrink[:, None]",
        _rounded("acc * shrink[:, None]", "v.dtype"),
        _ATTENTION_TESTS + _HALF,
    ),
    Mutant(
        "attention_sum_of_probabilities_in_16_bits",
        _FORWARD,
        "total = total * shrink + tl.sum(p, 1)",
        "total = " + _rounded("total * shrink + tl.sum(p, 1)", "q.dtype"),
        _ATTENTION_TESTS + _HALF,
    ),
    Mutant(
        "attention_scores_rounded",
        _FORWARD,
        "dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)",
        "dots = " + _rounded("tl.dot(q, tl.trans(k), input_precision=PRECISION)", "q.dtype"),
        _ATTENTION_TESTS + _HALF,
    ),
    Mutant(
        "attention_delta_in_16_bits",
        _BACKWARD,
        "tl.store(delta_ptr + bh * T + offs_m, delta,",
        "tl.store(delta_ptr + bh * T + offs_m, "
        + _rounded("delta", "out_ptr.dtype.element_ty")
        + ",",
        _ATTENTION_TESTS + _HALF,
    ),
    Mutant(
        "attention_key_gradients_accumulated_in_16_bits",
        _BACKWARD,
        "dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)",
        "dk = " + _rounded("tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)", "q.dtype"),
        _ATTENTION_TESTS + _HALF,
    ),
    Mutant(
        "attention_query_gradients_accumulated_in_16_bits",
        _QUERIES,
        "dq = tl.dot((ds * slope_of_cap).to(k.dtype), k, dq, input_precision=PRECISION)",
        "dq = "
        + _rounded(
            "tl.dot((ds * slope_of_cap).to(k.dtype), k, dq, input_precision=PRECISION)", "k.dtype"
        ),
        _ATTENTION_TESTS + _HALF,
    ),
)
