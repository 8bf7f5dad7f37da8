"""NumPy float64 references, which judge the JAX implementations."""

import numpy as np


def lorsum(anchor, weight, rest, num_iters=1, regularization=0.0, first="a", shrinkage=0.0):
    """LoRSum for the anchor (a0, b0) at scale 1 and the dense sum of the other terms.

    A solve is the ridge regression |S - a b|^2 + regularization |a - a0|^2 + shrinkage |a|^2 over a, by
    least squares for the change a - a0.
    """
    (a0, b0), half_steps = anchor, []
    total = weight * a0 @ b0 + rest
    near, small = (np.sqrt(z) * np.eye(a0.shape[1]) for z in (regularization, shrinkage))

    def change(design, target, start):
        design, target = np.vstack([design, near, small]), np.vstack([target, 0 * start, -small @ start])
        return start + np.linalg.lstsq(design, target)[0]

    solve_a = lambda b: change(b.T, (total - a0 @ b).T, a0.T).T
    solve_b = lambda a: change(a, total - a @ b0, b0)

    a, b = (a0, b0) if num_iters else (solve_a(b0), solve_b(a0))
    for half in range(2 * num_iters):
        a, b = (solve_a(b), b) if (half % 2 == 0) == (first == "a") else (a, solve_b(a))
        half_steps.append((a, b))
    return a, b, half_steps


def objective(total, anchor, factors, regularization):
    """|S - a b|^2 + regularization (|a - a0|^2 + |b - b0|^2)."""
    (a0, b0), (a, b) = anchor, factors
    square = lambda z: float(np.sum(np.asarray(z, np.float64) ** 2))
    return square(total - a @ b) + regularization * (square(a - a0) + square(b - b0))


def truncated_svd(matrix, rank):
    """The best approximation of a matrix by one of that rank."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def oplora_step(factors, moments, gradient, lr, mu, dampening=0.0, num_iters=1, ridge=0.0, weight=1.0):
    """One OPLoRA step at scale 1: the new factors and the new factors of the momentum."""
    step = -lr * (1 - dampening) * gradient - lr * mu * (moments[0] @ moments[1])
    new = lorsum(factors, weight, step, num_iters, ridge)
    shrinkage = min(1e-6, 2e-3 * ridge)
    # Of a Jacobi step the momentum would diverge.
    ma, mb, _ = lorsum(moments, mu, (1 - dampening) * gradient, max(num_iters, 1), ridge, shrinkage=shrinkage)
    root = max(1.0, np.sqrt(np.linalg.norm(mb) / np.linalg.norm(ma)))
    return new[:2], (ma * root, mb / root)
