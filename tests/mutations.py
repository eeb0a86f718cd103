"""Break one key line at a time and show that a test fails: python tests/mutations.py [word in the row ...]

Works on a copy in a temporary directory; about fifteen minutes on one core for all. A mutation that survives is a
hole in the tests, and the exit status is then 1. test_files.py checks that every line is still there.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = [".git", ".venv", ".pytest_cache", "__pycache__", "data", "runs"]
# file, what is broken, the text, what replaces it, the tests that must notice
MUTATIONS = [
    ("s4d", "the factor 2 of the pairs", "y = 2 * (C * x)", "y = (C * x)", "tests/test_modes.py -k s4d"),
    ("s4d", "the factor 2 in the kernel", "return vandermonde(2 * C * B_bar", "return vandermonde(C * B_bar",
     "tests/test_modes.py -k s4d"),
    ("s4d", "rate", "dt = rate * self.log_dt", "dt = self.log_dt", "tests/test_modes.py -k s4d"),
    ("s4d", "rate beside discrete", "discrete is None or rate == 1.0", "True", "tests/test_faults.py -k discrete"),
    ("s4d", "state one step late", "vandermonde(2 * C * A_bar * state", "vandermonde(2 * C * state",
     "tests/test_modes.py -k s4d"),
    ("s4d", "input into the state backwards", "F.pad(u.flip(-1),", "F.pad(u,", "tests/test_modes.py -k s4d"),
    ("s4d", "the end of the FFT in its beginning", "product = torch.fft.rfft(u, 2 * l) * torch.fft.rfft(K, 2 * l)\n"
     "    return torch.fft.irfft(product, 2 * l)", "product = torch.fft.rfft(u) * torch.fft.rfft(K)\n"
     "    return torch.fft.irfft(product, l)", "tests/test_modes.py -k s4d"),
    ("s4d", "first of the high digits", "first_powers(low[:, -1] * A_bar", "first_powers(low[:, -1]",
     "tests/test_s4d.py"),
    ("s4d", "direct path D", " + self.D[:, None] * v", "", "tests/test_modes.py -k s4d"),
    ("s4d", "a kernel of forward's own", "fft_conv(v, self.kernel(l, rate))",
     "fft_conv(v, S4D.kernel(self, l, rate))", "tests/test_s4d.py -k calls"),
    ("s4d", "dt in single precision", "self.log_dt.double().exp()", "self.log_dt.exp().double()",
     "tests/test_s4d.py -k double"),
    ("s4d", "Re A in single precision", "-self.log_A_real.double().exp()", "-self.log_A_real.exp().double()",
     "tests/test_s4d.py -k double"),
    ("s4d", "the other half of legs", "imag.flip(0)[:n // 2]", "imag[:n // 2]", "tests/test_s4d.py -k official"),
    ("s4d", "legs in single precision", "eigvalsh(1j * (S - S.mT))", "eigvalsh((1j * (S - S.mT)).cfloat()).double()",
     "tests/test_s4d.py -k official"),
    ("s4d", "sign in the bilinear transform", "dt / (1 - dt * A / 2)", "dt / (1 + dt * A / 2)",
     "tests/test_golden.py -k s4d"),
    ("s4", "sign in the Woodbury identity", "sums = CB - CP *", "sums = CB + CP *", "tests/test_golden.py -k nplr"),
    ("s4", "the 1 in it", "(PB / (1 + PP))", "(PB / PP)", "tests/test_golden.py -k nplr"),
    ("s4", "2/(1+z)", "irfft(2 / (1 + z) *", "irfft(2 / (1 - z) *", "tests/test_golden.py -k nplr"),
    ("s4", "denominator of a pair", "- 2 * s * w.real", "+ 2 * s * w.real", "tests/test_golden.py -k nplr"),
    ("s4", "a kernel of forward's own", "K = self.kernel(u.shape", "K = S4.kernel(self, u.shape",
     "tests/test_s4d.py -k calls"),
    ("s4", "the circle", "torch.exp(-log_q * k)", "torch.exp(log_q * k)", "tests/test_s4.py -k kernel"),
    ("s4", "conjugate of P", "torch.cat([C, P.conj()])", "torch.cat([C, P])", "tests/test_golden.py -k nplr"),
    ("s4", "sign in the low-rank part", "x = a * state - low_rank(", "x = a * state + low_rank(",
     "tests/test_modes.py -k s4"),
    ("s4", "Woodbury in the step", "eye + dt[..., None] / 2 * PRP", "eye + dt[..., None] * PRP",
     "tests/test_golden.py -k nplr"),
    ("s4", "B_bar without the low-rank part", "dt * (R * B - low_rank(Q, S, B) / 2)", "dt * R * B",
     "tests/test_golden.py -k nplr"),
    ("s4", "pairs in the dense matrix", "A_bar = A_bar - 2 * torch.einsum", "A_bar = A_bar - torch.einsum",
     "tests/test_modes.py -k s4"),
    ("s4", "future one step early", "future[..., 1:], (0, 1)", "future, (0, 0)", "tests/test_s4.py -k direct"),
    ("s4", "dense powers from the wrong length on", "and l < 16 * self.n", "and True",
     "tests/test_s4.py -k nodes"),
    ("s4", "growing states by Cauchy sums", 'and self.real_type != "none"\n', "\n", "tests/test_s4.py -k growing"),
    ("s4", "last state one step too far", "advance(x, A_k, l - 1)", "advance(x, A_k, l)", "tests/test_modes.py -k s4"),
    ("s4", "conjugate of C", "A_bar, as_real(B_bar), 2 * as_real(C.conj())", "A_bar, as_real(B_bar), 2 * as_real(C)",
     "tests/test_modes.py -k s4"),
    ("s4", "blocks of the diagonal mode", "A * A if A.is_complex()", "A if A.is_complex()", "tests/test_modes.py -k s4"),
    ("s4", "rate in disc dss", "torch.expm1(layer.l_max * dt / rate * A)", "torch.expm1(layer.l_max * dt * A)",
     "tests/test_modes.py -k dss"),
    ("s4", "more columns of P", "noise = 1e-2 *", "noise = 0 *", "tests/test_s4.py -k columns"),
    ("s4", "width of the gate", "width = d * gate", "width = self.h * gate", "tests/test_s4.py -k wide"),
    ("s4", "slowest of diag-rand", "-(1e-3 ** torch.rand_like(i))", "-(1e-2 ** torch.rand_like(i))",
     "tests/test_gss.py -k random"),
    ("lssl", "alpha", "(1 - self.alpha) * dtA", "self.alpha * dtA", "tests/test_modes.py -k lssl"),
    ("lssl", "powers for the wrong side", "krylov([A.mT for A in low]", "krylov([A for A in low]",
     "tests/test_modes.py -k lssl"),
    ("lssl", "state one step late", "x = matvec(A_bar, state.double()).to(v)", "x = state.to(v)",
     "tests/test_modes.py -k lssl"),
    ("lssl", "last state one step too far", "advance(x, A_k, l - 1)", "advance(x, A_k, l)", "tests/test_modes.py -k lssl"),
    ("lssl", "unstable Euler steps", "if alpha < 0.5 and", "if False and", "tests/test_lssl.py -k unstable"),
    ("lssl", "input into the state backwards", "F.pad(u.flip(-1),", "F.pad(u,", "tests/test_modes.py -k lssl"),
    ("lssl", "blocks in the wrong order", "blocks[::2] + matvec(A, blocks[1::2])", "blocks[1::2] + matvec(A, blocks[::2])",
     "tests/test_modes.py -k lssl"),
    ("lssl", "a kernel of forward's own", "K = self.kernel(", "K = LSSL.kernel(self, ", "tests/test_s4d.py -k calls"),
    ("lssl", "powers in single precision", "squares(A_bar, l, self.D.dtype)", "squares(A_bar.to(self.D), l, self.D.dtype)",
     "tests/test_lssl.py -k single"),
    ("lssl", "B of each feature", "B = B.repeat(d_model, 1)", "B = B.clone()", "tests/test_lssl.py -k each"),
    ("lssl", "state of another device", "state.device == u.device", "True", "tests/test_lssl.py -k device"),
    ("lssl", "sign above the diagonal", "A.triu(1) * (-1) ** (i[:, None] - i)", "A.triu(1)",
     "tests/test_lssl.py -k official"),
    ("lssl", "shift of the windows", "z = 1 - 2 * s if", "z = 2 * s - 1 if", "tests/test_lssl.py -k reconstruct"),
    ("dss", "normalizer", "Lambda * torch.expm1(sign", "Lambda * torch.exp(sign", "tests/test_golden.py -k dss"),
    ("dss", "growing modes", "W = W * torch.exp(-l_max *", "W = W + 0 * torch.exp(-l_max *", "tests/test_dss.py"),
    ("dss", "cap at another rate", "40 / (self.l_max * dt)", "40 / (self.l_max * rate * dt)",
     "tests/test_dss.py -k capped"),
    ("dss", "lr 0", "lr >= 0,", "lr > 0,", "tests/test_dss.py -k initialization"),
    ("dss", "gradient at Lambda = 0", "(1 + z / 2)", "(1 + 0 * z)", "tests/test_dss.py -k zero"),
    ("dss", "a kernel of forward's own", "fft_conv(v, self.kernel(", "fft_conv(v, DSS.kernel(self, ",
     "tests/test_s4d.py -k calls"),
    ("gss", "a kernel of forward's own", "K = self.kernel(", "K = GSS.kernel(self, ", "tests/test_s4d.py -k calls"),
    ("gss", "gate", "self.output_gate(y) * F.gelu(self.input_gate(u))", "self.output_gate(y) * (self.input_gate(u))",
     "tests/test_modes.py -k gss"),
    ("s5", "starts of the blocks", "product = a ** T ", "product = a ** (T - 1) ", "tests/test_modes.py -k s5"),
    ("s5", "future backwards", "v.flip(1), start).flip(1)", "v.flip(1), start)", "tests/test_golden.py -k s5"),
    ("s5", "eigenvalue 0", "torch.where(Lambda == 0, limit, hold)", "hold", "tests/test_faults.py -k exactly_0"),
    ("lru", "carries of rounded powers", "product = a ** T ", "product = a.to(v.dtype) ** T ",
     "tests/test_lru.py -k accuracy"),
    ("lru", "ends of the blocks", "end[..., :-1, :], x, T)", "end[..., 1:, :], x, T)", "tests/test_modes.py -k lru"),
    ("lru", "rate in gamma", "torch.expm1(rate * log) / torch.expm1(log)", "1", "tests/test_modes.py -k lru"),
    ("lru", "direct path D", "read(C, x) + self.D[:, None] * w", "read(C, x)", "tests/test_modes.py -k lru"),
    ("lru", "conjugate of C", "-C.imag", "C.imag", "tests/test_modes.py -k lru"),
    ("lru", "order of the operator", "torch.addcmul(v_next, a_next, v)", "torch.addcmul(v, a, v_next)", "tests/test_lru.py -k order"),
    ("selective_scan", "rate", "dt = rate * F.softplus", "dt = F.softplus", "tests/test_modes.py -k selective"),
    ("selective_scan", "rate of each sample", "rate[..., None].to(u.dtype)", "1.0", "tests/test_faults.py -k irregular"),
    ("selective_scan", "product of a block", "return a_next * a,", "return a,", "tests/test_modes.py -k selective"),
    ("selective_scan", "state between the groups", "y, x = GroupScan", "y, _ = GroupScan", "tests/test_selective_scan.py -k groups"),
    ("selective_scan", "gradient between the blocks", "block_starts(back, g_states[..., 1:, :, :], last_first=True)", "g_states[..., 1:, :, :]",
     "tests/test_selective_scan.py -k strong"),
    ("selective_scan", "gradient of the states kept", "gx = (z + g_states[..., :-1, :, :])", "gx = z",
     "tests/test_selective_scan.py -k differences"),
    ("selective_scan", "infinite A", ".clamp(min=-1e38)", "", "tests/test_faults.py -k infinite"),
    ("selective_scan", "memory of the state", ".mT.clone()", ".mT", "tests/test_faults.py -k owns"),
    ("s5", "rate of each sample", "rate.double()[..., None]", "1.0", "tests/test_faults.py -k irregular"),
    ("s5", "product of varying steps", "reduce(torch.mul, a.unbind(-2))", "a[..., 0, :]", "tests/test_faults.py -k irregular"),
    ("s5", "starts in double precision", "linear_scan(product, end[..., :-1, :], x, T)",
     "linear_scan(product.to(v.dtype), end[..., :-1, :], x, T)", "tests/test_lru.py -k accuracy"),
    ("s5", "two derivatives at 0", "+ z ** 2 / 6)", ")", "tests/test_faults.py -k second"),
    ("lru", "powers of 0", "a_k = all_powers(a, l + 1)", "a_k = torch.exp(torch.arange(l + 1)[:, None] * torch.where(a.abs() < 1e-300, 1e-300, a).log())",
     "tests/test_faults.py -k states_by_fft"),
    ("selective_scan", "input without dt", "(dt * u)[..., None] * B", "u[..., None] * B",
     "tests/test_golden.py -k selective"),
    ("selective_scan", "inputs of the convolution", "v[..., u.shape[-1]:]", "v[..., u.shape[-1] - 1:-1]",
     "tests/test_modes.py -k mamba"),
    ("example", "random numbers on resume", "torch.manual_seed(seed)", "pass", "tests/test_example.py -k resume"),
    ("example", "share of a process", "share)[:, RANK]", "share)[:, 0]", "tests/test_example.py -k processes_give"),
    ("example", "decay of vectors", 'name.split(".")[-1] == "D"', "False", "tests/test_example.py -k param_groups"),
    ("example", "no_weight_decay", 'getattr(module, "no_weight_decay", ())', "()", "tests/test_example.py -k param_groups"),
    ("example", "wrapped parameters", "if name in own:", "if True:", "tests/test_example.py -k param_groups"),
    ("example", "rate of the SSM at most lr", "min(rate, rates.get(own[name], lr))", "rate",
     "tests/test_example.py -k param_groups"),
    ("example", "options of MODELS", "args.d_state, **options)", "args.d_state)", "tests/test_example.py -k every_model"),
    ("example", "validation accuracy", "== labels[validation]", "== labels[training[:len(scores)]]",
     "tests/test_example.py -k best_checkpoint"),
    ("example", "training accuracy", "scores.argmax(1) == labels[batch]", "scores.argmax(1) == labels[batches[i - 1]]",
     "tests/test_example.py -k with_its_label"),
    ("example", "best checkpoint", 'max(history, key=lambda row: row["val', 'min(history, key=lambda row: row["val',
     "tests/test_example.py -k best_checkpoint"),
    ("example", "mean over what was read", "count + x.shape[-1]", "count + 1", "tests/test_example.py -k every_mode"),
    ("example", "sums in double precision", "self.d_model, dtype=torch.float64)", "self.d_model)",
     "tests/test_example.py -k precision"),
    ("example", "rate handed on", "layer(x, before, rate=rate", "layer(x, before, rate=1.0",
     "tests/test_example.py -k at_a_rate"),
    ("example", "rate in the evaluation", "net(pixels, state, rate=rate)", "net(pixels, state, rate=1.0)",
     "tests/test_example.py -k at_a_rate"),
    ("example", "rate of the steps in the evaluation", "net.discretize(rate) if", "net.discretize() if",
     "tests/test_example.py -k at_a_rate"),
    ("example", "labels shifted by one", "F.cross_entropy(scores.float(), labels[batch])",
     "F.cross_entropy(scores.float(), labels[batch - 1])", "tests/test_example.py -k with_its_label"),
    ("example", "mean not set", "net.mean.copy_(", "(", "tests/test_example.py -k mean_and"),
    ("example", "std not set", "net.std.copy_(", "(", "tests/test_example.py -k mean_and"),
    ("example", "std of each feature", "self.std\n        x = self.encoder(x.flatten(2))",
     "self.std.mean()\n        x = self.encoder(x.flatten(2))",
     "tests/test_example.py -k video"),
    ("example", "gate of the activation", "self.out(g).sigmoid()", "self.out(g).tanh()", "tests/test_example.py -k activations"),
    ("example", "state of too few layers", "len(state[0]) == len(self.layers)", "True",
     "tests/test_example.py -k another_kind"),
    ("example", "state of another batch", "state[1].shape == (b, self.d_model)", "True",
     "tests/test_example.py -k another_kind"),
    ("example", "checksum of the download", "hash_prefix=SHA256", "hash_prefix=None", "tests/test_example.py -k download"),
    ("example", "device of the images", ".to(args.device) for", " for", "tests/test_example.py -k another_device"),
    ("example", "device of the network", "build_network(args).to(args.device)", "build_network(args)",
     "tests/test_example.py -k another_device"),
    ("example", "partial file on a full disk", "part.unlink(missing_ok=True)", "pass", "tests/test_example.py -k disk"),
    ("example", "divergence", "if not math.isfinite(", "if False and math.isfinite(", "tests/test_example.py -k diverge"),
    ("example", "flags against the checkpoint", "check(now == before or name in free,", "check(True,",
     "tests/test_example.py -k contradict"),
    ("example", "limit of a resumed run", 'else ["processes", "epochs"]', 'else ["processes", "epochs", "limit"]',
     "tests/test_example.py -k contradict"),
    ("example", "cosine of the learning rate", "(1 + math.cos(math.pi * (epoch - 1) / args.epochs)) / 2", "1.0",
     "tests/test_example.py -k longer"),
    ("example", "cosine of a resumed run", "(epoch - 1) / args.epochs", "(epoch - 1 - len(history)) / args.epochs",
     "tests/test_example.py -k longer"),
    ("example", "an earlier run", "or not path.parent.exists(),", "or True,", "tests/test_example.py -k two_runs"),
    ("example", "two runs in one folder", "exist_ok=args.resume", "exist_ok=True", "tests/test_example.py -k two_runs"),
    ("example", "best.pt of another run", "for file in [path, *best]:", "for file in [path]:",
     "tests/test_example.py -k best_is_missing"),
]


def passes(tests, folder):
    """Whether the tests pass there, and the line that names the first failure."""
    run = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", *tests.split()], cwd=folder,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode > 1:                                   # not even started, or no such test
        sys.exit(run.stdout)
    return run.returncode == 0, next((line[7:90] for line in run.stdout.splitlines() if line.startswith("FAILED")), "")


def main(words):
    """Apply the mutations whose row contains every word, one at a time. Returns how many survived."""
    survived, sound = 0, set()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*SKIPPED))
        for file, what, text, broken, tests in MUTATIONS:
            if not all(word in f"{file} {what}" for word in words):
                continue
            if tests not in sound and not passes(tests, copy)[0]:
                sys.exit(f"{tests} fails before anything is broken")
            sound.add(tests)
            path, start = copy / f"{file}.py", time.time()
            whole = path.read_text()
            path.write_text(whole.replace(text, broken))
            ok, test = passes(tests, copy)
            path.write_text(whole)
            survived += ok
            print(f"{file:<15}{what:<38}{'SURVIVED' if ok else 'noticed':<10}{time.time() - start:5.0f} s  {test}",
                  flush=True)
    return survived


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
