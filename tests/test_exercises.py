"""The exercises of docs/course.md, done: one function each, in the order of the course.

    python tests/test_exercises.py s4d_3        # the numbers of the page, for 3 seeds

A test asserts what the page says one should see, and begins with the answer to its "Why".
Times are printed by hand alone: no test depends on one. A function or a class that stands
inside a test is what a student writes, or edits in the file of the layer.
"""

import inspect
import math
import re
import sys
import time

import pytest
import torch
import layers                           # noqa: F401, before the models: sets sys.path
from torch import nn
from torch.nn import functional as F

import dss
import example
import lssl
import s4
import s5
import selective_scan
from dss import DSS
from gss import GSS
from lru import LRU
from lssl import LSSL
from s4 import S4
from s4d import S4D
from s5 import S5
from selective_scan import SelectiveSSM
from tasks import copying, delay

BY_HAND = False


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def steps(of_page, of_test):
    """As many steps of training as the page says, or as many as the assertion needs."""
    return of_page if BY_HAND else of_test


def show(**numbers):
    """Print what was found, for pytest -s and for main()."""
    for name, number in numbers.items():
        values = number if isinstance(number, (list, tuple)) else [number]
        values = [torch.as_tensor(value).item() for value in values]
        print(f"    {name:<22}", *[f"{value:.3g}" for value in values])


def show_time(name, function, *arguments):
    """By hand: the processor time of the fastest of three calls. No test depends on it."""
    if BY_HAND:
        times = []
        for _ in range(3):
            start = time.process_time()
            function(*arguments)
            times.append(1e3 * (time.process_time() - start))
        show(**{f"ms, {name}": min(times)})


# ---- s4d.py ----

def test_s4d_1_kernel_by_the_direct_formula():
    """h n/2 l powers, one by one; powers() has 2 sqrt(l) of them for each state, and the
    rest is matrix products."""
    layer = S4D(8)

    def kernel(l):
        A_bar, B_bar, C = layer.discretize()
        k = torch.arange(l)
        A_k = A_bar[..., None] ** k                             # (h, n/2, l)
        return 2 * ((C * B_bar)[..., None] * A_k).sum(1).real

    difference = (kernel(1024) - layer.kernel(1024)).abs().max()
    show(difference=difference)
    show_time("direct", kernel, 1024)
    show_time("as it is", layer.kernel, 1024)
    assert difference < 1e-5 * layer.kernel(1024).abs().max()
    u = torch.randn(2, 8, 1024)
    expected, _ = layer(u)
    with pytest.MonkeyPatch.context() as patch:     # forward calls kernel: it sees the edit
        patch.setattr(layer, "kernel", lambda l, rate=1.0: kernel(l).to(u.dtype))
        y, _ = layer(u)
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


def test_s4d_2_lin_against_inv():
    """All frequencies of diag-lin are multiples of pi, so that the sum of them repeats
    after time 2, which is 200 steps of 0.01. Re A = -1/2 has decayed by e^(-1/2 2) = 1/e
    there."""
    changes = []
    highest = []
    for measure in ("diag-lin", "diag-inv"):
        layer = S4D(8, measure=measure, dt_min=0.01, dt_max=0.01)
        K = layer.kernel(1024)
        again = math.e * K[:, 200:400]                  # one period of 2 / dt later
        changes.append((again - K[:, :200]).square().mean() / K[:, :200].square().mean())
        highest.append(layer.A_imag.max())
    show(squared_difference=changes, largest_A_imag=highest)
    assert changes[0] < 1e-6 and changes[1] > 0.1
    assert highest[1] > 10 * highest[0]


