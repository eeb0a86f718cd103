"""S4, the structured state space layer with a dense state matrix, and S4D and its relatives as options.

    Gu, Goel, Re: Efficiently Modeling Long Sequences with Structured State Spaces (2021), arXiv 2111.00396
    Gu, Johnson, Timalsina, Rudra, Re: How to Train Your HiPPO (2022), arXiv 2206.12037
    Gu, Gupta, Goel, Re: On the Parameterization and Initialization of Diagonal State Space Models (2022),
    arXiv 2206.11893

`python s4.py` checks all modes against each other, `python s4.py figures/s4.png` draws the figure.

The model is the one of lssl.py: every feature u(t) drives n states, x' = A x + B u, y = C x + D u, sampled to

    x_k = A_bar x_{k-1} + B_bar u_k,     y_k = C x_k + D u_k,     K_k = C A_bar^k B_bar.              (1)

What was wrong before. The HiPPO matrices, with which long memory works, are dense, and powers of a dense
matrix cost n^3. They cannot be diagonalized in floating point either: the eigenvectors of HiPPO-LegS have
entries that grow exponentially with n.

The idea. A HiPPO matrix is normal plus low rank (NPLR), and a normal matrix has orthogonal eigenvectors V. In
that basis A is diagonal minus low rank, with conjugate pairs of which one half is kept:

    A = V (Lambda - P P*) V*,     r = rank P = 1 or 2.                                                (2)

From here on A, B, C and x are written in that basis.

The kernel. Its generating function sums the geometric series of (1), with the bilinear transform

    K^(z) = sum_k K_k z^k = C (1 - z A_bar)^{-1} B_bar = 2/(1+z) C (s - A)^{-1} B,  s = 2/dt (1-z)/(1+z).  (3)

With R = (s - Lambda)^{-1}, which is diagonal, the Woodbury identity leaves only an r x r inverse:

    C (s - A)^{-1} B = C R B - C R P (1 + P* R P)^{-1} P* R B.

Its factors are Cauchy sums sum_n v_n / (s - Lambda_n) with v = C B, C P, P* B or P* P. A conjugate pair adds
2 (s Re v - Re(v Lambda*)) / (s^2 - 2 s Re Lambda + |Lambda|^2). All sums share these denominators: one
complex array (h, n/2, nodes).

Differs from the paper: (3) is evaluated on a circle of radius q < 1, z_j = q exp(-2 pi i j / M), and

    K_k = q^{-k} irfft(K^(z_j))_k - q^M K_{k+M} - ...                                                 (4)

drops the last terms. With M >= l and q^M = 1e-8, that error and the rounding of double precision amplified by
q^{-k} are both 1e-8 (float64 layers: M >= 2l and 2e-11; Abate and Whitt 1992 invert generating functions so).
The paper takes q = 1, where nothing decays: its parameter is C (1 - A_bar^l), tied to one length l and one
rate, and the node z = -1 is a pole. Here C is C, and any length and rate just work.

Why bilinear? (3) needs only s - A. Zero-order hold would need the exponential of a dense matrix. In mode
"diag" it is the other way round, as s4d.py explains.

State and step use a real form: x = [Re; Im] of the kept half, p = [Re P; Im P], and the real n x n matrix
A = [[Re Lambda, -Im Lambda], [Im Lambda, Re Lambda]] - 2 p p^T, y = 2 [Re C, -Im C] x.

What is trained: log_dt, Lambda, P, B, C, D. But for real_type "none", Re Lambda < 0 by construction, so that
A + A* < 0 and every eigenvalue of A_bar has modulus < 1 (Goel, Gu, Donahue, Re, arXiv 2202.09729).

Symbols: b batch, h features (d_model; with a bottleneck, those of the SSM), n states (d_state; n/2 are
stored), l length, m channels (bidirectional: twice as many), r rank; u (b, h, l), y (b, m h, l); x (b, h, n)
real, in mode "diag" (b, h, n/2) complex. Of c copies of (A, B), feature i uses copy i mod c.
"""

import math
import sys
import time
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn


COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


# ---- arguments ----

def require(ok: bool, name: str, value, remedy: str) -> None:
    """Raise a ValueError that names the argument, the value received and the remedy."""
    if not ok:
        raise ValueError(f"{name} = {value!r}: {remedy}")


def check_number(name: str, value, kind: type = float, even: bool = False) -> None:
    """value must be a positive, finite number; with kind=int a whole one."""
    ok = isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 < value < math.inf
    remedy = f"pass a positive {'even ' * even}int" if kind is int else "pass a positive, finite number"
    require(ok and not (even and value % 2), name, value, remedy)


def check_tensor(name: str, x, shape: tuple, kind: str = "floating_point") -> None:
    """x must be a tensor of this kind and shape, in which a letter stands for any size from 1 up."""
    ok = isinstance(x, Tensor) and getattr(x, f"is_{kind}")() and x.ndim == len(shape)
    ok = ok and all(got > 0 if isinstance(want, str) else got == want for got, want in zip(x.shape, shape))
    got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else x
    require(ok, name, got, f"pass a {kind.replace('_', ' ')} tensor ({', '.join(map(str, shape))})")


