"""Train a small network of state space layers on images that it reads pixel by pixel.

    python example.py --model s4d                            one model; --model all: one after the other
    python example.py --model s4d --resume                   go on after Ctrl-C, a crash or a kill
    python example.py --model s4d --eval runs/s4d/best.pt    the trained network in every mode
    torchrun --nproc_per_node=2 example.py --model s4d       several processes or GPUs

Sequential CIFAR-10: an image is a sequence of 1024 pixels, row by row, and the network names its class at the
end. Pixels one above the other are 32 steps apart, so it has to remember. The binary edition is downloaded
once (170 MB; not the Python edition: unpickling runs code from the file). Offline, a built-in task takes its
place, see builtin_images. Recipe: AdamW with learning rate 0.01 and weight decay 0.01 on matrices, but 0.001
and none for the recurrence (A, B, dt); cosine schedule; 10% of the images for validation; 170 to 235 thousand
parameters. Written to runs/<model>/, over an older run, whose last.pt becomes previous.pt: metrics.csv and
curves.png, every epoch; last.pt and best.pt (by validation accuracy), all it takes to go on, with the recipe;
result.json, the test set scored once at the end with best.pt. --model all adds comparison.txt and .png.
"""
import argparse, ctypes, hashlib, http.client, importlib, io, itertools, json, math, os, subprocess, sys
import tarfile, tempfile, time, urllib.request
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist, nn
# name: (file, class, arguments for about 200K parameters, layers, whether the layer mixes features itself)
MODELS = {"s4": ("s4", "S4", {"d_state": 32}, 4, False), "s4d": ("s4d", "S4D", {}, 4, False),
          "lssl": ("lssl", "LSSL", {}, 4, False), "dss": ("dss", "DSS", {}, 4, False),
          "gss": ("gss", "GSS", {"expand": 1}, 4, True), "s5": ("s5", "S5", {}, 4, False),
          "lru": ("lru", "LRU", {"d_state": 32, "r_min": .99, "r_max": .9999, "max_phase": .314}, 4, False),
          "selective_scan": ("selective_scan", "SelectiveSSM", {"lr": 1e-3}, 4, False),
          "mamba": ("selective_scan", "Mamba", {"lr": 1e-3}, 2, True)}
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"     # and its sha256:
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FOLDER, TRAIN_FILES = "cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6))
NOT_RECIPE = ("data_dir", "out", "device", "resume", "eval", "eval_limit")      # may differ on --resume
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # set by torchrun
# ------------------------------ data: images (n, 1024, channels) uint8, labels (n)
def download(data_dir):
    """Fetch CIFAR-10 into data_dir/cifar-10-batches-bin, which appears only when whole. Raises OSError."""
    url, sha256 = os.environ.get("CIFAR10_URL", URL), os.environ.get("CIFAR10_SHA256", SHA256)
    content = bytearray()
    with urllib.request.urlopen(url, timeout=20) as response:
        while block := response.read(1 << 20):
            content += block
            print(f"downloading CIFAR-10: {len(content) / 1e6:.0f} of 170 MB", end="\r", flush=True)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"{url} gave {len(content)} bytes that are damaged: their sha256 is not {sha256}")
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir) as part, tarfile.open(fileobj=io.BytesIO(content)) as tar:
        (folder := Path(part) / FOLDER).mkdir()
        for name in (*TRAIN_FILES, "test_batch.bin"):           # only these, whatever else it holds
            (folder / name).write_bytes(tar.extractfile(f"{FOLDER}/{name}").read())
        if not (data_dir / FOLDER).exists():                    # another process may have been first
            os.replace(folder, data_dir / FOLDER)

def read_batches(folder, *names):
    """Records of 3073 bytes (label, 1024 red, 1024 green, 1024 blue) -> images (n, 1024, 3), labels (n)."""
    records = np.zeros((0, 3073), np.uint8)
    for path in (folder / name for name in names):
        raw = np.fromfile(path, np.uint8) if path.is_file() else np.zeros(0, np.uint8)
        if raw.size == 0 or raw.size % 3073 or raw[::3073].max() > 9:
            sys.exit(f"example.py: {path} is missing or damaged: no records of 3073 bytes with labels 0-9")
        records = np.concatenate([records, raw.reshape(-1, 3073)])
    return np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 1024).swapaxes(1, 2)), records[:, 0]

