"""What a computation has to do at least, counted from shapes, and how long a device needs for that at its best.

A multiply-add is two operations. d = hidden_size, m = intermediate_size, h = head_dim, k = num_key_value_heads,
N = tokens. Source of the counts of a rotation step: each weight is multiplied by R and its gradient by the weight once,
moments once by R; bounds stand for what the mathematics asks, not for what any implementation does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from drotator.architecture import LayerSizes
from drotator.config import PrunerConfig

Peaks = Mapping[str, float]
"""Field of `Work` -> operations, or bytes, a second."""

UNITS = {"float8": "float8", "bfloat16": "bfloat16", "tf32": "TF32", "float32": "float32"}
"""Field of `Work` that counts operations -> its name in words."""

INPUTS = ("attention", "output", "mlp", "down")
"""Keys of LayerSpec.inputs."""

SPARSE_SIZE = 9 / 16
"""Of a 2:4 weight of 16 bits: half the values, and two bits for the place of each."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations by the unit that can do them, and bytes through the device's memory."""

    float8: float = 0.0
    bfloat16: float = 0.0
    tf32: float = 0.0
    float32: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, times: float) -> Work:
        return Work(**{f.name: times * getattr(self, f.name) for f in fields(self)})

    @property
    def operations(self) -> float:
        return sum(getattr(self, unit) for unit in UNITS)

    def seconds(self, peaks: Peaks) -> float:
        """The longer of computing (units one after another) and moving bytes."""
        return max(self._computing(peaks), self.bytes / peaks["bytes"])

    def is_computing(self, peaks: Peaks) -> bool:
        return self._computing(peaks) >= self.bytes / peaks["bytes"]

    def _computing(self, peaks: Peaks) -> float:
        return sum(getattr(self, unit) / peaks[unit] for unit in UNITS)


def linear_shapes(sizes: LayerSizes) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the seven linears, by the field names of LayerSpec."""
    d, m = sizes.hidden_size, sizes.intermediate_size
    queries, values = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    return {
        "query": (queries, d),
        "key": (values, d),
        "value": (values, d),
        "output": (d, queries),
        "gate": (m, d),
        "up": (m, d),
        "down": (d, m),
    }


def num_weights(sizes: LayerSizes) -> int:
    return sum(d_out * d_in for d_out, d_in in linear_shapes(sizes).values())


def weight_products(sizes: LayerSizes) -> float:
    """Operations of W R1 for every linear, and of the gradient of R1 from it: 4 d for each weight."""
    return 4.0 * sizes.hidden_size * num_weights(sizes)


def products_of_heads(sizes: LayerSizes) -> float:
    """Those of `weight_products` that R2 turns too, of value and output."""
    shapes = linear_shapes(sizes)
    return 4.0 * sizes.hidden_size * sum(d_out * d_in for d_out, d_in in (shapes["value"], shapes["output"]))


def moment_products(sizes: LayerSizes) -> float:
    """Operations of H R1 for the inputs of attention and of the MLP."""
    return 2 * 2.0 * sizes.hidden_size**3


def head_products(sizes: LayerSizes) -> float:
    """Operations of R2 on v and o, block by block: the product, both its gradients, and H R2 of o's inputs."""
    h, queries = sizes.head_dim, sizes.num_attention_heads * sizes.head_dim
    both = sum(linear_shapes(sizes)[name][0] * linear_shapes(sizes)[name][1] for name in ("value", "output"))
    return 6.0 * h * both + 2.0 * queries**2 * h


def rotation_step(sizes: LayerSizes, *, reads_moments: bool = True, batches: int = 1, in_float8: bool = False) -> Work:
    """Loss and gradients of one layer at one pair of rotations.

    Args:
        reads_moments: the importance looks at the inputs.
        batches: one of so many parts of the outputs is looked at.
        in_float8: products with the weights that R1 alone turns are in 8 bits.
    """
    of_weights = (weight_products(sizes) + head_products(sizes)) / batches
    in_8 = (weight_products(sizes) - products_of_heads(sizes)) / batches if in_float8 else 0.0
    operations = of_weights - in_8 + (moment_products(sizes) if reads_moments else 0)
    return Work(float8=in_8, bfloat16=operations, bytes=2.0 * num_weights(sizes) / batches)


def retraction(sizes: LayerSizes) -> Work:
    """R (I - U), half of R R^T, which is symmetric, and its product with R: 5 d^3."""
    return Work(bfloat16=5.0 * sizes.hidden_size**3, bytes=12.0 * sizes.hidden_size**2)


