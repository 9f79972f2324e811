"""Products with rounded factors against float64 ones, and what the rounding leaves of objectives and of training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drotator.architecture import LayerSizes
from drotator.config import SALIENCES, ObjectiveConfig, OptimizerConfig, SparsityConfig
from drotator.objectives import INPUT_OF, LayerProblem, Objective, build_objective, with_gradients
from drotator.products import (
    FLOAT8,
    GRADIENT8,
    LARGEST8,
    Products,
    choose_products,
    dealt,
    factor_of,
    gradient_of_rotation,
    one_of,
    rotated,
    rounded_rotation,
    sixteen_bits,
)
from drotator.rotation import Rotation
from drotator.training import train_rotation

D, N = 48, 80
U16 = 2.0**-8  # bfloat16 rounds an entry by this part of it at most
FLOAT32 = 2.0**-24  # likewise
SIZES = LayerSizes(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
NUM_ROWS = {"query": 128, "key": 64, "value": 64, "output": 128, "gate": 256, "up": 256, "down": 128}
NUM_INPUTS = {"attention": 128, "output": 128, "mlp": 128, "down": 256}
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)

by_products = pytest.mark.parametrize("products", [None, torch.bfloat16, FLOAT8], ids=str)
by_batches = pytest.mark.parametrize("batches", [1, 2])
by_name = pytest.mark.parametrize("name", ["entropy", "pruning_error"])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_rotation(size: int = D) -> Tensor:
    return torch.linalg.qr(draw(1, size, size).double()).Q.float()


def near_identity(size: int, angle: float) -> Tensor:
    A = angle * draw(2, size, size).double()
    return torch.linalg.matrix_exp(A - A.mT).float()


def some_rows(num_rows: int = N) -> Tensor:
    """Of norms from about 1e-3 to 1e3 times those of normal numbers."""
    return draw(3, num_rows, D) * torch.logspace(-3, 3, num_rows)[:, None]


def half_ulp8(values: Tensor) -> Tensor:
    """Half the distance of E4M3's numbers about a value: 3 bits after the first, of which the smallest is 2^-6."""
    return 2.0 ** (values.abs().double().clamp_min(2.0**-6).log2().floor() - 4)


def batch_of(number: int, batches: int) -> Tensor | None:
    return None if batches == 1 else torch.tensor([number])


@pytest.mark.parametrize("products", [None, torch.bfloat16], ids=str)
@by_batches
def test_a_factor_is_the_transposed_weight_dealt_like_cards_with_its_counts(products: Products, batches: int) -> None:
    rows, counts = some_rows(), draw(4, N).square()
    dealer = factor_of([rows[:32], rows[32:]], [counts[:32], counts[32:]], products, batches)
    for number in range(batches):
        factor = dealer.of_batch(batch_of(number, batches))
        assert torch.equal(factor.X.mT, rows[number::batches].to(products or torch.float32))
        assert factor.X.is_contiguous() and factor.mirrored is None
        assert factor.counts is not None and factor.scale is not None
        assert torch.equal(factor.scale, counts.max())
        torch.testing.assert_close(factor.counts * factor.scale, counts[number::batches], rtol=2 * FLOAT32, atol=0)


@by_batches
def test_columns_of_eight_bits_are_those_of_the_weight_to_half_an_ulp_once_all_have_the_same_norm(batches: int) -> None:
    rows, counts = some_rows(), draw(4, N).square()
    dealer = factor_of([rows[:32], rows[32:]], [counts[:32], counts[32:]], FLOAT8, batches)
    for number in range(batches):
        factor, dealt_rows = dealer.of_batch(batch_of(number, batches)), rows[number::batches].double()
        assert factor.mirrored is not None and factor.counts is not None and factor.scale is not None
        assert factor.X.dtype is FLOAT8 and factor.X.is_contiguous() and factor.mirrored.is_contiguous()
        assert torch.equal(factor.mirrored.float(), factor.X.float().mT)
        length = dealt_rows.norm(dim=1) / LARGEST8
        exact = (dealt_rows / length[:, None]).mT  # columns of norm LARGEST8
        slack = 4 * D * FLOAT32 * exact.abs()  # of the norm in float32
        assert ((factor.X.double() - exact).abs() <= half_ulp8(exact) + slack).all()
        assert float(factor.counts.min()) >= 0 and float(factor.counts.max()) <= 1
        importance = counts[number::batches].double() * length.square()  # of a column's multiple, to that of the weight
        torch.testing.assert_close(
            factor.counts.double() * factor.scale.double(), importance, rtol=4 * D * FLOAT32, atol=0
        )
    assert dealer.counts is not None and float(dealer.counts.max()) == 1