def builtin_images(n, seed):
    """The built-in task: images (n, 1024, 3) and labels (n), drawn with numpy.

    An image has five bands of six rows, two tinted warm and three cold. WHICH two is the class (10 in all).
    The rest is random. So neither the mean colour nor a few neighbouring pixels tell the class.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 10)
    warm = np.array([[i in pair for i in range(5)] for pair in itertools.combinations(range(5), 2)])[labels]
    tint = np.repeat(np.where(warm, 1, -1) * rng.uniform(20, 40, (n, 5)), 6, axis=1)          # (n, 30)
    image = rng.normal(128, 10, (n, 1, 1, 3)).astype("f4") + 15 * rng.standard_normal((n, 32, 32, 3), "f4")
    image[:, 1:31] += tint[:, :, None, None] * np.array([1, 0, -1])          # red, blue
    width, slant, phase = (rng.uniform(*ends, (n, 1, 1)) for ends in ((4, 12), (-1, 1), (0, 2 * np.pi)))
    y, x = np.mgrid[:32, :32]
    image += 40 * np.cos(2 * np.pi * x / width + slant * y + phase)[..., None]               # stripes
    return image.clip(0, 255).astype(np.uint8).reshape(n, 1024, 3), labels

def load_data(args, device):
    """Training images, labels, test images, labels, all on the device. Sets args.data to what they are."""
    folder = args.data_dir if (args.data_dir / TRAIN_FILES[0]).exists() else args.data_dir / FOLDER
    if args.data != "builtin" and not folder.exists():
        try:
            download(args.data_dir)
        except (OSError, http.client.HTTPException) as error:
            if args.data == "cifar10" or WORLD > 1:     # several processes must not choose differently
                sys.exit(f"example.py: no CIFAR-10 in {args.data_dir}, and the download failed: {error}")
            print(f"No CIFAR-10, for the download failed: {error}\nTraining on the built-in images instead.")
            args.data = "builtin"
    if args.data == "builtin":
        arrays = *builtin_images(2000, args.seed), *builtin_images(1000, args.seed + 1_000_000)
    else:
        args.data = "cifar10"
        arrays = *read_batches(folder, *TRAIN_FILES), *read_batches(folder, "test_batch.bin")
    arrays = [array[:args.limit] for array in arrays]
    if args.grayscale:
        arrays[::2] = [(x @ np.float32([[0.299], [0.587], [0.114]])).astype(np.uint8) for x in arrays[::2]]
    return [torch.from_numpy(x if x.ndim > 1 else x.astype(np.int64)).to(device) for x in arrays]

# ------------------------------ network: residual stream (b, l, h), layers (b, h, l)
class SequenceLayer(nn.Module):
    """Residual block x + dropout(mix(ssm(x))), normalized before the SSM if prenorm, otherwise after the sum.

    norm: "layer" or "batch" (each process by its own share). activation: mix(y), where g = dropout(gelu(y)),
    is "glu": (V g) * sigmoid(W g), "half_glu1": g * sigmoid(W g), "half_glu2": y * sigmoid(W g), "gelu":
    gelu(y), "none": y.
    """

    def __init__(self, ssm, d_model, *, norm="layer", prenorm=False, activation="glu", dropout=0.1):
        super().__init__()
        self.ssm, self.prenorm, self.activation, self.dropout = ssm, prenorm, activation, dropout
        self.norm = nn.LayerNorm(d_model) if norm == "layer" else nn.BatchNorm1d(d_model)
        self.out = nn.Linear(d_model, d_model * (1 + (activation == "glu"))) if "glu" in activation else None

    def keep(self, x):
        """Dropout mask (b, 1, h): this process's share of one drawn on the CPU, whatever WORLD and device."""
        ones = torch.ones(WORLD * len(x), 1, x.shape[-1])
        return F.dropout(ones, self.dropout, self.training)[RANK::WORLD].to(x)

    def forward(self, x, state=None, *, rate=1.0, discrete=None):
        """x (b, l, h), state or None -> (b, l, h), next state; with discrete one step, l = 1."""
        u = self.norm(x.flatten(0, -2)).view_as(x) if self.prenorm else x
        if discrete is None:
            y, state = self.ssm(u.transpose(1, 2).contiguous(), state, rate=rate)
        else:
            y, state = self.ssm.step(u.squeeze(1), state, discrete=discrete)
        y = y.reshape(len(x), x.shape[2], -1).transpose(1, 2).contiguous()  # a step has no l
        if self.out:
            g = F.gelu(y) * self.keep(y)
            a, z = y if self.activation == "half_glu2" else g, self.out(g)
            y = F.glu(z, -1) if self.activation == "glu" else a * z.sigmoid()
        y = F.gelu(y) if self.activation == "gelu" else y
        x = torch.addcmul(x, y, self.keep(y))           # x + y * mask, in one pass over memory
        return (x if self.prenorm else self.norm(x.flatten(0, -2)).view_as(x)), state