def rotation_update(sizes: LayerSizes) -> Work:
    """The gradient in the body frame, R^T G, and the retraction."""
    return Work(bfloat16=2.0 * sizes.hidden_size**3) + retraction(sizes)


def moments(size: int, num_tokens: int) -> Work:
    """X X^T of inputs of 16 bits; products of such are exact in the tensor cores' float32 sums."""
    return Work(bfloat16=2.0 * num_tokens * size**2, bytes=2.0 * num_tokens * size + 4.0 * size**2)


def moments_of_layer(sizes: LayerSizes, num_tokens: int) -> Work:
    """X X^T of the inputs of attention, o, the MLP and down."""
    total = Work()
    for inputs in INPUTS:
        total += moments(sizes.input_size(inputs), num_tokens)
    return total


def forward(sizes: LayerSizes, batch_size: int, seqlen: int, *, sparse: bool = False, boundary: bool = False) -> Work:
    """A layer's forward pass over whole windows, causal attention.

    Args:
        sparse: the linears are 2:4: half the operations, SPARSE_SIZE of the bytes.
        boundary: a (d, d) linear follows.
    """
    d, tokens = sizes.hidden_size, batch_size * seqlen
    linears = 2.0 * tokens * num_weights(sizes) * (0.5 if sparse else 1)
    attention = 2.0 * batch_size * seqlen**2 * sizes.num_attention_heads * sizes.head_dim
    return Work(
        bfloat16=linears + attention + (2.0 * tokens * d**2 if boundary else 0),
        bytes=layer_bytes(sizes, sparse=sparse, boundary=boundary) + 4.0 * tokens * d,
    )


def decode(sizes: LayerSizes, batch_size: int, seqlen: int, *, sparse: bool = False, boundary: bool = False) -> Work:
    """A layer's forward pass over one token of each of a batch, with seqlen tokens in the cache."""
    d, queries = sizes.hidden_size, sizes.num_attention_heads * sizes.head_dim
    linears = 2.0 * batch_size * num_weights(sizes) * (0.5 if sparse else 1)
    attention = 4.0 * batch_size * seqlen * queries
    return Work(
        bfloat16=linears + attention + (2.0 * batch_size * d**2 if boundary else 0),
        bytes=layer_bytes(sizes, sparse=sparse, boundary=boundary) + cache_bytes(sizes, batch_size, seqlen),
    )


def layer_bytes(sizes: LayerSizes, *, sparse: bool = False, boundary: bool = False) -> float:
    """Bytes of a layer's linears in 16 bits."""
    linears = 2.0 * num_weights(sizes) * (SPARSE_SIZE if sparse else 1)
    return linears + (2.0 * sizes.hidden_size**2 if boundary else 0)


def cache_bytes(sizes: LayerSizes, batch_size: int, seqlen: int) -> float:
    """Bytes of a layer's keys and values in 16 bits."""
    return 4.0 * batch_size * seqlen * sizes.num_key_value_heads * sizes.head_dim


def product(rows: int, d_in: int, d_out: int, *, sparse: bool = False) -> Work:
    """x W^T in 16 bits; W is 2:4 if sparse: half the operations, SPARSE_SIZE of its bytes."""
    operations = 2.0 * rows * d_in * d_out * (0.5 if sparse else 1)
    weights = d_in * d_out * (SPARSE_SIZE if sparse else 1)
    return Work(bfloat16=operations, bytes=2.0 * (rows * (d_in + d_out) + weights))


def pruning(sizes: LayerSizes, pruner: PrunerConfig) -> Work:
    """The seven linears of a layer, their H given, in float32.

    sparsegpt: every removal corrects the columns to come, d_in^2 for each row, and H is factored and its factor
    inverted, 2/3 d_in^3. admm: a product with a (d_in, d_in) matrix each iteration. Others read and write the weights.
    """
    work = Work(bytes=8.0 * num_weights(sizes))
    shapes = linear_shapes(sizes).values()
    widths = [sizes.input_size(inputs) for inputs in INPUTS]
    if pruner.name == "admm":
        work += Work(float32=sum(2.0 * pruner.iterations * d_out * d_in**2 for d_out, d_in in shapes))
    if pruner.name in ("admm", "sparsegpt"):
        work += Work(float32=sum(2 / 3 * d_in**3 for d_in in widths))
    if pruner.name == "sparsegpt":
        work += Work(float32=sum(float(d_out) * d_in**2 for d_out, d_in in shapes))
    return work