@by_products
def test_importances_without_counts_are_those_of_the_weight(products: Products) -> None:
    """To twice the rounding of an entry of order 1; of 8 bits the subnormal ones are off by more."""
    rows = some_rows()
    factor = factor_of([rows], None, products).of_batch(None)
    assert factor.counts is not None and factor.scale is not None
    found = factor.X.double().square() * factor.counts.double() * factor.scale.double()
    exact = rows.double().mT.square()
    of_entry = {None: FLOAT32, torch.bfloat16: U16, FLOAT8: 2.0**-4}[products]
    subnormal = (2.0**-6 / LARGEST8 * rows.double().norm(dim=1)).square()
    assert ((found - exact).abs() <= 2.2 * of_entry * exact + subnormal).all()


@by_products
@by_batches
def test_a_factor_whose_scale_does_not_matter_has_no_counts(products: Products, batches: int) -> None:
    rows, counts = some_rows(), draw(4, N).square()
    counted, free = (factor_of([rows], [counts], products, batches, is_scale_free=free) for free in (False, True))
    assert torch.equal(counted.X.float(), free.X.float())
    assert free.counts is None and free.scale is None


@by_products
@by_batches
def test_an_empty_share_of_a_weight_makes_an_empty_product_and_no_gradient(products: Products, batches: int) -> None:
    factor = factor_of([torch.zeros(0, D)], [torch.zeros(0)], products, batches).of_batch(batch_of(0, batches))
    T = rotated(rounded_rotation(some_rotation(), products), factor)
    assert T.shape == (D, 0)
    assert factor.counts is not None and factor.counts.shape == (0,)
    assert factor.scale is not None and float(factor.scale) > 0
    gradient = gradient_of_rotation(factor, T.to(GRADIENT8) if products == FLOAT8 else T)
    assert gradient.shape == (D, D) and not gradient.any()


@by_products
def test_a_weight_of_zeros_counts_nothing_and_is_finite(products: Products) -> None:
    factor = factor_of([torch.zeros(N, D)], [torch.zeros(N)], products).of_batch(None)
    assert factor.counts is not None and factor.scale is not None
    assert not factor.X.float().any() and not factor.counts.any() and float(factor.scale) > 0


@by_products
def test_the_columns_of_a_factor_keep_what_belongs_to_them(products: Products) -> None:
    factor, span = factor_of([some_rows()], [draw(4, N).square()], products).of_batch(None), slice(16, 48)
    part = factor.columns(span)
    assert torch.equal(part.X.float(), factor.X.float()[:, span])
    assert part.counts is not None and factor.counts is not None and torch.equal(part.counts, factor.counts[span])
    assert part.scale is factor.scale
    if products == FLOAT8:
        assert part.mirrored is not None and torch.equal(part.mirrored.float(), part.X.float().mT)
    assert factor.columns(slice(0, N)) is factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT8, GRADIENT8], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("batches", [1, 2, 4])
def test_what_is_dealt_is_found_again_whatever_the_bits(dtype: torch.dtype, dim: int, batches: int) -> None:
    W = draw(5, 16, 32).to(dtype)
    hands = dealt(W, dim, batches)
    assert hands.is_contiguous() and hands.dtype is dtype
    for number in range(batches):
        found = one_of(hands, torch.tensor([number]))
        assert found.dtype is dtype
        assert torch.equal(found.float(), W.float()[number::batches] if dim == 0 else W.float()[:, number::batches])
    assert torch.equal(one_of(hands, None).float(), hands.float()[0])


