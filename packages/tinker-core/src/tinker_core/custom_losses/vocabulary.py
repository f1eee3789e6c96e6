"""The operations that a custom loss may name. What is not listed here does not exist for it.

Left out on purpose: everything random, everything in place, what returns memory that nobody wrote (``empty``), what a
device aborts on for bad values (``nll_loss``, ``one_hot``, ``binary_cross_entropy``), what reads or makes storage
(``as_strided``, ``set_``), decompositions, and what turns one small tensor into a great many objects (``unbind``).
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ELEMENTWISE = _words("""
abs absolute neg negative positive sign sgn signbit exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal
sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh sinc erf erfc erfinv lgamma digamma sigmoid logit
floor ceil round trunc frac clamp clip clamp_min clamp_max nan_to_num deg2rad rad2deg
add sub subtract mul multiply div divide true_divide pow float_power fmod remainder floor_divide
maximum minimum fmax fmin logaddexp logaddexp2 hypot atan2 arctan2 copysign heaviside xlogy lerp addcmul addcdiv
eq ne lt le gt ge greater greater_equal less less_equal not_equal isclose isnan isinf isfinite
logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not
relu softmax log_softmax masked_fill clone
""")
_REDUCTIONS = _words("""
sum nansum mean nanmean prod std var amax amin max min argmax argmin all any count_nonzero logsumexp norm
median nanmedian quantile nanquantile cumsum cumprod cummax cummin logcumsumexp
sort argsort msort topk kthvalue dot
""")
_SHAPES = _words("""
reshape unsqueeze squeeze flatten ravel t transpose swapaxes permute movedim moveaxis flip fliplr flipud roll
tril triu diagonal narrow select
masked_select index_select gather take_along_dim
matmul mm mv outer repeat_interleave tile
""")

_TORCH = _words("""
where cosine_similarity zeros_like ones_like full_like zeros ones full arange linspace eye
stack cat concat hstack vstack broadcast_to selu
""")
_METHODS = _words("""
float double half bfloat16 int long bool to type type_as cpu detach contiguous view view_as reshape_as expand
expand_as repeat size dim numel nelement new_zeros new_ones new_full masked_fill where
""")

ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "T", "mT", "data", "values", "indices"})
"""What ``getattr`` may read."""

_SHARED = _ELEMENTWISE | _REDUCTIONS | _SHAPES

TORCH = _SHARED | _TORCH
"""Functions of ``torch``."""
SPECIAL = _words("""
expm1 exp2 log1p logit expit erf erfc erfinv gammaln digamma psi sinc xlogy xlog1py entr log_softmax softmax
logsumexp ndtr log_ndtr round i0 i0e i1 i1e
""")
"""Functions of ``torch.special``."""
FUNCTIONAL = _words("""
relu relu6 elu selu celu gelu silu mish hardtanh leaky_relu softplus softsign logsigmoid log_sigmoid sigmoid tanh
hardsigmoid hardswish threshold tanhshrink softshrink hardshrink
softmax log_softmax softmin normalize cosine_similarity pairwise_distance pad
mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy_with_logits gaussian_nll_loss
poisson_nll_loss soft_margin_loss margin_ranking_loss hinge_embedding_loss
""")
"""Functions of ``torch.nn.functional``."""
LINALG = frozenset({"vector_norm"})
"""Functions of ``torch.linalg``."""
OPERATORS = _words("""
add sub mul truediv floordiv mod pow neg pos abs invert matmul getitem eq ne lt le gt ge and_ or_ xor
""")
"""Functions of ``operator``, by which ``torch.fx`` records Python's arithmetic and indexing."""
MATH = _words("""
exp expm1 log log2 log10 log1p sqrt pow sin cos tan tanh atan atan2 floor ceil trunc fabs erf erfc lgamma gamma
copysign hypot isnan isinf isfinite
""")
"""Functions of ``math``; they take numbers and tensors of one element."""
METHODS = _SHARED | _METHODS
"""Methods of tensors."""

GETATTR = "getattr"
"""The name by which ``torch.fx`` records reading an attribute."""

_NAMESPACES = {
    "torch": TORCH,
    "torch.special": SPECIAL,
    "torch.nn.functional": FUNCTIONAL,
    "torch.linalg": LINALG,
    "operator": OPERATORS,
    "math": MATH,
}
FUNCTIONS = frozenset(f"{module}.{name}" for module, names in _NAMESPACES.items() for name in names)
"""All functions by their canonical name; `GETATTR` is none of them."""

_PREFIXES = (
    ("torch._C._special.special_", "torch.special."),
    ("torch._C._linalg.linalg_", "torch.linalg."),
    ("torch._C._nn.", "torch.nn.functional."),
    ("torch.functional.", "torch."),
    ("_operator.", "operator."),
)
"""Where torch really keeps what it offers elsewhere; releases differ in this."""

DTYPES = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"})
"""Element types that a graph may name or make."""

TEXTS = frozenset({"none", "sum", "mean", "batchmean", "floor", "trunc", "constant", "fro", "tanh", "linear", "lower"})
"""Texts that may be arguments, besides names of attributes."""

KEYWORDS = _words("""
input other self value values mask condition index indices exponent end weight weights tensors fill_value size sizes
shape dims shifts repeats start steps step n m N M dim dim0 dim1 axis axis0 axis1 keepdim keepdims source
destination offset diagonal min max p q ord eps nan posinf neginf alpha beta delta lambd min_val max_val threshold
negative_slope base decimals k largest sorted stable descending correction unbiased interpolation reduction
rounding_mode approximate mode pad prepend append x1 x2 target var full log_input log_target margin pos_weight dtype
device rtol atol equal_nan length start_dim end_dim tensor1 tensor2 mat2 vec vec2 a b x y
""")
"""Names of keyword arguments."""

IDLE_KEYWORDS = _words("""
out inplace size_average reduce _stacklevel requires_grad pin_memory layout memory_format copy non_blocking
""")
"""Keywords that tracing writes down with a value that changes nothing; with another value they are refused."""


def canonical(target: str) -> str:
    """The name under which a function is listed here, whatever module torch keeps it in."""
    for prefix, public in _PREFIXES:
        if target.startswith(prefix):
            return public + target.removeprefix(prefix)
    return target
