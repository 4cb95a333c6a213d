"""How near a result must be to the reference in float64: by bounds derived from rounding."""

import torch
from torch import Tensor

_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
_FLOOR = 1e-5
_ONCE = 1.02
_WORST = {torch.float32: 10.0, torch.float16: 2.0, torch.bfloat16: 2.0}


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring `dtype` numbers at each value; float64 in and out."""
    _, exponent = torch.frexp(values.abs())
    lowest = round(torch.log2(torch.tensor(torch.finfo(dtype).tiny, dtype=torch.float64)).item())
    exponent = torch.where(values == 0, lowest, exponent - 1).clamp_min(lowest)
    return torch.ldexp(torch.ones_like(values), exponent - _BITS[dtype])


def assert_one_rounding(
    actual: Tensor,
    expected64: Tensor,
    *,
    scale: float | Tensor,
    terms: int = 1,
    c: float = 16,
) -> None:
    """|actual - expected| <= 2 ulp of the output + c * 2**-24 * scale * sqrt(terms), each element.

    In 16 bits also the mean error is that of rounding the expected tensor once, but for what fp32
    may be off: a second rounding, or a truncation, stays within 2 ulp.

    Args:
        actual: the kernel's result.
        expected64: the reference in float64 on the same, already rounded, inputs.
        scale: the largest intermediate magnitude before the last subtraction; broadcasts.
        terms: the length of the sums that enter an element. A sum's own magnitude counts too: its
            terms may be equal, and then their roundings are.
        c: how many fp32 roundings of `scale` are granted.
    """
    expected = _checked(actual, expected64)
    scale = torch.as_tensor(scale, dtype=torch.float64, device=actual.device)
    magnitude = terms**0.5 * scale
    if terms > 1:
        own = torch.where(expected.isfinite(), expected.abs(), 0)
        magnitude = torch.maximum(magnitude, own)
    bound = 2 * ulp(expected, actual.dtype) + c * 2.0**-24 * magnitude
    _assert_patterns(actual, expected, bound)
    finite = actual.isfinite() & expected.isfinite()
    bound = bound.expand(expected.shape)
    if not bound[finite].isfinite().all():
        raise ValueError(
            "scale must be finite wherever the expected value is: the bound is vacuous"
        )
    error = torch.where(finite, (actual.double() - expected).abs(), 0)
    _assert_within(error, bound, actual, expected, "2 ulp + c * 2**-24 * scale * sqrt(terms)")
    if actual.element_size() == 2 and finite.any():
        _assert_rounded_once(error, finite, expected, c * 2.0**-24 * magnitude, actual.dtype)


def _assert_rounded_once(
    error: Tensor, finite: Tensor, expected: Tensor, slack: Tensor, dtype: torch.dtype
) -> None:
    """An fp32 result within `slack` of the expected one, rounded once, errs by 2 * slack more."""
    ideal = torch.where(finite, (expected.to(dtype).double() - expected).abs(), 0)
    unit = torch.where(finite, 2 * 16 * 2.0**-24 * expected.abs(), 0)
    slack = torch.where(finite, 2 * slack.expand(expected.shape), 0)
    limit = _ONCE * ideal.mean() + torch.maximum(slack, unit).mean()
    _assert_mean(error.mean(), limit, "the tensor", "one rounding's")


def assert_like_eager(actual: Tensor, expected64: Tensor, eager: Tensor) -> None:
    """Errors at most twice those of eager PyTorch in the same dtype (float32: ten times).

    In the maximum, in the mean (1.1 times), and in the mean of every row and every matrix. In
    float32 a mean may be 2 ulp off whatever eager's is: of a few sums eager's may be 0 by chance.
    """
    expected = _checked(actual, expected64)
    if eager.shape != actual.shape or eager.dtype != actual.dtype:
        raise ValueError(
            f"eager must be a {actual.dtype} {tuple(actual.shape)}, "
            f"got {eager.dtype} {tuple(eager.shape)}"
        )
    single = actual.dtype == torch.float32
    worst, mean = (10.0, 10.0) if single else (2.0, 1.1)
    finite = actual.isfinite() & expected.isfinite()
    magnitude = torch.where(finite, expected.abs(), 0)
    floor = _FLOOR * min(1.0, magnitude.max().item()) if actual.numel() else 0.0
    yardstick = torch.where(finite & eager.isfinite(), (eager.double() - expected).abs(), 0)
    error = torch.where(finite, (actual.double() - expected).abs(), 0)
    limit = worst * yardstick.max() + floor if actual.numel() else yardstick
    _assert_patterns(actual, expected, 2 * ulp(expected, actual.dtype))
    _assert_within(error, limit.expand_as(error), actual, expected, f"{worst:g} * eager's worst")
    if not actual.numel():
        return
    least = floor / 10 + (2 * ulp(magnitude, actual.dtype).mean() if single else 0)
    limit = mean * yardstick.mean() + least
    _assert_mean(error.mean(), limit, "the tensor", f"{mean:g} * eager's")
    for trailing, name in ((1, "row"), (2, "matrix")):
        if actual.ndim <= trailing:
            break
        dims = tuple(range(-trailing, 0))
        own, all_ = (10.0, 5.0) if single else (3.0, 0.5)
        limit = own * yardstick.mean(dims) + all_ * yardstick.mean() + least
        _assert_mean(error.mean(dims), limit, name, f"{own:g} * eager's")


def assert_fair(actual, expected, eager, rows=1):
    """Errors within twice eager's worst (float32: ten times).

    Of few elements that says little, least where they are sums over `rows` rows that cancel.
    """
    assert (actual.shape, actual.dtype) == (expected.shape, eager.dtype)
    dtype, finite = actual.dtype, expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    assert torch.equal(actual[~finite].double(), expected[~finite])
    actual, expected, eager = (t.double()[finite] for t in (actual, expected, eager.to(actual)))
    if not actual.numel():
        return
    largest = expected.abs().max()
    # few elements of eager.s may have missed what one rounding costs: half an ulp of the largest
    yardstick = max((eager - expected).abs().max(), torch.finfo(dtype).eps / 2 * largest)
    bound = _WORST[dtype] * yardstick + 1e-5 * max(1, largest)
    if actual.numel() < 64:
        bound += torch.finfo(dtype).eps * max(4 * largest, rows**0.5)
    error = (actual - expected).abs().max()
    assert error <= bound, f"error {error:.3g}, bound {bound:.3g}"


def _checked(actual: Tensor, expected64: Tensor) -> Tensor:
    if expected64.dtype != torch.float64:
        raise ValueError(f"the expected tensor must be float64, got {expected64.dtype}")
    if actual.dtype not in _BITS:
        raise ValueError(f"the actual tensor must be floating-point, got {actual.dtype}")
    if actual.shape != expected64.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected64.shape)}")
    return expected64.detach().to(actual.device)


def _assert_patterns(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """NaNs and infinities sit in the same places, but for values next to the overflow limit."""
    rounded = expected.to(actual.dtype)
    edge = torch.finfo(actual.dtype).max
    close = expected.isfinite() & (expected.abs() + bound >= edge)
    close &= actual.isfinite() | (torch.sign(actual.double()) == torch.sign(expected))
    wrong = actual.isnan() != rounded.isnan()
    infinite = actual.isinf() | rounded.isinf()
    wrong |= infinite & (actual != rounded) & ~close
    if wrong.any():
        raise AssertionError(_report("NaN or inf differ", wrong.double(), wrong, actual, expected))


def _assert_within(
    error: Tensor, bound: Tensor, actual: Tensor, expected: Tensor, rule: str
) -> None:
    wrong = ~(error <= bound)
    if not wrong.any():
        return
    ratio = torch.where(wrong, error / bound, 0).nan_to_num(nan=torch.inf)
    text = _report(f"beyond {rule}", ratio, wrong, actual, expected)
    at = _worst(ratio)
    raise AssertionError(
        f"{text}; error {error[at].item():.3g}, bound {bound[at].item():.3g}, "
        f"{ratio[at].item():.3g} times it"
    )


def _assert_mean(error: Tensor, limit: Tensor, what: str, measure: str) -> None:
    if (error > limit).any():
        at = _worst(error / limit)
        where = f" {list(at)}" if at else ""
        raise AssertionError(
            f"mean error of {what}{where} is {error[at].item():.3g}, bound {limit[at].item():.3g} "
            f"({measure})"
        )


def _worst(ratio: Tensor) -> tuple[int, ...]:
    flat = int(ratio.argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ratio.shape))


def _report(problem: str, severity: Tensor, wrong: Tensor, actual: Tensor, expected: Tensor) -> str:
    at = _worst(severity)
    return (
        f"{problem} in {int(wrong.sum())} of {wrong.numel()} elements of a "
        f"{str(actual.dtype).removeprefix('torch.')} {tuple(actual.shape)}; worst at {list(at)}: "
        f"got {actual[at].item()!r}, expected {expected[at].item()!r}"
    )
