"""What of PyTorch the layers work with: FEATURES is the table in docs/measured.md, without a
warning. State dicts, copies, pickles, float64, autocast: test_modes.py."""

import copy
import functools
import warnings
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel

from layers import ROOT, error, leaves, named, random_state, signal
from test_compile import set_block

LAYERS = ["lssl", "s4", "dss", "s4d", "gss", "s5", "lru", "selective", "mamba"]


def build(name):
    """A small layer and an input."""
    case, = named(name)
    return case, case.build(), signal(3, case.h, 3)


def trained(layer):
    """The parameters without the frozen ones, as the dict that torch.func takes."""
    return {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}


def output(layer, parameters, u, **options):
    """The output with other parameters."""
    return functional_call(layer, parameters, (u,), options)[0]


def run(layer, call, u):
    """Output and gradients of a call with the layer's parameters."""
    layer.zero_grad()
    y, _ = call(u)
    y.square().sum().backward()
    gradients = {name: layer.get_parameter(name).grad.clone() for name in trained(layer)}
    return y.detach(), gradients


def by_func(layer, u, **options):
    """The same by torch.func.grad."""
    def loss(parameters):
        y = output(layer, parameters, u, **options)
        return y.square().sum(), y
    gradients, y = grad(loss, has_aux=True)(trained(layer))
    return y, gradients


def by_vmap(layer, u, **options):
    """The same by torch.func.vmap over the batch, with the gradient of each sample."""
    y = vmap(lambda sample: layer(sample[None], **options)[0][0])(u)
    gradients = vmap(lambda sample: by_func(layer, sample[None], **options)[1])(u)
    return y, {name: gradient.sum(0) for name, gradient in gradients.items()}


def by_ensemble(layer, u, **options):
    """torch.func.vmap over the parameters of two different layers, which share the input,
    with the gradients of each. The second has parameters of half the size."""
    half = copy.deepcopy(layer)
    with torch.no_grad():
        for p in half.parameters():
            p.mul_(0.5)
    both, _ = stack_module_state([layer, half])
    fixed = {name for name, p in layer.named_parameters() if not p.requires_grad}

    def loss(parameters, constants):
        y = output(layer, parameters | constants, u, **options)
        return y.square().sum(), y
    constants = {name: both.pop(name) for name in fixed}
    gradients, y = vmap(grad(loss, has_aux=True))(both, constants)
    expected, of_half = run(half, lambda u: half(u, **options), u)
    assert error(y[1], expected) <= 1e-5
    for name, gradient in of_half.items():
        assert error(gradients[name][1], gradient) <= 1e-5, name
    return y[0], {name: gradient[0] for name, gradient in gradients.items()}


def by_jacobian(layer, u, **options):
    """The gradients from the Jacobian of the output in the parameters: sum_k 2 y_k dy_k."""
    y, _ = layer(u, **options)
    jacobian = jacrev(lambda parameters: output(layer, parameters, u, **options))
    return y, {name: torch.tensordot(2 * y, matrix, y.ndim)
               for name, matrix in jacobian(trained(layer)).items()}


def by_hessian(layer, u):
    """Second derivatives, forward over reverse: the gradient of |gradient|^2 / 2 is
    H gradient. The scan of selective_scan.py has no forward mode: reverse over reverse, or
    the loop."""
    def loss(u, **options):
        return layer(u, **options)[0].square().sum()
    if hasattr(layer, "select"):
        twice = jacrev(jacrev(loss))(u)
        by_steps = hessian(functools.partial(loss, method="step"))(u)
        assert error(twice, by_steps) <= 1e-5
        H = twice.flatten(0, 2).flatten(1)
    else:
        H = hessian(loss)(u).flatten(0, 2).flatten(1)
    v = u.clone().requires_grad_()
    gradient, = torch.autograd.grad(loss(v), v, create_graph=True)
    expected, = torch.autograd.grad(gradient.square().sum() / 2, v)
    assert error(H @ gradient.detach().flatten(), expected.flatten()) <= 1e-5
    return layer(u)[0], {}


def by_compiler(layer, u, **how):
    """The same by torch.compile in one graph; this back end traces both passes and
    generates no code."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, **how)
    result = run(layer, compiled, u)
    with torch.no_grad():       # another length and batch, with a state
        v, x = signal(2, u.shape[1], 5), random_state(layer, 2)
        assert error(compiled(v, x), layer(v, x)) <= 1e-5
    return result


def by_dynamic_compiler(layer, u):
    """The same, with a graph for any length."""
    return by_compiler(layer, u, dynamic=True)


def by_distributed(layer, u):
    """The same by DistributedDataParallel, with one process."""
    return run(layer, DistributedDataParallel(layer), u)


def by_export(layer, u):
    """torch.export, for any batch."""
    shapes = ({0: torch.export.Dim("batch", min=2, max=100)},)
    program = torch.export.export(layer, (u,), dynamic_shapes=shapes).module()
    v = signal(7, *u.shape[1:])
    assert error(program(v)[0], layer(v)[0]) <= 1e-5
    return program(u)[0], {}


def is_ours(warning):
    """Whether a warning is ours to avoid: what is raised in a file of this repository, and
    of torch all but what it says about itself, that something in it is deprecated."""
    about_itself = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
    folder = Path(warning.filename).parent              # not of a .venv in this folder
    ours = folder in (ROOT, ROOT / "tests")
    return ours or not issubclass(warning.category, about_itself)


FEATURES = [by_distributed, by_func, by_vmap, by_ensemble, by_jacobian, by_hessian,
            by_compiler, by_dynamic_compiler, by_export]


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "file"
    store = f"file://{file}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compare(name, feature, **options):
    """Output and gradients by a feature with those of a plain call; no warning of ours."""
    _, layer, u = build(name)
    expected, gradients = run(layer, layer, u)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Grad strides")   # DDP, of a dimension of size 1
        y, found = feature(layer, u, **options)
    assert error(y, expected) <= 1e-5
    for parameter, gradient in found.items():
        assert error(gradient, gradients[parameter]) <= 1e-5, parameter
    assert not [str(w.message) for w in caught if is_ours(w)]


@pytest.mark.skipif(not torch.__version__.startswith("2.13"),
                    reason="the table is that of torch 2.13")
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", LAYERS)
def test_the_table(name, feature, process_group, monkeypatch):
    if name in ("selective", "mamba"):                  # a graph has each step of a block
        set_block(monkeypatch, name, 2 if feature is by_export else 8)
    compare(name, feature)


@pytest.mark.parametrize("by", [by_func, by_vmap, by_ensemble, by_jacobian])
@pytest.mark.parametrize("name, method", [("s5", "conv"), ("lru", "conv"),
                                          ("selective", "step"), ("mamba", "step")])
def test_torch_func_works_in_the_other_modes(name, method, by):
    compare(name, by, method=method)


@pytest.mark.parametrize("name", LAYERS)
def test_no_warning_is_printed(name, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case, layer, u = build(name)
        x = random_state(layer, 3)
        for method in case.methods:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y, last = layer(u.requires_grad_(), x, method=method)
            sum(t.abs().sum() for t in [y, *leaves(last)]).backward()
        layer.step(u[..., 0], x, discrete=layer.discretize(2.0))
    assert capfd.readouterr() == ("", "")
