"""Faults of the losses and of softmax."""

from __future__ import annotations

from tests.support.mutants import Mutant

_CE = "trilith.kernels._cross_entropy_kernels"
_CE_TESTS = "tests/kernels/test_cross_entropy.py"
_SOFT = "trilith.kernels._soft_cross_entropy"
_SOFT_TESTS = "tests/kernels/test_soft_cross_entropy.py"
_LCE = "trilith.kernels._linear_cross_entropy_chunks"
_LCE_TESTS = "tests/kernels/test_linear_cross_entropy.py"
_LOSSES = "trilith.kernels._loss_kernels"
_LOSS_TESTS = "tests/kernels/test_losses.py"
_CONFORMANCE = "tests/plugins/test_conformance.py"

LOSSES = (
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
        "soft_cross_entropy_probabilities_taken_to_sum_to_one",
        _SOFT,
        "p * (total + spread)[:, None] - q",
        "p * (1.0 + spread)[:, None] - q",
        _SOFT_TESTS + " -k add_up",
    ),
    Mutant(
        "soft_cross_entropy_sum_not_moved_to_the_new_maximum",
        _SOFT,
        "below_lanes += share_lanes * rise[:, None]",
        "below_lanes += 0.0",
        _SOFT_TESTS + " -k last",
    ),
    Mutant(
        "soft_cross_entropy_target_gradient_without_the_class_weight",
        _SOFT,
        "slope = weight * (1.0 - smoothing)\n    return slope * t.to(tl.float32)",
        "slope = (1.0 - smoothing) + 0.0 * weight\n    return weight * slope * t.to(tl.float32)",
        _SOFT_TESTS + " -k 9x7",
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
        "linear_cross_entropy_head_gradient_of_the_last_chunk_only",
        _LCE,
        "gradients.weight, first=start == 0)",
        "gradients.weight, first=True)",
        _LCE_TESTS + " -k float64",
    ),
    Mutant(
        "linear_cross_entropy_labels_of_the_first_chunk",
        _LCE,
        "rows(logits[:, :classes], target[part],",
        "rows(logits[:, :classes], target[: part.stop - start],",
        _LCE_TESTS + " -k float64",
    ),
    Mutant(
        "linear_cross_entropy_classes_that_there_are_none_of_keep_a_gradient",
        _LCE,
        "dlogits[:, classes:].zero_()",
        "pass",
        _LCE_TESTS + " -k ignored_row",
    ),
    Mutant(
        "linear_cross_entropy_saved_gradient_without_the_upstream",
        _CE,
        "x * tl.load(scale_ptr).to(tl.float32)",
        "x",
        _LCE_TESTS + " -k twice",
    ),
    Mutant(
        "linear_cross_entropy_saved_gradient_overwritten",
        _LCE,
        "result = torch.empty_like(gradient, dtype=dtype)",
        "result = gradient",
        _LCE_TESTS + " -k twice",
    ),
    Mutant(
        "linear_cross_entropy_frozen_head_allocated",
        "trilith.kernels.linear_cross_entropy",
        "if needs and needs[_WEIGHT]:",
        "if needs:",
        _LCE_TESTS + " -k 'wanted or frozen'",
    ),
    Mutant(
        "linear_cross_entropy_num_items_forgotten",
        "trilith.kernels.linear_cross_entropy",
        "own = num_items is None",
        "own = True",
        _LCE_TESTS + " -k micro",
    ),
    Mutant(
        "cross_entropy_gradient_rounded_before_subtracting_1",
        _CE,
        "missing = weight * expm1(chosen - peak - log_sum)",
        "rounded = tl.exp(chosen - peak - log_sum).to(x.dtype)\n"
        "    missing = weight * (rounded.to(tl.float32) - 1.0)",
        _CE_TESTS + " -k confident_rows",
    ),
    Mutant(
        "cross_entropy_gradient_of_ignored_rows",
        _CE,
        "live = counted & in_range",
        "live = inside & in_range",
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
        "sure_probabilities_by_the_difference_from_one",
        _SOFT,
        "log_sum = tl.where(tied == 1.0, log1p(others), tl.log(tied + others))",
        "log_sum = tl.log(tied + others)",
        _SOFT_TESTS + " -k sure",
    ),
    Mutant(
        "bce_by_the_difference_of_large_numbers",
        _LOSSES,
        "loss = t * q * (tl.maximum(-x, 0.0) + tail) + (1.0 - t) * (tl.maximum(x, 0.0) + tail)",
        "loss = (1.0 - t) * x + (1.0 + (q - 1.0) * t) * (tl.maximum(-x, 0.0) + tail)",
        _LOSS_TESTS + " -k confident",
    ),
    Mutant(
        "mean_of_a_loss_without_its_last_programs",
        _LOSSES,
        "tl.cdiv(M, BLOCK_M) * n_blocks, tl.num_programs(0)",
        "tl.cdiv(M, BLOCK_M) * n_blocks - 1, tl.num_programs(0)",
        _LOSS_TESTS + " -k many_programs",
    ),
    Mutant(
        "pos_weight_left_out_of_the_gradient",
        _LOSSES,
        "dx = (1.0 - t) * above - t * q * below",
        "dx = (1.0 - t) * above - t * below",
        _LOSS_TESTS + " -k weights_broadcast",
    ),
    Mutant(
        "softmax_running_sum_not_rescaled",
        "trilith.kernels.softmax",
        "sums = sums * exp(peak - safe)[:, None] + exp(x - safe[:, None])",
        "sums = sums + exp(x - safe[:, None])",
        "tests/kernels/test_softmax.py -k float64",
    ),
    Mutant(
        "log_softmax_gradient_without_the_sum",
        "trilith.kernels.softmax",
        "dx = dy - p * tl.sum(dy, axis=1)[:, None]",
        "dx = dy - p * dy",
        "tests/kernels/test_softmax.py -k float64",
    ),
    Mutant(
        "weighted_mean_over_one_more",
        "trilith.kernels.losses",
        "weight.sum(dtype=wide)",
        "(weight.sum(dtype=wide) + 1)",
        _LOSS_TESTS,
    ),
)
