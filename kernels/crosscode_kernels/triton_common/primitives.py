"""Jitted building blocks shared by kernels. Tiles are named in lower case; their shape stands behind them."""

import triton
import triton.language as tl


@triton.jit
def relu_nan(h):
    """`relu` in fp32 that keeps NaN and turns -0 into +0."""
    return tl.where(h <= 0.0, 0.0, h)


@triton.jit
def rank_keys(v, KEY_DTYPE: tl.constexpr):
    """Order-preserving int32 keys of non-negative fp32 values; NaN ranks above everything.

    The bits of a non-negative float order like integers. Values that came from `KEY_DTYPE` keep its 15 bits, if it has
    16, or 31.
    """
    if tl.float32 == KEY_DTYPE:
        return tl.where(v != v, 0x7FFFFFFF, v.to(tl.int32, bitcast=True))
    elif tl.bfloat16 == KEY_DTYPE:
        return tl.where(v != v, 0x7FFF, v.to(tl.int32, bitcast=True) >> 16)
    else:
        return tl.where(v != v, 0x7FFF, v.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32))


@triton.jit
def value_of_key(key, KEY_DTYPE: tl.constexpr):
    """The value (fp32) that `rank_keys` made the key of; NaN for the key of NaN."""
    if tl.float32 == KEY_DTYPE:
        return key.to(tl.float32, bitcast=True)
    elif tl.bfloat16 == KEY_DTYPE:
        return (key << 16).to(tl.float32, bitcast=True)
    else:
        return key.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def count_digit(hist, key, mask, prefix, DIGIT: tl.constexpr, DIGIT_BITS: tl.constexpr, N_DIGITS: tl.constexpr):
    """Add to `hist` the digit of the masked keys that start with `prefix`; `DIGIT` 0 is the most significant one."""
    SHIFT: tl.constexpr = (N_DIGITS - 1 - DIGIT) * DIGIT_BITS
    if DIGIT > 0:
        mask = mask & ((key >> (SHIFT + DIGIT_BITS)) == prefix)
    return hist + tl.histogram((key >> SHIFT) & ((1 << DIGIT_BITS) - 1), 1 << DIGIT_BITS, mask=mask)


@triton.jit
def pick_digit(hist, prefix, remaining, BINS: tl.constexpr):
    """One radix step: the digit that holds the `remaining`-th largest key, given the histogram of that digit.

    Returns the extended prefix and how many keys of that digit are still wanted.
    """
    bins = tl.arange(0, BINS)
    at_least = tl.cumsum(hist, 0, reverse=True)
    digit = tl.max(tl.where(at_least >= remaining, bins, 0), 0)
    above = tl.sum(tl.where(bins > digit, hist, 0), 0)
    return prefix * BINS + digit, remaining - above


@triton.jit
def tanh(x):
    """tanh in fp32 to a few ulp: a Taylor polynomial near 0, where the quotient would cancel, exp elsewhere."""
    magnitude = tl.abs(x)
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    decay = tl.exp(-2.0 * magnitude)
    quotient = (1.0 - decay) / (1.0 + decay)
    return tl.where(magnitude < 0.25, series, tl.where(x < 0.0, -quotient, quotient))


@triton.jit
def tanh_slope(x):
    """`1 - tanh(x)^2` in fp32 to a few ulp, where tanh is near 1 as well: of it the difference would keep no digits."""
    decay = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
