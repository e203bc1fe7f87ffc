"""Self-attention over an image's tokens, by the device that computes it.

softmax(q k^T / sqrt(K)) v of the packed queries, keys and values that one layer makes. Written out
for CPUs and for devices that are not known; cuDNN's on NVIDIA GPUs; on TPUs a kernel of our own,
since none of JAX's serves few tokens with heads of 72 features. One layer of SiT-XL/2, 64 images of
256 tokens, forward and backward, moves 3.7 GB through a v6e's memory written out, 4.0 with JAX's
flash_attention, 2.1 to 3.2 with its splash_attention, 0.4 with this one: jax's write row sums and
want the heads apart and padded. An image's whole sequence is on the chip here, so no T x T array
leaves it, and the softmax is computed again in the backward pass.

Axes: B batch, T tokens, D width, H heads, K features of a head (D = H K).
"""

import functools
import math

from absl import logging
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

_BLOCK = 256  # queries at a time
_MIB = 2**20
# On-chip memory that a kernel may take, and how much more than `vmem_needed` it is given, for the
# arrays [T, _BLOCK] of a head.
_VMEM = {**dict.fromkeys(("TPU v2", "TPU v3", "TPU v4"), 16 * _MIB), "later": 64 * _MIB}
_ROOM = 5 / 4


def attend(product, bias, tokens: int, heads: int, implementation: str):
  """The attention of q, k, v = product + bias.

  Args:
    product: [B, T, 3 D] or [B T, 3 D], of the tokens and the layer's matrix: queries, keys and
      values, each head by head.
    bias: [3 D].
    tokens: T.
    heads: H.
    implementation: as `choose` names it.
  Returns:
    [B, T, D] or [B T, D], as the product.
  """
  *rows, width = product.shape
  if implementation == "tpu":
    return fused(product.reshape(-1, tokens, width), bias, heads).reshape(*rows, width // 3)
  qkv = checkpoint_name(product + bias, "qkv").reshape(-1, tokens, 3, heads, width // 3 // heads)
  if implementation == "cudnn":
    out_BxTxHxK = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), implementation="cudnn")
  else:
    out_BxTxHxK = written_out(*qkv.transpose(2, 0, 3, 1, 4)).transpose(0, 2, 1, 3)
  return out_BxTxHxK.reshape(*rows, width // 3)


def written_out(q, k, v):
  """softmax(q k^T / sqrt(K)) v; all [B, H, T, K], the softmax in float32.

  Unlike jax.nn.dot_product_attention, it divides the product with v by the softmax's sum, not the
  T x T weights, which are more: that is quicker, on a CPU about twice.
  """
  logits = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32)
  logits /= math.sqrt(q.shape[-1])
  weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
  product = jnp.einsum("bhts,bhsk->bhtk", weights.astype(v.dtype), v)
  return (product / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)


def vmem_needed(tokens: int, width: int, dtype) -> int:
  """Bytes on the chip of the backward kernel: its windows, twice, and 4 D values in float32."""
  return tokens * width * (2 * 7 * jnp.dtype(dtype).itemsize + 4 * 4)