def test_s4d_3_freeze_A_and_dt():
    """y_k has the term K_0 u_k + D u_k, and what is to be given back does not contain
    u_k."""
    free = S4D(4, dt_min=0.1)
    frozen = S4D(4, dt_min=0.1)
    for parameter in (frozen.log_dt, frozen.log_A_real, frozen.A_imag):
        parameter.requires_grad_(False)
    loss = delay(free, 150)
    frozen_loss = delay(frozen, 150)
    peaks = [layer.kernel(20).abs().mean(0)[10] for layer in (free, frozen)]
    show(trained=loss, frozen=frozen_loss, K_at_10=peaks)
    assert loss < 0.05 and frozen_loss > 3 * loss


# ---- lssl.py ----

def test_lssl_1_reconstruct_a_jump():
    """Gibbs: a sum of n smooth functions overshoots a jump by about 9% however large n is;
    only the width of the ripples goes as 1/n."""
    u = (torch.arange(1000) >= 600).double()[None, None]        # a jump 400 samples ago
    s = torch.arange(1000) / 1000.0
    above = []
    below = []
    width = []
    for n in (16, 32, 64):
        layer = LSSL(1, n, measure="legt", dt_min=1e-3, dt_max=1e-3).double()
        _, state = layer(u, layer.initial_state(1))
        past = lssl.reconstruct("legt", state[0, 0], s.double())
        middle = past[100:900]
        above.append(middle.max() - 1)
        below.append(-middle.min())
        width.append(((middle > 0.1) & (middle < 0.9)).sum())
    show(above_1=above, below_0=below, samples_of_the_edge=width)
    assert 0.07 < min(above) and max(above) < 0.095
    assert 0.085 < min(below) and max(below) < 0.115
    assert width[0] > 2 * width[2]


def test_lssl_2_forward_euler():
    """A is not normal: its eigenvectors are nearly parallel, so that powers of 1 + dt A
    grow for long before they decay, whatever the eigenvalues say."""
    largest = []
    for dt in (0.002, 0.005, 0.02):                             # 2/64 is 0.031
        layer = LSSL(4, alpha=0.0, dt_min=dt, dt_max=dt)
        largest.append(layer.kernel(1024).abs().max())
    bilinear = LSSL(4, dt_min=0.02, dt_max=0.02).kernel(1024).abs().max()
    show(at_dt_2_5_20_e_3=largest, bilinear=bilinear)
    assert largest[0] < 1 and 10 < largest[1] < 1e3 and largest[2] > 1e14
    assert bilinear < 1


def test_lssl_3_window_of_length_2():
    """The mean of u over the window, which is 1/2 when half of the window is filled."""
    def hippo_legendre(measure, n, original=lssl.hippo_legendre):
        A, B = original(measure, n)
        return A / 2, B / 2

    ramps = []
    with pytest.MonkeyPatch.context() as patch:
        for length in (1, 2):
            layer = LSSL(1, measure="legt", dt_min=1e-3, dt_max=1e-3)
            ramps.append(first_state(layer, 3000))
            patch.setattr(lssl, "hippo_legendre", hippo_legendre)
    half = [(ramp > 0.5).nonzero().min() for ramp in ramps]
    full = [(ramp > 0.99).nonzero().min() for ramp in ramps]
    show(half_at=half, full_at=full)
    assert abs(half[0] - 500) < 10 and abs(half[1] - 1000) < 20


def first_state(layer, l):
    """x_0 at each of l steps with u = 1."""
    discrete = layer.discretize()
    state = layer.initial_state(1)
    found = []
    for _ in range(l):
        _, state = layer.step(torch.ones(1, 1), state, discrete=discrete)
        found.append(state[0, 0, 0])
    return torch.stack(found)


# ---- s4.py ----