class StackedSSM(nn.Module):
    """Encoder, blocks and head, with the interface of the layers: forward, step, discretize, initial_state.

    ssm: function d_model -> state space layer; options: those of SequenceLayer
    d_input, d_output: features per step, an int or a tuple to flatten: (height, width, channels) for video
    pool: True: classify by the mean over all that was read so far, (b, l, *d_input) -> (b, *d_output);
        False: regression, (b, l, *d_input) -> (b, l, *d_output)
    The buffers mean and std normalize the input. A state is (states of the layers, sum (b, h), count).
    """

    def __init__(self, ssm, d_input, d_output, *, d_model=128, n_layers=4, pool=True, **options):
        super().__init__()
        d_input, self.d_output = (d if isinstance(d, tuple) else (d,) for d in (d_input, d_output))
        self.pool, self.d_model = pool, d_model
        self.register_buffer("mean", torch.zeros(d_input))
        self.register_buffer("std", torch.ones(d_input))
        self.encoder = nn.Linear(math.prod(d_input), d_model)
        self.layers = nn.ModuleList(SequenceLayer(ssm(d_model), d_model, **options) for _ in range(n_layers))
        self.head = nn.Linear(d_model, math.prod(self.d_output))

    def initial_state(self, batch_size):
        """The state before the first step."""
        layers = [layer.ssm.initial_state(batch_size) for layer in self.layers]
        return layers, self.mean.new_zeros(batch_size, self.d_model), 0

    def discretize(self, rate=1.0):
        """Every layer's discrete-time matrices, to compute them once for many steps."""
        return [layer.ssm.discretize(rate) for layer in self.layers]

    def step(self, x, state, *, rate=1.0, discrete=None):
        """One step: x (b, *d_input), state -> output (b, *d_output), next state."""
        y, state = self(x[:, None], state, discrete=discrete or self.discretize(rate))
        return (y if self.pool else y[:, 0]), state

    def forward(self, x, state=None, *, rate=1.0, discrete=None):
        """A sequence or its next chunk: x (b, l, *d_input), state or None -> output, next state or None."""
        before, total, count = state or ([None] * len(self.layers), 0, 0)
        x, after = self.encoder(((x - self.mean) / self.std).flatten(2)), []
        for layer, s, d in zip(self.layers, before, discrete or [None] * len(before)):
            x, s = layer(x, s, rate=rate, discrete=d)
            after.append(s)
        total, count = total + x.sum(1, dtype=self.mean.dtype), count + x.shape[1]
        y = self.head(total / count if self.pool else x).unflatten(-1, self.d_output)
        return y, None if state is None else (after, total, count)

def build_network(args):
    """The network that the arguments ask for. Only the file of its model is imported."""
    file, name, options, n_layers, mixes = MODELS[args.model]
    if not Path(__file__).with_name(f"{file}.py").exists():
        sys.exit(f"example.py: --model {args.model} needs {file}.py, which is not here")
    layer = getattr(importlib.import_module(file), name)
    options = options | ({"d_state": args.d_state} if args.d_state else {})
    return StackedSSM(lambda h: layer(h, **options), 1 if args.grayscale else 3, 10, d_model=args.d_model,
                      n_layers=args.n_layers or n_layers, norm=args.norm, prenorm=args.prenorm,
                      dropout=args.dropout, activation="none" if mixes else args.activation)