def learning_rates(layer: nn.Module, lr, names: dict) -> dict:
    """{parameter: learning rate} for lr = one rate, a dict by short name (1e-3 if left out) or None (empty).

    names: {short name: its parameters}. The rate 0.0 freezes a parameter.
    """
    rates = {} if lr is None else dict.fromkeys(names, 1e-3 if isinstance(lr, dict) else lr)
    rates |= lr if isinstance(lr, dict) else {}
    for short, rate in rates.items():
        ok = short in names and isinstance(rate, (int, float)) and 0 <= rate < math.inf
        require(ok, "lr", lr, f"pass None, a rate >= 0, or a dict of such rates for {', '.join(names)}")
    found = {name: rate for short, rate in rates.items() for name in names[short]}
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(found.get(name, 1.0) > 0)
    return {name: float(found[name]) for name, _ in layer.named_parameters() if name in found}


# ---- the matrix A: HiPPO, and its normal plus low-rank form ----

def hippo(measure: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (n, n), B (n) and the low-rank correction P (r, n), real, for which A + P^T P is normal.

    legs, all of the past: A_ij = -sqrt((2i+1)(2j+1)) for i > j, -(i+1) for i = j (arXiv 2111.00396, eq. 2)
    legt, a sliding window of length 2: A_ij = -sqrt((2i+1)(2j+1)) / 2, times (-1)^(i-j) for i < j, half of
        lssl.py's (arXiv 2206.12037)
    fout, a window in a Fourier basis: rotations by pi j, minus B B^T (arXiv 2206.12037)
    """
    require(measure in ("legs", "legt", "fout"), "measure", measure, "choose legs, legt or fout")
    i = torch.arange(n, dtype=torch.float64)
    root = torch.sqrt(2 * i + 1)
    if measure == "legs":
        A = -torch.tril(torch.outer(root, root), -1) - torch.diag(i + 1)
        return A, root, root[None] / 2 ** 0.5
    if measure == "legt":
        signs = torch.where(i[:, None] < i, (-1) ** (i[:, None] - i), 1.0)
        P = torch.stack([root * (1 - i % 2), root * (i % 2)]) / 2 ** 0.5     # even and odd i
        return -torch.outer(root, root) * signs / 2, root / 2, P
    B = 2 ** 0.5 * (1 - i % 2)
    B[0] = 1
    rotation = torch.diag((math.pi * (i // 2) * (i % 2))[1:], -1)
    return rotation - rotation.mT - torch.outer(B, B), B, B[None]


def nplr(measure: str, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equation (2), half with Im Lambda >= 0: Lambda (n/2), P (r, n/2), B (n/2), V (n, n/2), complex128.

    A + P^T P = -c + S with S skew-symmetric: V are the eigenvectors of the Hermitian -i S, B becomes V* B.
    """
    A, B, P = hippo(measure, n)
    normal = A + P.mT @ P
    if measure == "fout":     # blocks of two; for the double eigenvalue 0, eigh returns no conjugate pair
        imag = math.pi * torch.arange(n // 2, dtype=torch.float64)
        V = torch.complex(torch.eye(n).double()[:, ::2], -torch.eye(n).double()[:, 1::2]) / 2 ** 0.5
    else:
        imag, V = torch.linalg.eigh(-1j * (normal - normal.mT) / 2)
        imag, V = imag[n // 2:], V[:, n // 2:]
    Lambda = torch.complex(normal.diagonal().mean().expand(n // 2), imag)
    return Lambda, P.to(V.dtype) @ V.conj(), V.mH @ B.to(V.dtype), V


def diagonal(measure: str, copies: int, n: int) -> Tensor:
    """The initial Lambda of mode "diag" (arXiv 2206.11893, section 4), Im >= 0: (copies, n/2) complex128.

    diag-rand: -Re log-uniform in (1e-3, 1), Im uniform in (0, pi), for dt_min = dt_max = 1 as in gss.py.
    """
    i = torch.arange(n // 2, dtype=torch.float64).expand(copies, -1)
    real, imag = {"diag-lin": lambda: (0 * i + 0.5, math.pi * i),
                  "diag-inv": lambda: (0 * i + 0.5, n / math.pi * (n / (2 * i + 1) - 1)),
                  "diag-quad": lambda: (0 * i + 0.5, (2 * i + 1) ** 2 / math.pi),
                  "diag-real": lambda: (1 + i, 0 * i),
                  "diag-legs": lambda: (0 * i + 0.5, 0 * i + nplr("legs", n)[0].imag.flip(0)),
                  "diag-rand": lambda: (1e-3 ** torch.rand_like(i), math.pi * torch.rand_like(i))}[measure]()
    return torch.complex(-real, imag)


MEASURES = {"nplr": ("legs", "legt", "fout", "hippo"),
            "diag": ("diag-lin", "diag-inv", "diag-quad", "diag-real", "diag-legs", "diag-rand", "diag")}
MIXED = {"hippo": ("legs", "fout"), "diag": ("diag-inv", "diag-lin")}        # on alternating features
DISCS = {"nplr": ("bilinear",), "diag": ("zoh", "bilinear", "dss")}
REAL_TYPES = {   # -Re A as a function of the parameter, and the inverse; "none" does not keep it positive
    "exp": (torch.exp, torch.log),
    "relu": (lambda raw: raw.relu() + 1e-4, lambda value: (value - 1e-4).clamp(min=1e-4)),
    "softplus": (nn.functional.softplus, lambda value: value + torch.log(-torch.expm1(-value))),
    "none": (lambda raw: raw, lambda value: value),
}


# ---- discretization of a diagonal A ----

def phi(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z, which is 1 at z = 0. Near 0 the difference would cancel: there its Taylor series."""
    small = z.abs() < 0.02
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7)))))
    z = torch.where(small, 1, z)             # or the branch not taken would turn gradients into 0 * inf = nan
    return torch.where(small, series, (z.exp() - 1) / z)


def discretize_zoh(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold: A_bar = exp(dt A), B_bar = A^-1 (exp(dt A) - 1) B."""
    return torch.exp(dt * A), dt * phi(dt * A) * B


def discretize_bilinear(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear transform: A_bar = (1 + dt A / 2) / (1 - dt A / 2), B_bar = dt B / (1 - dt A / 2)."""
    return (1 + dt * A / 2) / (1 - dt * A / 2), dt * B / (1 - dt * A / 2)


def discretize_softmax(Lambda: Tensor, W: Tensor, dt: Tensor, rate: float,
                       l_max: int) -> tuple[Tensor, Tensor]:
    """B_bar and C of DSS-softmax: C B_bar = W (e^{rate z} - 1) / (Lambda (e^{l_max z} - 1)), z = dt Lambda.

    Zero-order hold of B = 1, and the normalizer in C. 1/x is conj(x) / (|x|^2 + 1e-7), finite at 0. As in
    dss.py, x includes Lambda.
    """
    x = (torch.exp(l_max * dt * Lambda) - 1) * Lambda
    return rate * dt * phi(rate * dt * Lambda), W * Lambda * x.conj() / (x.real ** 2 + x.imag ** 2 + 1e-7)


class Discrete(NamedTuple):
    """The recurrence (1) with y = Re(C x), so that C holds the factor 2 of the pairs (disc dss has none).

    nplr: A_bar (h, n, n), B_bar (h, n), C (m, h, n) real; diag: A_bar, B_bar (h, n/2), C (m, h, n/2) complex.
    """
    A_bar: Tensor
    B_bar: Tensor
    C: Tensor


# ---- the kernel of A = Lambda - P P* ----

def nplr_kernel(Lambda: Tensor, B: Tensor, P: Tensor, C: Tensor, dt: Tensor, l: int, exact: bool) -> Tensor:
    """K_0 ... K_{l-1} by equations (3) and (4): (m, h, l) float64.

    Lambda, B (h, n/2), P (r, h, n/2), C (m, h, n/2) complex128 halves of conjugate pairs, dt (h).
    exact: 2e-11 instead of 1e-8, from twice as many nodes
    """
    M = min(odd << ((l - 1) // odd).bit_length() for odd in (1, 3, 5)) * (2 if exact else 1)     # >= l, fast
    radius = (2e-11 if exact else 1e-8) ** (1 / M)
    j = torch.arange(M // 2 + 1, dtype=torch.float64, device=dt.device)
    # dt s = 2 (1 - z) / (1 + z) = 2 tanh(x / 2) for z = exp(-x): without cancellation near z = 1
    s = 2 * torch.tanh(torch.complex(torch.full_like(j, -math.log(radius)), 2 * math.pi / M * j) / 2)
    w = dt[:, None] * Lambda
    # the denominators of all features, states and nodes: (h, n/2, nodes)
    G = (s ** 2 - 2 * s * w.real[..., None] + (w.real ** 2 + w.imag ** 2)[..., None]).reciprocal()
    # all Cauchy sums 2 (s Re v - Re(v w*)) G as a table: rows C_1 ... C_m, P_1* ... P_r*, columns B, P_1 ...
    rows, columns = torch.cat([C, P.conj()]), dt[:, None] * torch.cat([B[None], P])
    v = torch.einsum("ahn,chn->hacn", rows, columns)
    v = torch.stack([v.real, -(v * w[:, None, None].conj()).real], 1)        # (h, 2, m + r, 1 + r, n/2)
    v = torch.einsum("hvn,hnjc->hvjc", v.flatten(1, 3), torch.view_as_real(G)).unflatten(1, v.shape[1:4])
    table = 2 * (s * torch.view_as_complex(v[:, 0]) + torch.view_as_complex(v[:, 1]))
    # Woodbury: with 1 + P* (s - Lambda)^{-1} P in the corner, eliminate its r rows and columns, one by one
    # (in any order: Re Lambda < Re s keeps the pivots away from 0)
    one = torch.eye(len(P), dtype=dt.dtype, device=dt.device)
    table = table + nn.functional.pad(one, (1, 0, len(C), 0))[:, :, None]
    for _ in range(len(P)):
        table = table[:, :-1, :-1] - table[:, :-1, -1:] * table[:, -1:, :-1] / table[:, -1:, -1:]
    K = torch.fft.irfft((1 + s / 2) * table[:, :, 0], M)[..., :l]            # 2 / (1 + z) = 1 + s / 2
    return K.transpose(0, 1) * radius ** -torch.arange(l, dtype=torch.float64, device=dt.device)


def diagonal_kernel(A_bar: Tensor, CB: Tensor, l: int, dtype: torch.dtype) -> Tensor:
    """Re sum_n CB_n A_bar_n^k: A_bar (h, n/2), CB (m, h, n/2) -> (m, h, l), with k = jT + i as in s4d.py.

    Each square doubles the powers at hand: first those of i, up to about sqrt(l), then those of jT.
    """
    low, high, power = torch.ones_like(A_bar)[:, None], CB[:, :, None], A_bar[:, None]
    digits = (l - 1).bit_length()
    for digit in range(digits):              # power is A_bar^(2^digit)
        if 2 * digit < digits:
            low = torch.cat([low, low * power], 1)                           # A_bar^i: (h, T, n/2)
        else:
            high = torch.cat([high, high * power], 2)                        # CB A_bar^{jT}: (m, h, J, n/2)
        power = power * power
    return (high.to(COMPLEX[dtype]) @ low.to(COMPLEX[dtype]).mT).real.flatten(2)[..., :l]


# ---- powers of a dense matrix, by squaring ----

def squares(A_bar: Tensor, l: int) -> list[Tensor]:
    """A_bar, A_bar^2, A_bar^4, ..., each (h, n, n), as many as l - 1 has binary digits (at least one)."""
    powers = [A_bar]
    while 2 ** len(powers) < l:
        powers.append(powers[-1] @ powers[-1])
    return powers


def krylov(powers: list[Tensor], x: Tensor) -> Tensor:
    """x_k A_bar^i for i < 2^len(powers), the rows for i one block: (h, k, n) -> (h, 2^len(powers) k, n)."""
    for power in powers:
        x = torch.cat([x, x @ power], 1)
    return x


def split_digits(powers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The squares that make up A_bar^i, i < T, and those of A_bar^{jT}, where k = jT + i, T a power of 2."""
    return powers[:len(powers) // 2 + 2], powers[len(powers) // 2 + 2:]      # T = 4 sqrt(l) is fastest


def output_of_dense_state(C: Tensor, powers: list[Tensor], x: Tensor) -> Tensor:
    """C A_bar^k x for the states x (b, h, n), C (h, m, n) and k < JT, by two digits of k: (b, m, h, JT)."""
    low, high = split_digits(powers)
    rows = krylov(low, C)                                                    # C A_bar^i: (h, T m, n)
    x = krylov([power.mT for power in high], x.transpose(0, 1))              # A_bar^{jT} x: (h, J b, n)
    y = (x @ rows.mT).unflatten(2, (-1, C.shape[1])).unflatten(1, (2 ** len(high), -1))    # (h, J, b, T, m)
    return y.permute(2, 4, 0, 1, 3).flatten(-2)


def dense_state_of_input(B_bar: Tensor, powers: list[Tensor], u: Tensor) -> Tensor:
    """The state that u (b, h, l) leaves: sum_k A_bar^{l-1-k} B_bar u_k with B_bar (h, n), (b, h, n)."""
    low, high = split_digits(powers)
    T, J = 2 ** len(low), 2 ** len(high)
    columns = krylov([power.mT for power in low], B_bar[:, None]).flip(1)    # A_bar^{T-1-i} B_bar: (h, T, n)
    u = nn.functional.pad(u, (J * T - u.shape[-1], 0)).unflatten(-1, (J, T))     # zeros in front add nothing
    x = torch.einsum("bhji,hin->hjbn", u, columns)                           # each block of T by itself, ...
    for power in high:                                                       # ... then pairs of blocks
        x = (x[:, ::2].flatten(1, 2) @ power.mT).unflatten(1, (-1, u.shape[0])) + x[:, 1::2]
    return x[:, 0].transpose(0, 1)


def advance(powers: list[Tensor], x: Tensor, k: int) -> Tensor:
    """A_bar^k x for x (b, h, n), by the binary digits of k < 2^len(powers)."""
    x = x.transpose(0, 1)
    for digit, power in enumerate(powers):
        x = x @ power.mT if k >> digit & 1 else x
    return x.transpose(0, 1)


def fft_conv(u: Tensor, K: Tensor) -> Tensor:
    """Causal convolution y_k = sum_{i <= k} K_i u_{k-i} of u (.., l) with K (.., l), broadcast.

    The FFT convolves on a circle: zeros up to length 2l - 1 or more keep the end out of the beginning. It is
    fast for lengths 2^i, 3 2^i and 5 2^i.
    """
    l = u.shape[-1]
    size = min(odd << ((2 * l - 2) // odd).bit_length() for odd in (1, 3, 5))
    return torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(K, size), size)[..., :l]


# ---- the layer ----

def stack(x: Tensor) -> Tensor:
    """A complex vector as a real one: [Re x; Im x], (.., n/2) -> (.., n)."""
    return torch.cat([x.real, x.imag], -1)


def real_form(Lambda: Tensor, P: Tensor) -> Tensor:
    """Lambda - P P* as a real matrix acting on [Re x; Im x]: (h, n/2), (r, h, n/2) -> (h, n, n)."""
    a, b, p = torch.diag_embed(Lambda.real), torch.diag_embed(Lambda.imag), stack(P)
    rotation = torch.cat([torch.cat([a, -b], -1), torch.cat([b, a], -1)], -2)
    return rotation - 2 * torch.einsum("rhi,rhj->hij", p, p)


def channel_map(linear: nn.Linear, u: Tensor) -> Tensor:
    """A linear layer over the features of u (b, h, l)."""
    return linear.weight @ u.to(linear.weight.dtype) + linear.bias[:, None]


class S4(nn.Module):
    """State space layer (b, h, l) -> (b, m h, l): the SSM with D; with gate or bottleneck the block of GSS.

    d_model, d_state: number of features h; number of states n per feature (even)
    mode: "nplr" (S4) or "diag" (S4D and relatives)
    measure: initial A. nplr: "legs", "legt", "fout", "hippo" (legs and fout on alternating features); diag:
        "diag-lin", "diag-inv", "diag-quad", "diag-real", "diag-legs", "diag-rand", "diag" (inv and lin); the
        default legs stands for diag-legs in mode diag
    disc: nplr: "bilinear" (default). diag: "zoh" (default), "bilinear", "dss" (kernel of DSS, needs l_max)
    real_type: -Re Lambda is "exp", "relu" or "softplus" of its parameter, or with "none" the parameter, and
        then nothing keeps the system stable (but the optimizer's luck), and the nplr kernel is wrong once a
        state grows by 1e8 (float64: 2e5) over l
    rank: rank of P, at least that of the measure (default); more columns start as small noise
    n_ssm: number of different (A, B), a divisor of h (default: h, one for each feature)
    channels: number m of outputs per feature; channel c of feature i is output c h + i of the SSM
    bidirectional: add sum_{j >= 1} K'_{j-1} u_{k+j} with a second C; no state and no step then
    gate, bottleneck: y = W_o((W_y SSM(GELU(W_u u))) * GELU(W_v u)), the SSM on h / bottleneck features, the
        gate with d_model gate features (see gss.py); each can be used without the other
    l_max: the length over which disc "dss" normalizes; sequences may be longer
    dt_min, dt_max: the initial step sizes are log-uniform in between, in the unit of time of A
    lr: learning rates of dt, A (with P) and B for the optimizer, recorded in `ssm_lr` (see learning_rates)
    Raises ValueError for any other value.
    """

    def __init__(self, d_model: int, d_state: int = 64, *, mode: str = "nplr", measure: str = "legs",
                 disc: Optional[str] = None, real_type: str = "exp", rank: Optional[int] = None,
                 n_ssm: Optional[int] = None, channels: int = 1, bidirectional: bool = False,
                 gate: Optional[int] = None, bottleneck: Optional[int] = None, l_max: Optional[int] = None,
                 dt_min: float = 1e-3, dt_max: float = 1e-1, lr=1e-3):
        super().__init__()
        sizes = {"d_model": d_model, "d_state": d_state, "channels": channels}
        options = {"rank": rank, "n_ssm": n_ssm, "gate": gate, "bottleneck": bottleneck, "l_max": l_max}
        for name, value in (sizes | {name: v for name, v in options.items() if v is not None}).items():
            check_number(name, value, int, even=name == "d_state")
        check_number("dt_min", dt_min)
        check_number("dt_max", dt_max)
        require(dt_min <= dt_max, "dt_max", dt_max, f"pass at least dt_min = {dt_min}")
        require(mode in tuple(MEASURES), "mode", mode, "choose nplr or diag")
        measure = "diag-legs" if (mode, measure) == ("diag", "legs") else measure
        disc = DISCS[mode][0] if disc is None else disc
        for name, value, known in (("measure", measure, MEASURES[mode]), ("disc", disc, DISCS[mode]),
                                   ("real_type", real_type, tuple(REAL_TYPES)),
                                   ("bidirectional", bidirectional, (True, False))):
            ok = type(value) is type(known[0]) and value in known            # 1 is not True
            require(ok, name, value, f"choose one of {', '.join(map(str, known))}")
        if disc == "dss":
            require(l_max is not None, "l_max", l_max, "disc dss needs the length that it normalizes over")
            require(real_type != "none", "real_type", real_type, "disc dss needs Re Lambda < 0, see dss.py")
        require(d_model % (bottleneck or 1) == 0, "bottleneck", bottleneck, f"pass a divisor of {d_model}")
        h, n, m = d_model // (bottleneck or 1), d_state, channels * (1 + bidirectional)
        names, copies = MIXED.get(measure, (measure,)), h if n_ssm is None else n_ssm
        require(h % len(names) == 0, "measure", measure, f"pass a multiple of {len(names)} features, not {h}")
        ok = h % copies == 0 and copies % len(names) == 0
        require(ok, "n_ssm", n_ssm, f"pass a divisor of {h} that is a multiple of {len(names)}")
        self.d_model, self.h, self.d_state, self.channels, self.l_max = d_model, h, n, channels, l_max
        self.mode, self.disc, self.real_type, self.bidirectional = mode, disc, real_type, bidirectional

        parts = zip(*(self._initial(name, copies // len(names), n, rank) for name in names))
        Lambda, P, B = (torch.stack(part, -2).flatten(-3, -2) for part in parts)             # alternating
        real, dtype = (-Lambda.real).clamp(min=1e-4), torch.get_default_dtype()     # legt and fout: Re = 0
        self.log_dt = nn.Parameter(math.log(dt_min) + torch.rand(h) * math.log(dt_max / dt_min))
        self.log_A_real = nn.Parameter(REAL_TYPES[real_type][1](real).to(dtype))
        self.A_imag = nn.Parameter(Lambda.imag.to(dtype).contiguous())
        self.P = nn.Parameter(torch.view_as_real(P).to(dtype)) if mode == "nplr" else None
        self.B = nn.Parameter(torch.view_as_real(B).to(dtype))
        self.C = nn.Parameter(torch.randn(m, h, n // 2, 2) * 0.5 ** 0.5)
        self.D = nn.Parameter(torch.randn(channels, h))
        groups = {"dt": ["log_dt"], "A": ["log_A_real", "A_imag", "P"], "B": ["B"]}
        self.ssm_lr = learning_rates(self, lr, groups)
        self.input_linear = nn.Linear(d_model, h) if bottleneck else None
        self.input_gate = nn.Linear(d_model, d_model * gate) if gate else None
        self.output_gate = nn.Linear(channels * h, d_model * gate) if gate else None
        width = d_model * gate if gate else channels * h
        self.output_linear = nn.Linear(width, channels * d_model) if gate or bottleneck else None

    @staticmethod
    def _initial(measure: str, copies: int, n: int, rank: Optional[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Lambda (copies, n/2), P (r, copies, n/2) and B (copies, n/2)."""
        if measure.startswith("diag"):
            require(rank is None, "rank", rank, "mode diag has no low-rank part, pass None")
            Lambda = diagonal(measure, copies, n)
            return Lambda, Lambda[None][:0], torch.ones_like(Lambda)
        Lambda, P, B, _ = nplr(measure, n)
        rank = len(P) if rank is None else rank
        require(rank >= len(P), "rank", rank, f"measure {measure} has rank {len(P)}, pass at least that")
        noise = 1e-2 * torch.randn(rank - len(P), copies, n // 2, dtype=P.dtype)
        P = torch.cat([P[:, None].expand(-1, copies, -1), noise])
        return Lambda.expand(copies, -1), P, B.expand(copies, -1)

    @property
    def dtype(self) -> torch.dtype:
        """The real dtype of the computation: that of the parameters, float32 at least."""
        return torch.promote_types(self.D.dtype, torch.float32)

    def _continuous(self, rate: float) -> tuple[Tensor, ...]:
        """Lambda, B (h, n/2), P (r, h, n/2), C (m, h, n/2) complex and rate * dt (h), in double precision."""
        check_number("rate", rate)
        P = self.B[None][:0] if self.P is None else self.P                   # rank 0 in mode "diag"
        B, P, C = (torch.view_as_complex(parameter.double()) for parameter in (self.B, P, self.C))
        Lambda = torch.complex(-REAL_TYPES[self.real_type][0](self.log_A_real.double()), self.A_imag.double())
        Lambda, B, P = (part.tile(self.h // len(Lambda), 1) for part in (Lambda, B, P))      # shared copies
        return Lambda, B, P, C, rate * self.log_dt.double().exp()

    def _discretize(self, rate: float) -> Discrete:
        """discretize() in double precision, for the powers of A_bar."""
        Lambda, B, P, C, dt = self._continuous(rate)
        dt = dt[:, None]
        if self.mode == "nplr":
            identity = torch.eye(self.d_state, dtype=dt.dtype, device=dt.device)
            half = dt[..., None] / 2 * real_form(Lambda, P)
            right = torch.cat([identity + half, (dt * stack(B))[..., None]], -1)
            solved = torch.linalg.solve(identity - half, right)
            return Discrete(solved[..., :-1], solved[..., -1], 2 * stack(C.conj()))
        if self.disc == "dss":     # dss.py derives it; no factor 2, because DSS has single states, not pairs
            B_bar, C = discretize_softmax(Lambda, B * C, dt / rate, rate, self.l_max)
            return Discrete(torch.exp(dt * Lambda), B_bar, C)
        discretize = discretize_zoh if self.disc == "zoh" else discretize_bilinear
        return Discrete(*discretize(Lambda, B, dt), 2 * C)

    def discretize(self, rate: float = 1.0) -> Discrete:
        """A_bar, B_bar and C of the recurrence (1) at step size rate * dt."""
        self.check_causal()
        matrices = self._discretize(rate)
        return Discrete(*(matrix.to(COMPLEX[self.dtype] if matrix.is_complex() else self.dtype)
                          for matrix in matrices))

    def kernel(self, l: int, rate: float = 1.0) -> Tensor:
        """The impulse response K_0 ... K_{l-1} of (1), without D: (m h, l); of the SSM alone, without gating.

        Bidirectional: (2 m h, l), the kernels for the past before those for the future.
        """
        check_number("l", l, int)
        if self.mode == "nplr":
            K = nplr_kernel(*self._continuous(rate), l, self.dtype == torch.float64)
        else:
            d = self._discretize(rate)
            K = diagonal_kernel(d.A_bar, d.C * d.B_bar, l, self.dtype)
        return K.to(self.dtype).flatten(0, 1)

    def check_causal(self) -> None:
        """A bidirectional layer reads the whole sequence, so that it has no state."""
        require(not self.bidirectional, "bidirectional", True, "it has no state and no step, pass False")

    def initial_state(self, batch_size: int) -> Tensor:
        """x_{-1} = 0: (b, h, n) real, or in mode "diag" (b, h, n/2) complex; h / bottleneck features."""
        self.check_causal()
        check_number("batch_size", batch_size, int)
        x = torch.zeros(batch_size, self.h, self.d_state, dtype=self.dtype, device=self.D.device)
        return x if self.mode == "nplr" else torch.complex(*x.chunk(2, -1))

    def check_state(self, state: Tensor, b: int) -> None:
        """state must have the shape and kind of initial_state(b)."""
        self.check_causal()
        n, kind = (self.d_state, "floating_point") if self.mode == "nplr" else (self.d_state // 2, "complex")
        check_tensor("state", state, (b, self.h, n), kind)

    def step(self, u: Tensor, state: Tensor, *, rate: float = 1.0,
             discrete: Optional[Discrete] = None) -> tuple[Tensor, Tensor]:
        """One step of the recurrence (1): u (b, h), state -> y (b, m h) and the next state.

        discrete: what discretize(rate) returned, to reuse it for many steps; rate is then ignored.
        """
        check_tensor("u", u, ("b", self.d_model))
        self.check_state(state, u.shape[0])
        discrete = self.discretize(rate) if discrete is None else discrete
        y, x = self._gated(lambda v: self._step(v, state, discrete), u[..., None])
        return y[..., 0].to(u.dtype), x

    def _step(self, u: Tensor, x: Tensor, d: Discrete) -> tuple[Tensor, Tensor]:
        """The recurrence (1) as it stands: u (b, h, 1), x as initial_state -> y (b, m h, 1), x."""
        x = x.to(d.A_bar.dtype)
        x = d.B_bar * u + (d.A_bar * x if self.mode == "diag" else torch.einsum("hij,bhj->bhi", d.A_bar, x))
        y = torch.einsum("mhn,bhn->bmh", d.C, x.to(d.C.dtype)).real + self.D * u[:, None, :, 0]
        return y.flatten(1)[..., None], x.to(d.A_bar.dtype)

    def forward(self, u: Tensor, state: Optional[Tensor] = None, *, rate: float = 1.0,
                method: str = "conv") -> tuple[Tensor, Optional[Tensor]]:
        """A sequence: u (b, h, l), state or None (see initial_state) -> y (b, m h, l), final state or None.

        rate: factor on the step size: 2.0 for a signal sampled half as often as in training
        method: "conv", in parallel by FFT, or "step", the recurrence: the same numbers up to rounding,
            which with FFT is relative to the largest of the sequence
        """
        check_tensor("u", u, ("b", self.d_model, "l"))
        require(method in ("conv", "step"), "method", method, "choose conv or step")
        if state is not None:
            self.check_state(state, u.shape[0])
        run = self._conv if method == "conv" else self._steps
        y, last = self._gated(lambda v: run(v, state, rate), u)
        return y.to(u.dtype), last

    def _gated(self, ssm, u: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """W_o((W_y SSM(GELU(W_u u))) * GELU(W_v u)), as far as the layer has them; ssm: v -> y, last."""
        v = u if self.input_linear is None else nn.functional.gelu(channel_map(self.input_linear, u))
        with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):  # half precision is too coarse
            y, last = ssm(v.to(self.dtype))
        if self.input_gate is not None:
            y = channel_map(self.output_gate, y) * nn.functional.gelu(channel_map(self.input_gate, u))
        return y if self.output_linear is None else channel_map(self.output_linear, y), last

    def _steps(self, u: Tensor, state: Optional[Tensor], rate: float) -> tuple[Tensor, Optional[Tensor]]:
        """The recurrence (1) over a sequence, in double precision: rounding adds up over the steps."""
        zero, outputs, discrete = self.initial_state(u.shape[0]), [], self._discretize(rate)
        x = zero if state is None else state
        for u_k in u.double().unbind(-1):
            y_k, x = self._step(u_k[..., None], x, discrete)
            outputs.append(y_k)
        return torch.cat(outputs, -1), None if state is None else x.to(zero.dtype)

    def _conv(self, u: Tensor, state: Optional[Tensor], rate: float) -> tuple[Tensor, Optional[Tensor]]:
        """The convolution with K. A state x adds C A_bar^{k+1} x to y_k, and A_bar^l x to the final state."""
        l, m = u.shape[-1], self.channels
        if state is None:
            K = self.kernel(l, rate).unflatten(0, (-1, self.h))
        else:
            d, x = self._discretize(rate), state
            if self.mode == "diag":    # as a real system: one code serves both (a faster one is in s4d.py)
                A_bar = real_form(d.A_bar, d.A_bar[None][:0])
                d, x = Discrete(A_bar, stack(d.B_bar), stack(d.C.conj())), stack(x)
            powers = [power.to(self.dtype) for power in squares(d.A_bar, l)]
            B_bar, C, x = d.B_bar.to(self.dtype), d.C.transpose(0, 1).to(self.dtype), x.to(self.dtype)
            x = advance(powers, x, 1)                                        # meets C at k = 0
            y = output_of_dense_state(C, powers, torch.cat([B_bar[None], x]))[..., :l]     # (1 + b, m, h, l)
            K, y_state = y[0], y[1:]                                         # K: output of the state B_bar
        past = K[:m] + nn.functional.pad(self.D[..., None], (0, l - 1))      # D u: an impulse at k = 0
        y = fft_conv(u[:, None], past)                                       # (b, m, h, l)
        if self.bidirectional:
            future = fft_conv(u.flip(-1)[:, None], K[m:]).flip(-1)           # sum_{j >= 0} K'_j u_{k+j}, ...
            y = y + nn.functional.pad(future[..., 1:], (0, 1))               # ... one step later
        if state is None:
            return y.flatten(1, 2), None
        last = advance(powers, x, l - 1) + dense_state_of_input(B_bar, powers, u)
        last = last if self.mode == "nplr" else torch.complex(*last.chunk(2, -1))
        return (y + y_state).flatten(1, 2), last


# ---- demo ----

def demo(path: Optional[str] = None) -> None:
    """Print how the modes agree and how long they take; draw the figure if a path is given."""
    torch.manual_seed(0)
    l, layer = 1024, S4(3, 64).requires_grad_(False)
    layer.log_dt.copy_(torch.tensor([1e-3, 1e-2, 1e-1]).log())
    t = torch.arange(l) / l
    u = torch.sin(2 * math.pi * torch.tensor([[2.0], [3.0], [5.0]]) * (t + t ** 2))[None]       # (1, 3, l)

    def chunks():
        """The same sequence in four uneven pieces: (1, 3, l)."""
        y, state = [], layer.initial_state(1)
        for piece in u.split([100, 1, 411, 512], -1):
            y_piece, state = layer(piece, state)
            y.append(y_piece)
        return torch.cat(y, -1)

    runs = {"convolution": lambda: layer(u)[0],
            "step by step": lambda: layer(u, method="step")[0],
            "four chunks, state forwarded": chunks,
            "every second sample, rate 2": lambda: layer(u[..., 1::2], rate=2.0)[0],
            "every second sample, rate 1 (wrong)": lambda: layer(u[..., 1::2])[0]}
    y, whole = {}, layer(u)[0]
    print(f"{f'S4, h=3, n=64, l={l}':<36}{'difference':>12}{'time / ms':>12}")
    for name, run in runs.items():
        start = time.perf_counter()
        y[name] = run()
        duration = 1e3 * (time.perf_counter() - start)
        error = (y[name] - (whole[..., 1::2] if "second" in name else whole)).abs().max() / whole.abs().max()
        print(f"{name:<36}{error:12.1e}{duration:12.1f}")
    if path is None:
        return
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 8), layout="constrained")
    disk, kernels, modes, rates = axes = list(figure.subplots(2, 2).flat)
    disk.plot(torch.cos(2 * math.pi * t), torch.sin(2 * math.pi * t), color="0.7")
    for dt, A_bar, K in zip(layer.log_dt.exp(), layer.discretize().A_bar, layer.kernel(l)):
        A_bar = torch.linalg.eigvals(A_bar)
        disk.plot(A_bar.real, A_bar.imag, "o", ms=4, label=f"dt = {dt:.3f}")
        kernels.plot(K / K.abs().max(), lw=1, label=f"dt = {dt:.3f}")
    disk.set(title="Eigenvalues of A_bar in the unit disk", xlabel="Re A_bar", ylabel="Im A_bar", aspect=1)
    kernels.set(title="Kernels, each scaled to 1", xlabel="step k", ylabel="K_k / max |K|")
    modes.plot(u[0, 1], color="0.7", label="input u")
    for (name, line), style in zip(y.items(), ("-", "--", ":", "--", ":")):
        plot, step = (rates, 2) if "second" in name else (modes, 1)
        plot.plot(range(step - 1, l, step), line[0, 1], style, lw=3, label=name)
    rates.plot(whole[0, 1], color="0.7", label="all samples, rate 1")
    modes.set(title="One output, three ways to compute it (dt = 0.010)", xlabel="step k", ylabel="u, y")
    rates.set(title="Half the sampling frequency, no retraining", xlabel="step k", ylabel="y")
    for ax in axes:
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    print("wrote", path)


if __name__ == "__main__":
    demo(*sys.argv[1:2])