def test_s4_1_error_against_q():
    """What wraps around, q^l K_(k+l), and rounding, 1e-16, which q^-k amplifies by 1/q^l:
    both are 1e-8 at q^l = 1e-8, or a little before, as K_(k+l) is smaller than K_k."""
    source = inspect.getsource(s4.cauchy_kernel)
    layer = S4(8)
    with torch.no_grad():
        exact = s4.power_kernel(layer.discretize(), 1000, torch.float64)
        errors = []
        for q_l in ("1e-2", "1e-4", "1e-6", "1e-8", "1e-10", "1e-12", "1e-14"):
            edited = vars(s4).copy()
            exec(source.replace("1e-8)", q_l + ")"), edited)
            K = edited["cauchy_kernel"](*layer.continuous(1.0), 1000)
            errors.append((K - exact).abs().max() / exact.abs().max())
    show(errors_2_to_14=errors)
    assert errors[0] > 1e-6 and errors[-1] > 1e-4
    assert max(errors[2:4]) < 1e-5


def test_s4_2_random_Lambda():
    """With HiPPO the past, as coefficients of polynomials, from which C reads the value of
    ten steps ago. Lambda, P and B have this meaning only together: one alone changed, the
    state is some mixture of the past, and C finds little in it."""
    losses = []
    for random in (False, True):
        layer = S4(4, dt_min=0.1, lr=0.0)
        if random:
            layer.A_imag.data = 100 * torch.rand_like(layer.A_imag)
        losses.append(delay(layer, 100))
    show(hippo_random=losses)
    assert losses[0] < 0.1 and losses[1] > 0.4


def test_s4_3_without_P():
    """P enters as P P*, whose derivative is proportional to P: zero at zero."""
    layer = S4(4, dt_min=0.01, dt_max=0.01)
    before = layer.kernel(1000)
    layer.P.data.zero_()
    after = layer.kernel(1000)
    late = [K[:, 300:].square().sum() / K.square().sum() for K in (before, after)]
    losses = []
    for zero in (False, True):
        layer = S4(4, dt_min=0.1)
        if zero:
            layer.P.data.zero_()
        losses.append(delay(layer, 100))
    show(change=(after - before).abs().max() / before.abs().max(), late=late,
         delay_with_without=losses)
    assert late[0] < 0.05 and late[1] > 0.2
    assert layer.P.abs().max() == 0             # its gradient is 0 there: it stays
    assert losses[0] < losses[1] / 1.5 and losses[1] < 0.2


# ---- dss.py ----

def test_dss_1_without_the_normalizer():
    """It is e^-12.5 or less: the sum over time that the softmax divides by does not depend
    on l_max any more."""
    changes = []
    for dt in (0.001, 0.01, 0.1):
        for l_max in (256, 4096, 65536):
            layer = DSS(4, l_max=l_max, dt_min=dt, dt_max=dt)
            K = layer.kernel(256)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dss, "softmax_weights", lambda W, *others: -W)
                difference = layer.kernel(256) - K
            changes.append(difference.abs().max() / K.abs().max())
    show(dt_0_001=changes[:3], dt_0_01=changes[3:6], dt_0_1=changes[6:])
    assert max(changes[2], changes[4], changes[5], *changes[6:]) < 1e-4
    assert min(changes[:2]) > 0.03 and changes[3] > 0.1


def test_dss_2_growing_kernels():
    """By its sum over time, in which the last values count most."""
    sizes = []
    for real in (-0.5, 0.5):
        layer = DSS(4, l_max=256, dt_min=0.1, dt_max=0.1)
        layer.Lambda_re.data.fill_(real)
        K = layer.kernel(256).abs()
        sizes.append(K.max())
        first = K[:, :64].square().sum() / K.square().sum()
        show(**{f"energy_in_64_at_{real}": first})
        assert first > 0.9 if real < 0 else first < 1e-4
    show(largest=sizes)
    assert max(sizes) < 30


def test_dss_3_exp_is_S4D():
    """S4D stores one of each conjugate pair, and takes 2 Re; DSS takes Re of all."""
    layer = DSS(4, 32, version="exp")
    other = S4D(4, 64)
    other.log_dt.data = layer.log_dt.data
    other.log_A_real.data = layer.Lambda_re.data.repeat(4, 1)
    other.A_imag.data = layer.Lambda_im.data.repeat(4, 1)
    other.C.data = layer.W.data / 2
    other.D.data = layer.D.data
    u = torch.randn(2, 4, 300)
    y, _ = layer(u)
    difference = (other(u)[0] - y).abs().max() / y.abs().max()
    show(difference=difference)
    assert difference < 1e-5