# ------------------------------ training
def param_groups(model, lr, weight_decay):
    """Groups for AdamW with each trainable parameter exactly once. What a layer lists in ssm_lr gets that
    learning rate and no decay. Of the rest, matrices are decayed, and vectors (biases, norms, D) are not."""
    groups, special = {}, {module.get_parameter(name): (rate, 0.0) for module in model.modules()
                           for name, rate in getattr(module, "ssm_lr", {}).items()}
    for name, p in (pair for pair in model.named_parameters() if pair[1].requires_grad):
        decay = weight_decay * (p.ndim > 1 and not name.endswith(".D"))         # in s4 and lssl D is (m, h)
        groups.setdefault(special.get(p, (lr, decay)), []).append(p)
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]

def plot(path, title, panels):
    """A picture with a panel for each (x label, y label, {curve: (x, y)})."""
    from matplotlib.figure import Figure                        # without pyplot: needs no display
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for ax, (x_label, y_label, curves) in zip(figure.subplots(1, len(panels)), panels):
        for name, (x, y) in curves.items():
            ax.plot(x, y, ".-", label=name)
        ax.set(title=title, xlabel=x_label, ylabel=y_label)
        ax.legend()
        ax.locator_params("x", integer=True)                    # no half epochs
    figure.savefig(path, dpi=110)

def read_all(net, images, amp, piece=None, rate=1.0):
    """Class scores (n, 10) of images (n, l, c), read whole or in pieces that hand on the state."""
    net.eval()
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        discrete, scores = net.discretize(rate) if piece == 1 else None, []
        for x in images.split(64):
            state = net.initial_state(len(x)) if piece else None
            for u in x.split(piece or x.shape[1], dim=1):
                y, state = net(u, state, rate=rate, discrete=discrete)
            scores.append(y.float())
    return torch.cat(scores)

