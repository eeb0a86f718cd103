"""What oracle.py is made of, against closed forms. Its layers: test_golden.py."""

import numpy as np

import oracle
from layers import error


def test_expm():
    c, s = np.cos(30.0), np.sin(30.0)
    rotation = oracle.expm(np.array([[0.0, -30.0], [30.0, 0.0]]))
    assert error(rotation, [[c, -s], [s, c]]) <= 1e-10
    assert error(oracle.expm(np.array([[0.0, 5.0], [0.0, 0.0]])), [[1, 5], [0, 1]]) <= 1e-10
    assert error(oracle.expm(np.zeros((3, 3))), np.eye(3)) <= 1e-10
    A = np.random.default_rng(0).standard_normal((6, 6))
    w, V = np.linalg.eig(A)
    assert error(oracle.expm(A), (V * np.exp(w) @ np.linalg.inv(V)).real) <= 1e-10


def test_zoh():
    A = np.random.default_rng(0).standard_normal((4, 4)) - 2 * np.eye(4)
    B = np.random.default_rng(1).standard_normal((4, 2))
    A_bar, B_bar = oracle.zoh(A, B, 0.3)
    assert error(A_bar, oracle.expm(0.3 * A)) <= 1e-10
    assert error(B_bar, np.linalg.solve(A, (A_bar - np.eye(4)) @ B)) <= 1e-10
    # singular: position and velocity under a constant force
    integrator = np.array([[0.0, 1.0], [0.0, 0.0]])
    A_bar, B_bar = oracle.zoh(integrator, np.array([0.0, 1.0]), 0.5)
    assert error(A_bar, [[1, 0.5], [0, 1]]) <= 1e-10 and error(B_bar, [0.125, 0.5]) <= 1e-10
