"""The noise of a training step: drawn per sample, offset if asked for, and paired with the pictures if asked for.

B samples of C channels and H × W latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...data.order import generator


def draw_noise(shape: Sequence[int], seed: int, step: int, row: int, offset: float = 0.0) -> Tensor:
    """Standard normal noise [C, H, W] of row `row` of a step; with `offset` o, plus o·N(0,1), constant in each channel.

    The offset (Guttenberg 2023, "Diffusion with Offset Noise") lets training change the mean brightness and colour of a
    picture, which plain noise hardly touches. It is a draw of its own: the rest of the noise does not depend on it.
    """
    noise = torch.randn(tuple(shape), generator=generator(seed, "noise", step, row))
    if offset:
        noise += offset * torch.randn(shape[0], 1, 1, generator=generator(seed, "noise offset", step, row))
    return noise


def pair_noise(latents_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """The same noises in the order in which Σ ‖x₀ − ε‖² over the batch is smallest.

    Minibatch optimal transport (Pooladian et al. 2023, "Multisample Flow Matching"; Tong et al. 2023, "Improving and
    generalizing flow-based generative models with minibatch optimal transport"): straighter paths, less variance in the
    target. Each noise is still used once, so that over a batch it stays what was drawn. A batch of one is unchanged;
    the gain grows with the batch.
    """
    x0, noise = latents_BCHW.flatten(1).double(), noise_BCHW.flatten(1).double()
    # ‖x₀ − ε‖² = ‖x₀‖² + ‖ε‖² − 2x₀·ε, and the squares are in every assignment.
    return noise_BCHW[assign((-x0 @ noise.T).numpy())]


def assign(cost: np.ndarray) -> list[int]:
    """The column of each row in the cheapest assignment of a square matrix [n, n] of finite costs.

    The Hungarian method by shortest augmenting paths (Jonker & Volgenant 1987), O(n³): exact, 64 rows in well under a
    second.
    """
    n = len(cost)
    row_price, column_price = np.zeros(n), np.zeros(n)
    row_of = np.full(n, -1)
    for start in range(n):
        # Dijkstra over columns, by reduced cost, from the free row `start` to the nearest free column.
        distance, came_from = np.full(n, np.inf), np.full(n, -1)
        done = np.zeros(n, dtype=bool)
        row, column, reached = start, -1, 0.0
        reached_rows, reached_at = [start], [0.0]
        while True:
            through = reached + cost[row] - row_price[row] - column_price
            better = ~done & (through < distance)
            distance[better], came_from[better] = through[better], column
            column = int(np.where(done, np.inf, distance).argmin())
            reached = float(distance[column])
            if row_of[column] < 0:
                break
            done[column] = True
            row = int(row_of[column])
            reached_rows.append(row)
            reached_at.append(reached)
        # Prices that keep every reduced cost ≥ 0 and those on the path 0.
        row_price[reached_rows] += reached - np.array(reached_at)
        column_price[done] -= reached - distance[done]
        while column >= 0:
            previous = int(came_from[column])
            row_of[column] = start if previous < 0 else row_of[previous]
            column = previous
    columns = np.empty(n, dtype=int)
    columns[row_of] = np.arange(n)
    return columns.tolist()