# ---- gss.py ----

def test_gss_1_bottleneck():
    """4 / bottleneck: all, two, one. What does not come through has a loss of 1."""
    losses = []
    for bottleneck in (1, 2, 4):
        losses.append(delay(GSS(4, bottleneck=bottleneck), 300))
        wide = GSS(64, bottleneck=bottleneck)
        show_time(f"bottleneck {bottleneck}", wide, torch.randn(1, 64, 1024))
    show(loss_1_2_4=losses)
    assert losses[0] < 0.3 and 0.45 < losses[1] < 0.6 and losses[2] > 0.7


def test_gss_2_without_the_gate():
    """Nothing: a delay is linear. With a bottleneck of 4 the SSM has two features for
    eight."""
    gated = GSS(8)
    plain = GSS(8, 32, gate=False, bottleneck=1)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (gated, plain)]
    losses = [delay(layer, 100, h=8) for layer in (gated, plain)]
    show(parameters=sizes, gated=losses[0], plain=losses[1])
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]
    assert losses[0] > 0.7 and losses[1] < 0.6


def test_gss_3_train_dt():
    """At dt = 1 by up to five turns, so that ten steps are told from eleven; at dt = 0.01
    by 0.3 at most: all kernels change little over 64 steps."""
    losses = []
    for options in ({}, {"dt_min": 1e-3, "dt_max": 0.1, "train_dt": True}):
        layer = GSS(4, bottleneck=1, gate=False, **options)
        losses.append(delay(layer, 100))
    show(dt_1=losses[0], dt_trained=losses[1])
    assert losses[0] < 0.7 and losses[1] > 0.75


# ---- s5.py ----

def test_s5_1_chunk_length():
    """The loop makes 1024 calls of an operation with few numbers each, where the call
    itself is the cost. A tree makes ten levels of calls, with copies at each. Chunks of 4
    to 32 make few calls with many numbers."""
    a = torch.rand(64, dtype=torch.complex128) / 2
    v = torch.randn(1, 1024, 64, dtype=torch.complex64)
    x = torch.randn(1, 64, dtype=torch.complex128)
    results = []
    for T in (2, 4, 8, 32, 1024):
        results.append(s5.linear_scan(a, v, x, T))
        show_time(f"T = {T}", s5.linear_scan, a, v, x, T)
    differences = [(other - results[0]).abs().max() / results[0].abs().max() for other in results]
    show(difference=max(differences))
    assert max(differences) < 1e-6


def test_s5_2_blocks():
    """Like n^2: half the size, a quarter."""
    highest = []
    for blocks in (1, 2, 4, 8):
        highest.append(S5(4, blocks=blocks).Lambda_im.abs().max())
    show(highest_1_2_4_8=highest)
    for previous, following in zip(highest, highest[1:]):
        assert 3.8 < previous / following < 4.3


def test_s5_3_one_step_size():
    """The real part, -1/2, of all eigenvalues of the normal part of HiPPO."""
    spread = []
    for shared in (False, True):
        layer = S5(4)
        if shared:
            layer.log_step = nn.Parameter(layer.log_step.data.mean()[None])
        A_bar, _, _ = layer.discretize()
        steps = -1 / A_bar.abs().log()                          # until 1/e is left
        spread.append(steps.max() / steps.min())
    show(longest_over_shortest_memory=spread, memory_if_shared=steps[0])
    assert spread[0] > 10 and spread[1] < 1.01
    assert 70 < steps[0] < 600


# ---- lru.py ----

