"""What of PyTorch the layers work with: FEATURES is the table in README.md, of all layers and without a warning.

State dicts, copies, pickles, float64 and autocast: test_modes.py. Official parameters: test_checkpoints.py.
"""

import warnings

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel

from layers import CASES, error, leaves, random_state, signal

LAYERS = {"LSSL": "lssl", "S4": "s4", "DSS": "dss", "S4D": "s4d", "GSS": "gss", "S5": "s5", "LRU": "lru",
          "SelectiveSSM": "selective", "Mamba": "mamba"}

def build(cls):
    """A small layer and an input."""
    case = next(case for case in CASES if case.name == LAYERS[cls])
    return case, case.build(), signal(3, case.h, 3)


def trained(layer):
    """The parameters without the frozen ones, as the dict that torch.func takes."""
    return {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}


def run(layer, call, u):
    """Output and gradients of a call with the layer's parameters."""
    layer.zero_grad()
    y, _ = call(u)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}


def by_func(layer, u, **options):
    """The same by torch.func.grad."""
    def loss(parameters):
        y, _ = functional_call(layer, parameters, (u,), options)
        return y.square().sum(), y
    gradients, y = grad(loss, has_aux=True)(trained(layer))
    return y, gradients


def by_vmap(layer, u, **options):
    """The same by torch.func.vmap over the batch, with the gradient of each sample."""
    y = vmap(lambda sample: layer(sample[None], **options)[0][0])(u)
    gradients = vmap(lambda sample: by_func(layer, sample[None], **options)[1])(u)
    return y, {name: gradient.sum(0) for name, gradient in gradients.items()}


def by_ensemble(layer, u, **options):
    """torch.func.vmap over the parameters of two equal layers, which share the input."""
    y = vmap(lambda *state: functional_call(layer, state, (u,), options)[0])(*stack_module_state([layer, layer]))
    assert torch.equal(y[0], y[1])
    return y[0], {}


def by_jacobian(layer, u, **options):
    """The gradients from the Jacobian of the output in the parameters: sum_k 2 y_k dy_k."""
    y, _ = layer(u, **options)
    jacobian = jacrev(lambda parameters: functional_call(layer, parameters, (u,), options)[0])(trained(layer))
    return y, {name: torch.tensordot(2 * y, matrix, y.ndim) for name, matrix in jacobian.items()}


def by_hessian(layer, u, **options):
    """Second derivatives: the gradient of |gradient|^2 / 2 in direction v is v H gradient, forward over reverse."""
    def loss(u):
        return layer(u, **options)[0].square().sum()
    H = hessian(loss)(u).flatten(0, 2).flatten(1)
    v = u.clone().requires_grad_()
    gradient, = torch.autograd.grad(loss(v), v, create_graph=True)
    expected, = torch.autograd.grad(gradient.square().sum() / 2, v)
    assert error(H @ gradient.detach().flatten(), expected.flatten()) <= 1e-5
    return layer(u, **options)[0], {}


def by_compiler(layer, u, **how):
    """The same by torch.compile in one graph; this back end traces both passes and generates no code."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, **how)
    result = run(layer, compiled, u)
    with torch.no_grad():                          # another length and batch, with a state and without
        for v, x in ((signal(2, u.shape[1], 5), None), (signal(1, u.shape[1], 7), random_state(layer, 1))):
            (y, last), (expected, expected_last) = compiled(v, x), layer(v, x)
            for got, want in zip([y, *leaves(last)], [expected, *leaves(expected_last)]):
                assert error(got, want) <= 1e-5
    return result


FEATURES = {
    "DistributedDataParallel": lambda layer, u: run(layer, DistributedDataParallel(layer), u),
    "torch.func.grad": by_func,
    "torch.func.vmap": by_vmap,
    "an ensemble": by_ensemble,
    "jacrev": by_jacobian,
    "hessian": by_hessian,
    "torch.compile": by_compiler,
    "torch.compile, dynamic": lambda layer, u: by_compiler(layer, u, dynamic=True),
    "torch.export": lambda layer, u: (torch.export.export(layer, (u,)).module()(u)[0], {}),
}


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the table is that of torch 2.13")
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("cls", LAYERS)
def test_the_table(cls, feature, process_group):
    case, layer, u = build(cls)
    expected, gradients = run(layer, layer, u)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Grad strides")        # DDP, on the stride of a dimension of size 1
        y, found = FEATURES[feature](layer, u)
    assert error(y, expected) <= 1e-5
    for name in found:
        assert error(found[name], gradients[name]) <= 1e-5, name
    warned = [str(w.message) for w in caught if w.category is UserWarning]
    assert not warned


@pytest.mark.parametrize("cls, method", [("S5", "conv"), ("LRU", "conv"), ("SelectiveSSM", "step"),
                                         ("Mamba", "step")])
def test_torch_func_works_in_the_other_modes(cls, method):
    case, layer, u = build(cls)
    expected, gradients = run(layer, layer, u)
    for by in (by_func, by_vmap, by_ensemble, by_jacobian):
        y, found = by(layer, u, method=method)
        assert error(y, expected) <= 1e-5
        assert all(error(gradient, gradients[name]) <= 1e-5 for name, gradient in found.items())


@pytest.mark.parametrize("cls", LAYERS)
def test_no_warning_is_printed(cls, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case, layer, u = build(cls)
        x = random_state(layer, 3)
        for method in case.methods:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y, last = layer(u.requires_grad_(), x, method=method)
            sum(t.abs().sum() for t in [y, *leaves(last)]).backward()
        layer.step(u[..., 0], x, discrete=layer.discretize(2.0))
    assert capfd.readouterr() == ("", "")
