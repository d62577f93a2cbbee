"""Exact float arithmetic for kernels: one instruction compiled, exact emulation interpreted.

Triton's interpreter computes with numpy: before 3.9 its fma rounds twice, and in 3.4 to 3.9 its
float32 → bfloat16 truncates and bfloat16 subnormals load wrongly. So where `INTERPRETED`, these
functions use integers and binary64 instead.
"""

import triton
import triton.language as tl

# Whether kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def fma(a, b, c):
    """The sum a · b + c, rounded once to binary32."""
    if _INTERPRETED:
        # Round the binary64 sum to odd, after which rounding to binary32 is exact (Boldo and
        # Melquiond 2008); the error of the sum is Knuth's two-sum.
        product = a.to(tl.float64) * b.to(tl.float64)
        wide = c.to(tl.float64)
        total = product + wide
        part = total - product
        error = (product - (total - part)) + (wide - part)
        bits = total.to(tl.int64, bitcast=True)
        finite = ((bits >> 52) & 0x7FF) != 0x7FF
        inexact = (error != 0.0) & finite & ((bits & 1) == 0)
        outward = (error > 0.0) == (total > 0.0)
        bits = tl.where(inexact, bits + tl.where(outward, 1, -1), bits)
        return bits.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def fma_of_noise(a, b, c):
    """`fma` for the operands of the Gaussian transform, where rounding twice changes no result."""
    if _INTERPRETED:
        # Checked for all of them (test_noise.py); a fifth of the interpreter's operations.
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def sqrt(x):
    """The square root, correctly rounded (PyTorch's and numpy's in binary64, rounded once)."""
    if _INTERPRETED:
        return tl.sqrt(x.to(tl.float64)).to(tl.float32)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(a, b):
    """The quotient, correctly rounded."""
    if _INTERPRETED:
        # Of binary64 quotients of binary32 numbers none lies where rounding again could differ.
        return (a.to(tl.float64) / b.to(tl.float64)).to(tl.float32)
    else:
        return tl.div_rn(a, b)


@triton.jit
def bits_of(x):
    """The bits of a float32 as uint32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    """The float32 of 32 bits."""
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(x):
    """Whether a float32 is neither infinite nor NaN."""
    return (bits_of(x) & 0x7F800000) != 0x7F800000


@triton.jit
def widen(raw, DTYPE: tl.constexpr):
    """Loaded bits (`memory_type`) as float32, exactly."""
    if DTYPE == tl.bfloat16:
        return float_of(raw.to(tl.uint32) << 16)
    else:
        return raw.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """A float32, rounded to nearest even, as what is stored in memory (`memory_type`)."""
    if DTYPE == tl.bfloat16:
        if _INTERPRETED:
            bits = bits_of(x)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            nan = (bits & 0x7FFFFFFF) > 0x7F800000
            return tl.where(nan, (bits >> 16) | 0x40, rounded).to(tl.uint16)
        else:
            return x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def nearest(x, DTYPE: tl.constexpr):
    """A float32 rounded to the type, still as float32."""
    return widen(narrow(x, DTYPE), DTYPE)


@triton.jit
def stochastic(x, u, DTYPE: tl.constexpr):
    """A float32 rounded to the type by 16 random bits ``u`` (uint32), still as float32."""
    if DTYPE == tl.bfloat16:
        return tl.where(is_finite(x), float_of((bits_of(x) + u) & 0xFFFF0000), x)
    elif DTYPE == tl.float16:
        sign = bits_of(x) & 0x80000000
        magnitude = bits_of(x) ^ sign
        rounded = float_of((magnitude + (u & 0x1FFF)) & 0xFFFFE000)
        # Below 2⁻¹⁴ half's steps are even: count them in units of 2⁻⁴⁰.
        below = magnitude < 0x38800000
        capped = tl.where(below, float_of(magnitude), 0.0)
        units = (capped * 1099511627776.0).to(tl.int32).to(tl.uint32)
        small = ((units + u) >> 16).to(tl.int32).to(tl.float32) * 5.960464477539063e-08
        either = bits_of(tl.where(below, small, rounded)) | sign
        # What lies beyond the largest half is to become infinite.
        return tl.where(is_finite(x), nearest(float_of(either), DTYPE), x)
    else:
        return x


def memory_type(dtype):
    """The type that a kernel loads and stores for weights of this type."""
    return tl.uint16 if dtype == tl.bfloat16 else dtype