ROTATIONS = {
    "identity": torch.eye(64),
    "near-identity": near_identity(64, 0.01),
    "less-near": near_identity(64, 0.03),
    "random": some_rotation(64),
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_columns_of_a_rotation_in_eight_bits_keep_their_lengths(kind: str) -> None:
    """Their sums of squares are in float32: d roundings each, of which a root and a quotient make d in all."""
    R = ROTATIONS[kind]
    rows, scale = rounded_rotation(R, FLOAT8)
    assert rows.dtype is FLOAT8 and rows.is_contiguous() and scale is not None
    exact = LARGEST8 * R.double().mT
    assert ((rows.double() - exact).abs() <= half_ulp8(exact)).all()
    lengths = (rows.double() * scale.double()[:, None]).norm(dim=1)
    assert ((lengths / R.double().norm(dim=0) - 1).abs() <= len(R) * FLOAT32).all()


def test_near_the_identity_the_lengths_of_eight_bits_alone_would_be_off() -> None:
    """Entries from 0.97 to 1 times 256 are all rounded to 256, as the one before is 240. Measured: 0.009."""
    rows, _ = rounded_rotation(ROTATIONS["near-identity"], FLOAT8)
    assert ((rows.double() / LARGEST8).norm(dim=1) - 1).abs().max() > 0.005


@pytest.mark.parametrize("products", [None, torch.bfloat16], ids=str)
def test_a_rotation_of_sixteen_bits_or_more_is_rounded_as_it_is(products: Products) -> None:
    rows, scale = rounded_rotation(ROTATIONS["random"], products)
    assert scale is None and torch.equal(rows, ROTATIONS["random"].to(products or torch.float32).mT)


def test_products_beside_those_of_eight_bits_have_sixteen() -> None:
    assert [sixteen_bits(products) for products in (None, torch.bfloat16, FLOAT8)] == [
        None,
        torch.bfloat16,
        torch.bfloat16,
    ]


def assert_product(found: Tensor, A: Tensor, B: Tensor, of_result: float) -> None:
    """A B^T: rounded by `of_result`, and once for each of the sums in float32, whose terms are exact or rounded too."""
    exact, terms = A.double() @ B.double().mT, A.double().abs() @ B.double().abs().mT
    assert ((found.double() - exact).abs() <= of_result * exact.abs() + 2 * A.shape[1] * FLOAT32 * terms).all()


@by_products
def test_products_are_those_of_the_rounded_factors(products: Products) -> None:
    factor = factor_of([some_rows()], None, products).of_batch(None)
    rotation = rounded_rotation(some_rotation(), products)
    of_result = FLOAT32 if products is None else U16
    T = rotated(rotation, factor)
    assert T.dtype is (torch.float32 if products is None else torch.bfloat16)
    assert_product(T, rotation.rows, factor.X.float().mT, of_result)
    gradients = (T.float() / T.float().abs().max() * LARGEST8 * draw(6, D, N)).to(
        GRADIENT8 if products == FLOAT8 else T.dtype
    )
    G = gradient_of_rotation(factor, gradients)
    assert G.dtype is T.dtype
    assert_product(G, factor.X, gradients.float(), of_result)


def test_gradients_of_columns_of_a_rotation_are_those_of_the_rounded_factors() -> None:
    factor = factor_of([some_rows()], None, FLOAT8).of_batch(None)
    rotation = rounded_rotation(some_rotation()[:, 16:32], FLOAT8)
    T = rotated(rotation, factor)
    assert_product(T, rotation.rows, factor.X.float().mT, U16)
    assert_product(gradient_of_rotation(factor, T.to(GRADIENT8)), factor.X, T.to(GRADIENT8).float(), U16)


def test_the_largest_values_that_there_can_be_do_not_overflow() -> None:
    """A column with one entry, which the rotation leaves alone or spreads evenly, or which it makes of an even one."""
    one = torch.zeros(16, 16)
    one[:, 3] = -1e4
    hadamard = torch.ones(1, 1)
    for _ in range(4):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    for R in (torch.eye(16), hadamard / 4):
        for rows in (one, hadamard):
            factor, rotation = factor_of([rows], None, FLOAT8).of_batch(None), rounded_rotation(R, FLOAT8)
            assert rotation.scale is not None
            assert float(factor.X.float().abs().max()) <= LARGEST8 and factor.X.float().isfinite().all()
            T = rotated(rotation, factor).float()
            assert float(T.abs().max()) <= LARGEST8**2
            T = T * rotation.scale[:, None]
            expected = R.mT @ (rows / rows.norm(dim=1, keepdim=True) * LARGEST8).mT
            assert torch.equal(T, expected)  # powers of two, all of them
            assert T.to(GRADIENT8).float().isfinite().all()


def moments(n: int, seed: int) -> Tensor:
    """H of inputs that are correlated and of unequal size."""
    X = draw(seed, n, n) * torch.logspace(0.3, -0.7, n) @ draw(seed + 1, n, 3 * n)
    return 2 / X.shape[1] * X @ X.mT


def problem(products: Products, is_weighed: bool = False) -> LayerProblem:
    weights = {
        name: draw(rows + i, rows, NUM_INPUTS[INPUT_OF[name]]) for i, (name, rows) in enumerate(NUM_ROWS.items())
    }
    hessians = {inputs: moments(n, 10 * i) for i, (inputs, n) in enumerate(NUM_INPUTS.items())}
    sensitivities = {}
    if is_weighed:
        sensitivities = {name: draw(50 + i, rows).exp() for i, (name, rows) in enumerate(NUM_ROWS.items())}
        sensitivities["value"] = torch.stack([moments(SIZES.head_dim, 60 + i) for i in range(2)])
        sensitivities |= {"output": torch.tensor(0.5), "down": torch.tensor(2.0)}
    return LayerProblem(weights, hessians, SIZES, sensitivities, products)


def objective_of(
    name: str, salience: str, products: Products, *, batches: int = 1, is_weighed: bool = False
) -> Objective:
    sparsity = SparsityConfig(keep=2, group=4)
    layer = problem(products, is_weighed)
    return build_objective(ObjectiveConfig(name=name), salience, sparsity, layer, 0.02, batches=batches)


def in_body_frame(R: Tensor, G: Tensor) -> Tensor:
    """What an optimizer makes of a gradient."""
    return R.mT @ G - (R.mT @ G).mT


def cosine(A: Tensor, B: Tensor) -> float:
    return float((A * B).sum() / A.norm() / B.norm())


@by_name
@pytest.mark.parametrize("salience", [salience for salience in SALIENCES if salience != "auto"])
@pytest.mark.parametrize("where", ["near-identity", "random"])
def test_an_objective_in_eight_bits_and_its_gradients_are_near(name: str, salience: str, where: str) -> None:
    """Bounds on what was measured here, not derived: of the loss at most 1.2e-3 in error; of the entropy's gradient by
    R1 0.045 to 0.071; of that of the pruning error, whose mask changes, 0.22 to 0.28, with a cosine of 0.961 or more.
    E4M3 rounds by 0.027 in root mean square and E5M2 by 0.053: independent for X, R and D, they make 0.065 together. By
    R2, of bfloat16, it is 0.01 at most, or 0.12 where the mask changes, with a cosine of 0.992 or more.
    """
    R2 = torch.linalg.qr(draw(7, 2, SIZES.head_dim, SIZES.head_dim)).Q
    R1 = near_identity(128, 0.02) if where == "near-identity" else some_rotation(128)
    loss, *gradients = with_gradients([objective_of(name, salience, FLOAT8)])(R1, R2)
    exact, *expected = with_gradients([objective_of(name, salience, None)])(R1, R2)
    assert float(loss) == pytest.approx(float(exact), rel=3e-3)
    of_R1, of_R2 = (in_body_frame(R, G) for R, G in zip((R1, R2), gradients, strict=True))
    exact_R1, exact_R2 = (in_body_frame(R, G) for R, G in zip((R1, R2), expected, strict=True))
    if name == "entropy":
        assert (of_R1 - exact_R1).norm() < 0.1 * exact_R1.norm()
        assert (of_R2 - exact_R2).norm() < 0.02 * exact_R2.norm()
    else:
        assert cosine(of_R1, exact_R1) > 0.95
        assert cosine(of_R2, exact_R2) > 0.985


@by_name
@pytest.mark.parametrize("is_weighed", [False, True], ids=["unweighed", "weighed"])
def test_batches_of_an_objective_in_eight_bits_are_near_those_of_float32(name: str, is_weighed: bool) -> None:
    R1, R2 = some_rotation(128), torch.linalg.qr(draw(7, 2, SIZES.head_dim, SIZES.head_dim)).Q
    low, high = (
        with_gradients([objective_of(name, "wanda", products, batches=2, is_weighed=is_weighed)])
        for products in (FLOAT8, None)
    )
    for number in (0, 1):
        loss, gradient, _ = low(R1, R2, torch.tensor([number]))
        exact, expected, _ = high(R1, R2, torch.tensor([number]))
        assert float(loss) == pytest.approx(float(exact), rel=3e-3)
        similarity = cosine(in_body_frame(R1, gradient), in_body_frame(R1, expected))
        assert similarity > (0.995 if name == "entropy" else 0.94)  # 0.9968 and 0.952 were measured


@by_name
def test_training_in_eight_bits_reaches_what_training_without_rounding_does(name: str) -> None:
    """Measured: 1.002 of the fall for the entropy, 0.9985 for the pruning error."""
    exact, start = objective_of(name, "wanda", None), Rotation.identity(SIZES)
    settings = OptimizerConfig(name="spectral", steps=30)
    reached = {}
    for products, precision in ((None, "highest"), (FLOAT8, "high")):
        objective = with_gradients([objective_of(name, "wanda", products)])
        trained = train_rotation(objective, start, settings, precision=precision).rotation
        reached[products] = float(exact(trained.R1, trained.R2))
    before = float(exact(start.R1, start.R2))
    fall = before - reached[None]
    assert fall > 0.1 * before
    assert before - reached[FLOAT8] > 0.99 * fall


def sizes_of(hidden: int = 64, intermediate: int = 128, heads: int = 4, groups: int = 2, head: int = 16) -> LayerSizes:
    return LayerSizes(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head,
    )


def of_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_is_rounded_on_a_cpu_unless_it_is_asked_for(stored: torch.dtype) -> None:
    assert choose_products(OptimizerConfig(), sizes_of(), stored, CPU) is None


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_gpu_takes_the_fastest_products_it_has_for_weights_of_sixteen_bits(
    capability: tuple[int, int], stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_capability(monkeypatch, capability)
    fastest = FLOAT8 if capability >= (8, 9) else torch.bfloat16
    expected = None if stored is torch.float32 else fastest
    assert choose_products(OptimizerConfig(), sizes_of(), stored, CUDA) == expected


ODD_SIZES = {
    "hidden": sizes_of(hidden=72),
    "intermediate": sizes_of(intermediate=136),
    "values": sizes_of(groups=1, head=24),
    "queries": sizes_of(heads=3, groups=1, head=8),
}


@pytest.mark.parametrize("kind", ODD_SIZES)
def test_sizes_that_eight_bits_cannot_have_take_sixteen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_capability(monkeypatch, (9, 0))
    assert choose_products(OptimizerConfig(), ODD_SIZES[kind], torch.bfloat16, CUDA) is torch.bfloat16


@pytest.mark.parametrize(("batches", "expected"), [(1, FLOAT8), (2, FLOAT8), (4, torch.bfloat16)])
def test_every_batch_has_to_have_sizes_of_eight_bits(
    batches: int, expected: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 values in 4 batches are 8 each."""
    of_capability(monkeypatch, (9, 0))
    assert choose_products(OptimizerConfig(batches=batches), sizes_of(), torch.bfloat16, CUDA) == expected


@pytest.mark.parametrize(
    ("name", "products"), [("float8", FLOAT8), ("bfloat16", torch.bfloat16), ("float32", None)], ids=str
)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_products_that_are_named_are_taken(
    name: str, products: Products, stored: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_capability(monkeypatch, (9, 0))
    assert choose_products(OptimizerConfig(products=name), sizes_of(), stored, device) == products


def test_a_gpu_without_products_of_eight_bits_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    of_capability(monkeypatch, (8, 6))
    with pytest.raises(ValueError, match=r"^optimizer.products=float8 needs a GPU of compute capability 8\.9\. Use"):
        choose_products(OptimizerConfig(products="float8"), sizes_of(), torch.bfloat16, CUDA)
    assert choose_products(OptimizerConfig(products="bfloat16"), sizes_of(), torch.bfloat16, CUDA) is torch.bfloat16


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_sizes_that_eight_bits_cannot_have_are_refused_with_what_they_are(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_capability(monkeypatch, (9, 0))
    message = r"float8 needs sizes that 32 divides, not 72, 128, 32, 64\. Use bfloat16 or auto\.$"
    with pytest.raises(ValueError, match=message):
        choose_products(OptimizerConfig(products="float8", batches=2), sizes_of(hidden=72), torch.bfloat16, device)