def test_lru_1_without_gamma():
    """1 / (1 - |A_bar|^2), the variance of x for white noise; gamma^2 is its inverse."""
    layer = LRU(4, r_min=0.9, r_max=0.999)
    u = torch.randn(64, 4, 1000)
    sizes = []
    for gamma in (True, False):
        if not gamma:
            layer.gamma_log.data.zero_()
        _, x = layer(u, layer.initial_state(64))
        sizes.append(x.abs().square().mean())
    show(with_without=sizes)
    assert 0.6 < sizes[0] < 1.5 and sizes[1] > 8 * sizes[0]


def test_lru_2_memory():
    """|A_bar|^2 is uniform between r_min^2 and 1: the median is 0.5, or 0.905, and with it
    1 / -log |A_bar| is 2.9, or 20."""
    steps = []
    for r_min in (0.0, 0.9):
        layer = LRU(4, 256, r_min=r_min)
        A_bar, _, _ = layer.discretize()
        steps.append((-1 / A_bar.abs().log()).median())
    show(disk_ring=steps)
    assert 2 < steps[0] < 4 and 14 < steps[1] < 27


def test_lru_3_disk_or_ring():
    """e^-10 and e^-1.5. A loss of 0.7 says that few states of the disk reach back 30
    steps."""
    losses = []
    for r_min in (0.0, 0.9):
        losses.append(delay(LRU(1, r_min=r_min), 100, lag=30, h=1))
    show(disk=losses[0], ring=losses[1])
    assert losses[0] > 2 * losses[1]


# ---- selective_scan.py ----

def test_selective_1_constant_B_or_dt():
    """dt = 0 also keeps the state, exp(0 A) = 1; with B = 0 it goes on decaying."""
    class ConstantB(SelectiveSSM):
        def select(self, u, rate):
            dt, B, C = super().select(u, rate)
            return dt, torch.ones_like(B), C

    class ConstantDt(SelectiveSSM):
        def select(self, u, rate):
            dt, B, C = super().select(u, rate)
            return rate * F.softplus(self.dt_proj.bias).expand_as(dt), B, C

    constant_B, _ = copying(ConstantB(8, 2), steps(150, 130))
    constant_dt, _ = copying(ConstantDt(8, 2), steps(150, 40))
    s4d, _ = copying(S4D(8, 16), steps(150, 20))
    show(constant_B=constant_B, constant_dt=constant_dt, s4d=s4d)
    assert constant_dt > 3 * constant_B and s4d > 0.7


def test_selective_2_zero_order_hold():
    """The factor depends on the feature (dt, A) and the state: (b, l, d, n). B is (b, l,
    n), for all features."""
    class Hold(SelectiveSSM):
        def select(self, u, rate):
            dt, B, C = super().select(u, rate)
            dtA = -dt * self.A_log.exp()                # (.., n), with one feature
            return dt, B * torch.expm1(dtA) / dtA, C

    smooth = torch.linspace(0, 6, 1000).sin().expand(1, 1, 1000)
    errors = []
    for cls in (SelectiveSSM, Hold):
        worst = []
        for _ in range(10):
            layer = cls(1, dt_min=0.05, dt_max=0.1)
            full, _ = layer(smooth)
            half, _ = layer(smooth[..., 1::2], rate=2.0)
            worst.append((half - full[..., 1::2]).abs().max() / half.abs().max())
        errors.append(sum(worst) / 10)
    show(dt_B=errors[0], hold=errors[1])
    assert errors[1] < errors[0] / 5


def test_selective_3_dt_after_training():
    """At a flag exp(dt A) is near 0, and forgets; elsewhere it is near 1, and keeps."""
    loss, net = copying(SelectiveSSM(8, 2), steps(150, 130))
    value = torch.randn(16, 64)
    flag = torch.rand(16, 64) < 0.1
    u = net[0](torch.stack([value, flag.float()], 1))
    dt, _, _ = net[1].select(u.mT, 1.0)
    at_flags = dt[flag].median(0).values                        # of each feature
    elsewhere = dt[~flag].median(0).values
    i = (at_flags / elsewhere).argmax()
    show(loss=loss, dt_at_flags=at_flags[i], dt_elsewhere=elsewhere[i])
    assert at_flags[i] > 30 * elsewhere[i]