@functools.lru_cache
def choose(device_kind: str | None, tokens: int, width: int, heads: int, dtype) -> str:
  """What computes the attention of these sizes on such devices: "tpu", "cudnn" or "xla".

  Logged where a TPU has no kernel for them.

  Args:
    device_kind: as JAX names it; None where the devices are not known.
    tokens: T.
    width: D.
    heads: H.
    dtype: of queries, keys and values.
  """
  if device_kind is None or not device_kind.startswith("TPU"):
    is_nvidia = device_kind is not None and device_kind.startswith("NVIDIA")
    return "cudnn" if is_nvidia and dtype == jnp.bfloat16 else "xla"
  # Whole lanes and sublanes, and memory for all.
  fits = tokens % 128 == 0 and (tokens <= _BLOCK or tokens % _BLOCK == 0)
  fits &= width % 128 == 0 and (width // heads) % 8 == 0
  fits &= _ROOM * vmem_needed(tokens, width, dtype) <= _VMEM.get(device_kind, _VMEM["later"])
  if not fits:
    message = "Attention of %d tokens of width %d is written out: no kernel fits it on %s."
    logging.info(message, tokens, width, device_kind)
  return "tpu" if fits else "xla"


def _dot(a, b, contracted: tuple[int, int]):
  """The product over these axes of a and b, in float32."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  dimensions = ((contracted[:1], contracted[1:]), ((), ()))
  return jax.lax.dot_general(a, b, dimensions, precision, preferred_element_type=jnp.float32)


def _head(h, size: int, width: int):
  """Where the queries, keys and values of head h are among the rows of the transposed [3 D, T]."""
  return [pl.ds(pl.multiple_of(n * width + h * size, 8), size) for n in range(3)]


def _weights(k_KxT, q_KxQ):
  """The softmax, [keys, queries] so that its sums are sums of rows: (weights, 1 / their sums)."""
  scale = math.log2(math.e) / math.sqrt(k_KxT.shape[0])
  logits = _dot(k_KxT, q_KxQ, (0, 0))
  weights = jnp.exp2(scale * logits - scale * jnp.max(logits, axis=0, keepdims=True))
  return weights, 1 / jnp.sum(weights, axis=0, keepdims=True)


def _for_each_head(body, heads: int, tokens: int) -> None:
  # Unrolled, the heads overlap and a sixth of the time is saved; more tokens need no more of it.
  jax.lax.fori_loop(0, heads, lambda h, _: body(h), None, unroll=tokens <= _BLOCK)


# The kernels work on transposed arrays, [features, tokens]: there a head's 72 features are whole
# rows, whereas the chip would have to shift parts of its 128 lanes for each.


def _forward_kernel(qkv, out, x, *, heads):
  """qkv [1, T, 3 D] -> out [1, T, D]; x [3 D, T] float32 holds the queries, then their outputs."""
  (_, tokens, width), dtype = out.shape, qkv.dtype
  for n in range(3):
    part = pl.ds(n * width, width)
    x[part] = qkv[0, :, part].T.astype(jnp.float32)

  def one_head(h):
    queries, keys, values = _head(h, width // heads, width)
    k, v = x[keys].astype(dtype), x[values].astype(dtype)
    for i in range(0, tokens, _BLOCK):
      block = pl.ds(i, min(_BLOCK, tokens))
      weights, inverse_sums = _weights(k, x[queries, block].astype(dtype))
      x[queries, block] = _dot(v, weights.astype(dtype), (1, 0)) * inverse_sums

  _for_each_head(one_head, heads, tokens)
  out[0] = x[:width].astype(dtype).T


def _backward_kernel(qkv, cotangent, grad, grad_bias, x, g, *, heads):
  """-> grad [1, T, 3 D] of qkv, grad_bias [1, 1, 3 D] its sum over tokens; x [3 D, T], g [D, T]."""
  (_, tokens, width), dtype = cotangent.shape, qkv.dtype
  size = width // heads
  for n in range(3):
    part = pl.ds(n * width, width)
    x[part] = qkv[0, :, part].T.astype(jnp.float32)
  g[...] = cotangent[0].T.astype(jnp.float32)

  def one_head(h):
    queries, keys, values = _head(h, size, width)
    k, v = x[keys].astype(dtype), x[values].astype(dtype)
    d_k = d_v = jnp.zeros((size, tokens), jnp.float32)
    for i in range(0, tokens, _BLOCK):
      block = pl.ds(i, min(_BLOCK, tokens))
      q, d_out = x[queries, block].astype(dtype), g[queries, block].astype(dtype)
      weights, inverse_sums = _weights(k, q)
      weights *= inverse_sums
      d_weights = _dot(v, d_out, (0, 0))
      d_logits = weights * (d_weights - jnp.sum(weights * d_weights, axis=0, keepdims=True))
      d_logits = d_logits.astype(dtype)
      x[queries, block] = _dot(k, d_logits, (1, 0)) / math.sqrt(size)
      d_k += _dot(q, d_logits, (1, 1))
      d_v += _dot(d_out, weights.astype(dtype), (1, 1))
    x[keys], x[values] = d_k / math.sqrt(size), d_v

  _for_each_head(one_head, heads, tokens)
  for n in range(3):
    part = pl.ds(n * width, width)
    whole = x[part].astype(dtype).T
    grad[0, :, part] = whole
    grad_bias[0, :, part] = jnp.sum(whole.astype(jnp.float32), axis=0, keepdims=True)


def _call(kernel, heads: int, arrays, results, scratch, products: int):
  """Runs a kernel image by image.

  Args:
    kernel: of windows of the arrays, of the results, and of the scratch.
    heads: H.
    arrays: [B, T, ..], the last of them D or 3 D wide.
    results: (rows, width, dtype) of each result [B, rows, width].
    scratch: rows of each scratch array [rows, T], float32.
    products: of T x T x D multiplications that it makes.
  """
  b, tokens, width = arrays[0].shape
  over_mesh = jax.typeof(arrays[0]).manual_axis_type  # the results vary as the arrays do
  shape = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=over_mesh)
  shapes = [shape((b, rows, width), dtype) for rows, width, dtype in results]
  window = lambda rows, width: pl.BlockSpec((1, rows, width), lambda i: (i, 0, 0))
  needed = vmem_needed(tokens, width // 3, arrays[0].dtype)
  moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in (*arrays, *shapes))
  return pl.pallas_call(
    functools.partial(kernel, heads=heads),
    grid=(b,),
    in_specs=[window(tokens, a.shape[-1]) for a in arrays],
    out_specs=[window(rows, width) for rows, width, _ in results],
    out_shape=shapes,
    scratch_shapes=[pltpu.VMEM((rows, tokens), jnp.float32) for rows in scratch],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=max(16 * _MIB, int(_ROOM * needed))
    ),
    cost_estimate=pl.CostEstimate(
      flops=products * 2 * b * tokens**2 * width // 3,
      transcendentals=b * heads * tokens**2,
      bytes_accessed=moved,
    ),
    name=kernel.__name__.strip("_"),
  )(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fused(product, bias, heads: int):
  """The attention of q, k, v = product + bias, by the TPU's kernel.

  The bias is an argument since the backward kernel sums its gradient over the tokens. Arguments and
  result as `attend` has them, with three axes.
  """
  return _forward(product, bias, heads)[0]


def _forward(product, bias, heads):
  qkv = checkpoint_name(product + bias, "qkv")
  _, tokens, width = qkv.shape
  (out,) = _call(
    _forward_kernel, heads, (qkv,), [(tokens, width // 3, qkv.dtype)], scratch=(width,), products=2
  )
  return out, qkv


def _backward(heads, qkv, cotangent):
  _, tokens, width = qkv.shape
  results = (tokens, width, qkv.dtype), (1, width, jnp.float32)
  grad, grad_bias = _call(
    _backward_kernel, heads, (qkv, cotangent), results, scratch=(width, width // 3), products=5
  )
  return grad, jnp.sum(grad_bias, axis=(0, 1)).astype(qkv.dtype)


fused.defvjp(_forward, _backward)
