"""Energies of input columns against explicit inverses, and weights of outputs against explicit products."""

from __future__ import annotations

import pytest
import torch
from test_objectives import DAMPING, energy_reference, generator, moments, random_rotation

from drotator.energies import column_energy, energy_moments, output_weights, rotated_energy


@pytest.mark.parametrize("salience", ["wanda", "obs", "sequential_obs"])
def test_energies_are_those_of_the_explicit_inverse_in_any_basis(salience: str) -> None:
    H, R = moments(24, 3), random_rotation().R1
    torch.testing.assert_close(column_energy(H, R, salience, DAMPING), energy_reference(R.T @ H @ R, salience))
    torch.testing.assert_close(column_energy(H, None, salience, DAMPING), energy_reference(H, salience))
    single = column_energy(H.float(), R.float(), salience, DAMPING)
    assert single.dtype is torch.float32
    torch.testing.assert_close(single.double(), energy_reference(R.T @ H @ R, salience), rtol=1e-3, atol=0)


@pytest.mark.parametrize("salience", ["wanda", "obs", "sequential_obs"])
def test_a_batch_of_blocks_stands_for_a_block_diagonal_rotation(salience: str) -> None:
    H, blocks = moments(24, 3), random_rotation().R2
    whole = torch.block_diag(*blocks)
    torch.testing.assert_close(column_energy(H, blocks, salience, DAMPING), column_energy(H, whole, salience, DAMPING))


@pytest.mark.parametrize("salience", ["wanda", "obs", "sequential_obs"])
def test_gradients_of_energies_are_those_of_finite_differences(salience: str) -> None:
    M = energy_moments(moments(12, 3), salience, DAMPING)
    R = torch.linalg.qr(torch.randn(12, 12, generator=generator(0), dtype=torch.float64)).Q.requires_grad_()
    assert torch.autograd.gradcheck(lambda R: rotated_energy(M, R, salience), (R,))


def test_outputs_weigh_by_what_is_made_of_them_in_the_basis_of_their_reader() -> None:
    G, R = torch.stack([moments(12, 1), moments(12, 2)]), random_rotation().R2
    expected = torch.cat([torch.diagonal(r.T @ g @ r) for g, r in zip(G, R, strict=True)])
    torch.testing.assert_close(output_weights(G, R), expected)
    one, each = torch.tensor(0.7), torch.rand(5)
    assert output_weights(one, R[0]) is one and output_weights(each, R[0]) is each
    assert output_weights(G, None) is G