def test_selective_4_without_the_backward_pass():
    """Each step of the loop keeps its factor exp(dt A) and its state, (b, d, n) each; the
    written gradient keeps the inputs, (b, d) and (b, n) a step, and one state of 16."""
    written, = [cls for cls in vars(selective_scan).values()
                if isinstance(cls, type) and issubclass(cls, torch.autograd.Function)]
    torch.manual_seed(0)
    layer = SelectiveSSM(64)
    u = torch.randn(4, 64, 1024)

    def train():
        layer.zero_grad()
        layer(u)[0].square().mean().backward()

    kept = []
    gradients = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("written out", "by autograd"):
            kept.append(megabytes_for_backward(layer, u))
            train()
            gradients.append(layer.A_log.grad.clone())
            show_time(name, train)
            patch.setattr(written, "apply", staticmethod(written.forward))
    show(megabytes_kept=kept)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)
    assert kept[1] > 10 * kept[0]


def megabytes_for_backward(layer, u):
    """What a forward pass keeps for the backward pass, each storage counted once."""
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = layer(u)                             # alive, so that no storage is reused
    return sum(sizes.values()) / 1e6


# ---- example.py ----

def test_example_1_without_the_rates_of_ssm_lr():
    """A and dt stand in exponents, exp(k dt A): one large step of the optimizer makes a
    kernel die at once, or never."""
    losses = []
    for lr, rates in ((0.02, True), (0.02, False), (0.2, True), (0.2, False)):
        layer = S4D(4, dt_min=0.1)
        if not rates:
            layer.ssm_lr = {}
        groups = example.param_groups(layer, lr, weight_decay=0.05)
        optimizer = torch.optim.AdamW(groups)
        with pytest.MonkeyPatch.context() as patch:             # delay() calls Adam
            patch.setattr(torch.optim, "Adam", lambda parameters, lr: optimizer)
            losses.append(delay(layer, 80))
    show(lr_0_02_with_without=losses[:2], lr_0_2_with_without=losses[2:])
    assert losses[0] > 1.5 * losses[1]
    assert losses[2] < losses[3] / 5


def main(names):
    """Print the numbers of the exercises that are named, for three seeds."""
    global BY_HAND
    exercises = [name for name in globals() if re.match(r"test_\w+_\d_", name)]
    for part in names:
        if not any(part in name for name in exercises):
            sys.exit(f"{part}: no exercise has this in its name. There are\n"
                     + "\n".join(name.removeprefix("test_") for name in exercises))
    BY_HAND = True
    for name in exercises:
        if any(part in name for part in names):
            print(name)
            for number in range(3):
                torch.manual_seed(number)
                start = time.process_time()
                try:
                    globals()[name]()
                except AssertionError:
                    print("    not as docs/course.md says")
                print(f"    {time.process_time() - start:.1f} s")


def test_each_exercise_of_the_page_has_four_lines_and_a_solution():
    page = (layers.ROOT / "docs" / "course.md").read_text()
    parts = re.split(r"^\*\*(\w+ \d), .*\*\*$", page, flags=re.M)[1:]
    names = [name.replace(" ", "_")
             for name in parts[::2]]
    for name, text in zip(names, parts[1::2]):
        lines = re.findall(r"^- (Do|With|You should see|Why)[:,]", text, re.M)
        assert lines == ["Do", "With", "You should see", "Why"], name
    solved = [re.match(r"test_(\w+_\d)_", name) for name in globals()]
    assert names == [match[1] for match in solved if match]


def test_main_says_when_no_exercise_has_the_name():
    with pytest.raises(SystemExit, match="nope: no exercise"):
        main(["s4d_1", "nope"])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(__doc__)
    main(sys.argv[1:])