def train(args, net, images, labels, out, saved):
    """Train net on images (n, l, c), labels (n), from the checkpoint saved or None; returns its history."""
    device, order = images.device, torch.randperm(len(images), generator=torch.manual_seed(args.seed))
    val, rest = order.to(device).tensor_split([max(1, len(order) // 10)])
    batch = max(1, min(args.batch_size, len(rest)) // WORLD) * WORLD   # equal shares: mean of means = mean
    steps, history = len(rest) // batch, saved["history"] if saved else []
    net.std[:], net.mean[:] = torch.std_mean(images[rest[:5000]].float(), (0, 1))
    optimizer = torch.optim.AdamW(param_groups(net, args.lr, args.weight_decay))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * args.epochs)
    parts = {"model": net, "optimizer": optimizer, "schedule": schedule}
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
    model = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    for epoch in range(len(history) + 1, args.epochs + 1):
        start, sums, order = time.time(), torch.zeros(2, device=device), rest[torch.randperm(len(rest))]
        net.train()
        for step in range(1, steps + 1):
            mine = order[(step - 1) * batch:step * batch][RANK::WORLD]
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                scores = model(images[mine])[0]
                loss = F.cross_entropy(scores.float(), labels[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            sums += torch.stack([loss.detach(), (scores.argmax(1) == labels[mine]).float().mean()])
            end = "\n" if (epoch, step) == (1, min(5, steps)) else ""       # else in place, if on a terminal
            if end or step % 10 == 0 and sys.stdout.isatty():
                (a, b), t = (sums / step).tolist(), (time.time() - start) / step * steps / 60
                print(f"\repoch {epoch}, step {step}/{steps}: loss {a:.3f}, accuracy {b:.1%}, "
                      f"{t:.1f} min/epoch, {t * (args.epochs + 1 - epoch):.0f} min left", end=end, flush=True)
        if WORLD > 1:
            dist.all_reduce(sums)
        loss, accuracy = (sums / steps / WORLD).tolist()
        seconds, scores = round(time.time() - start, 2), read_all(net, images[val], args.amp)
        history.append({"epoch": epoch, "train_loss": loss, "train_accuracy": accuracy, "seconds": seconds,
                        "val_loss": F.cross_entropy(scores, labels[val]).item(),
                        "val_accuracy": (scores.argmax(1) == labels[val]).float().mean().item()})
        print("\repoch {epoch}: train loss {train_loss:.4f}, accuracy {train_accuracy:.2%}; validation loss "
              "{val_loss:.4f}, accuracy {val_accuracy:.2%}; {seconds} s".format(**history[-1]), flush=True)
        if RANK == 0:
            state = {name: part.state_dict() for name, part in parts.items()} | {
                "args": {k: v for k, v in vars(args).items() if k not in NOT_RECIPE},
                "history": history, "rng": torch.get_rng_state()}
            best = history[-1] is max(history, key=lambda row: row["val_accuracy"])
            for name in ("best.pt", "last.pt") if best else ("last.pt",):   # this order loses nothing
                torch.save(state, out / "part")
                os.replace(out / "part", out / name)  # the old file or the new, never half of it
            rows = [history[0], *map(dict.values, history)]             # the first: names of the columns
            (out / "metrics.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
            plot(out / "curves.png", args.model, [("epoch", what, {
                part: ([row["epoch"] for row in history], [row[f"{part}_{what}"] for row in history])
                for part in ("train", "val")}) for what in ("loss", "accuracy")])
    return history

# ------------------------------ evaluation
def compare_modes(net, images, labels, args):
    """Print a table of the accuracy in every mode; returns {mode: accuracy}."""
    print(f"{'test images read':<28}{'accuracy':>9}{'images':>8}{'differing':>11}{'images/s':>10}")
    half, labels, accuracy, reference = images[:, ::2], labels.cpu().numpy(), {}, None
    for mode, x, piece, rate in (
            ("in parallel", images, None, 1.0), ("in pieces of 300 pixels", images, 300, 1.0),
            ("every second pixel, rate 2", half, None, 2.0), ("every second pixel, rate 1", half, None, 1.0),
            ("pixel by pixel", images[:args.eval_limit], 1, 1.0)):
        start = time.time()
        found = read_all(net, x, args.amp, piece, rate).argmax(1).cpu().numpy()
        speed, reference = len(x) / (time.time() - start), found if reference is None else reference
        accuracy[mode], differing = np.mean(found == labels[:len(x)]), np.sum(found != reference[:len(x)])
        print(f"{mode:<28}{accuracy[mode]:>9.2%}{len(x):>8}{differing:>11}{speed:>10.1f}", flush=True)
    return accuracy

def compare_models(args, argv):
    """--model all: train each model in a process of its own, then one table and one figure."""
    columns, results = "model parameters test_accuracy epoch_seconds step_ms peak_memory_MB".split(), []
    for name in (name for name in MODELS if Path(__file__).with_name(f"{MODELS[name][0]}.py").exists()):
        print(f"--- {name}", flush=True)
        if subprocess.run([sys.executable, __file__, *argv, "--model", name]).returncode:
            sys.exit(f"example.py: {name} did not finish")
        results.append(json.loads((args.out / name / "result.json").read_text()))
    rows = [[r[c] if type(r[c]) in (str, int) else f"{r[c]:.4g}" for c in columns] for r in results]
    table = "\n".join("".join(f"{value:>16}" for value in row) for row in [columns, *rows])
    print(table)
    (args.out / "comparison.txt").write_text(table + "\n")
    plot(args.out / "comparison.png", f"validation, {results[0]['data']}", [(label, "accuracy", {
        r["model"]: (np.cumsum([row.get(step, 1) for row in r["history"]]),
                     [row["val_accuracy"] for row in r["history"]]) for r in results})
        for label, step in (("epoch", None), ("seconds of training", "seconds"))])

# ------------------------------ command line
def keep_freed_memory():
    """Have Linux keep freed memory for the next step instead of clearing it anew: 2 to 3 times faster."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 2 ** 28)):
            libc.mallopt(option, value)                         # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD

def parse(argv):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for flag, choices in {"model": ["s4d", *MODELS, *["all"] * (WORLD == 1)], "norm": ["layer", "batch"],
                          "data": ["auto", "cifar10", "builtin"], "device": ["auto", "cpu", "cuda"],
                          "activation": ["glu", "gelu", "half_glu1", "half_glu2"]}.items():
        parser.add_argument(f"--{flag}", choices=choices, default=choices[0])
    for flag in ("grayscale", "prenorm", "amp", "resume"):
        parser.add_argument(f"--{flag}", action="store_true")
    for flag, default, low, text in (
            ("epochs", None, 1, "100, built-in 4"), ("batch-size", None, WORLD, "64, built-in 16"),
            ("limit", None, 2 * WORLD + 1, "training and test images"), ("d-model", 128, 1, "features"),
            ("d-state", None, 2, "default: the model's"), ("n-layers", None, 1, "4, mamba 2"),
            ("eval-limit", 256, 1, "test images to read pixel by pixel"), ("seed", 0, 0, ""),
            ("lr", 0.01, 0, ""), ("weight-decay", 0.01, 0, ""), ("dropout", 0.1, 0, "at most 1")):
        def number(text, kind=float if isinstance(default, float) else int, low=low, flag=flag):
            if not low <= (x := kind(text)) <= (1e9, 1)[flag == "dropout"] or flag == "d-state" and x % 2:
                raise argparse.ArgumentTypeError(f"{text} is not an allowed value (lowest {low})")
            return x
        parser.add_argument(f"--{flag}", type=number, default=default, help=text)
    for flag, default in (("data-dir", Path("data")), ("out", Path("runs")), ("eval", None)):
        parser.add_argument(f"--{flag}", type=Path, default=default)
    return parser.parse_args(argv)

def main(argv=None):
    """Train, resume or evaluate, as the command line says."""
    args = parse(argv)
    if args.out.is_file() or args.eval and (args.model == "all" or not args.eval.is_file()):
        sys.exit(f"example.py: --out {args.out} must be a folder, --eval {args.eval} one checkpoint")
    if args.model == "all":
        return compare_models(args, sys.argv[1:] if argv is None else argv)
    keep_freed_memory()
    out, saved = args.out / args.model, None
    if args.eval or args.resume and (out / "last.pt").exists():
        saved = torch.load(args.eval or out / "last.pt", map_location="cpu", weights_only=True)
        vars(args).update(saved["args"])
    use_gpu = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if use_gpu else "cpu")
    if WORLD > 1:
        dist.init_process_group("nccl" if use_gpu else "gloo", device_id=device if use_gpu else None)
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    images, labels, test_images, test_labels = load_data(args, device)
    args.epochs = args.epochs or (4 if args.data == "builtin" else 100)
    args.batch_size = args.batch_size or (16 if args.data == "builtin" else 64)
    torch.manual_seed(args.seed)
    net = build_network(args).to(device)
    size = sum(p.numel() for p in net.parameters())
    print(f"{args.model}: {size:,} parameters, {device}, {args.data}, batch {args.batch_size}, "
          f"{args.epochs} epochs, {len(images)} + {len(test_images)} images", flush=True)
    if args.eval:
        net.load_state_dict(saved["model"])
        return compare_modes(net, test_images, test_labels, args)
    out.mkdir(parents=True, exist_ok=True)
    if RANK == 0 and not saved and (out / "last.pt").exists():    # or --resume would go on with the older run
        os.replace(out / "last.pt", out / "previous.pt")
    history = train(args, net, images, labels, out, saved)
    if RANK == 0:
        net.load_state_dict(torch.load(out / "best.pt", map_location=device, weights_only=True)["model"])
        accuracy, start = compare_modes(net, test_images, test_labels, args), time.time()
        read_all(net, test_images[:1, :100], args.amp, piece=1).cpu()       # 100 steps
        peak = math.nan if os.name != "posix" else importlib.import_module("resource").getrusage(0).ru_maxrss
        peak = torch.cuda.max_memory_allocated() if use_gpu else peak * (1024, 1)[sys.platform == "darwin"]
        (out / "result.json").write_text(json.dumps({
            "model": args.model, "data": args.data, "parameters": size, "modes": accuracy, "history": history,
            "test_accuracy": accuracy["in parallel"], "step_ms": 10 * (time.time() - start),
            "epoch_seconds": np.mean([row["seconds"] for row in history]), "peak_memory_MB": peak / 1e6}))
    if WORLD > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped; the same command with --resume goes on after the last whole epoch.")
