"""The feature maps phi and psi, the Performer baseline, and checkpoints: what they hold and what
a wrong one says.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tiny_models import parameter_count

from lesslib.states import FORMAT, SCALE_INIT, Kernels, LayerKernels, LayerPerformer

SHAPE = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 6}
IDENTITY = {"model": "mine", "revision": "abc"}


@pytest.fixture
def kernels():
    return Kernels.new(SHAPE, kernel_size=3, hidden=7, seed=5)


@pytest.fixture
def path(kernels, tmp_path):
    kernels.header |= IDENTITY | {"policy": "h2o", "budget": 50}
    kernels.save(tmp_path / "deep" / "k.safetensors")
    return tmp_path / "deep" / "k.safetensors"


def rewrite(path, tensors=None, **metadata):
    """Change some tensors (None drops one) and metadata of the file at `path`."""
    with safe_open(path, framework="pt") as f:
        old = f.metadata()
    new = load_file(path) | (tensors or {})
    save_file(
        {n: t for n, t in new.items() if t is not None},
        path,
        metadata={n: v for n, v in (old | metadata).items() if v is not None},
    )


def header(**changes):
    made = {**SHAPE, "kernel_size": 3, "hidden": 7, "seed": 5} | changes
    return {"header": json.dumps({n: v for n, v in made.items() if v is not None})}


# ---------------------------------------------------------------- features
@pytest.mark.parametrize(("Hq", "Hkv"), [(1, 1), (4, 4), (6, 2), (3, 1)])
def test_shapes_and_signs(Hq, Hkv):
    layer = LayerKernels(Hq, Hkv, head_dim=6, kernel_size=3, hidden=7).eval()
    phi, psi = layer.phi(torch.randn(2, Hq, 9, 6)), layer.psi(torch.randn(2, Hkv, 9, 6))
    assert phi.shape == (2, Hq, 9, 3)
    assert psi.shape == (2, Hkv, 9, 3)
    assert (phi >= 0).all()
    assert (psi >= 0).all()
    assert phi.max() > 0
    assert 0 < psi.max() < SCALE_INIT * 20, "the state starts next to nothing"


def test_features_are_the_formulas_of_the_paper_head_by_head():
    layer = LayerKernels(4, 2, head_dim=6, kernel_size=3, hidden=7).double().eval()
    torch.nn.init.normal_(layer.s1)
    torch.nn.init.normal_(layer.s2)
    q, k = torch.randn(2, 4, 5, 6).double(), torch.randn(2, 2, 5, 6).double()
    for h in range(4):
        expected = F.gelu(F.gelu(q[:, h] @ layer.phi_w1[h]) @ layer.phi_w2[h]).abs()
        torch.testing.assert_close(layer.phi(q)[:, h], expected)
    for h in range(2):
        u = layer.s1[h].abs() * F.gelu(F.gelu(k[:, h] @ layer.psi_w1[h]) @ layer.psi_w2[h])
        torch.testing.assert_close(
            layer.psi(k)[:, h], (u + (u @ layer.psi_w3[h]) * layer.s2[h]).abs()
        )


def test_dropout_acts_in_training_only():
    layer, q = (
        LayerKernels(2, 2, head_dim=6, kernel_size=3, hidden=50, dropout=0.5),
        torch.randn(1, 2, 9, 6),
    )
    assert not torch.equal(layer.phi(q), layer.phi(q))
    layer.eval()
    assert torch.equal(layer.phi(q), layer.phi(q))


def test_every_weight_receives_a_gradient():
    layer = LayerKernels(4, 2, head_dim=6, kernel_size=3, hidden=7).train()
    (layer.phi(torch.randn(2, 4, 9, 6)).sum() + layer.psi(torch.randn(2, 2, 9, 6)).sum()).backward()
    assert [
        n for n, p in layer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_half_precision_inputs_are_float32(dtype, kernels):
    x = torch.randn(1, 4, 5, 6).to(dtype)
    for layer in (kernels.eval()[0], Kernels.performer(SHAPE)[0]):
        assert layer.phi(x).dtype == layer.psi(x[:, :2]).dtype == torch.float32
        assert torch.equal(layer.psi(x[:, :2]), layer.psi(x[:, :2].float()))


@pytest.mark.parametrize("R", [8, 20])
def test_performer_is_an_unbiased_estimate_of_the_softmax_kernel(R):
    """The mean over 4000 independent draws of directions lies within 5 standard errors of exp(q k
    / sqrt D).
    """
    generator, D = torch.Generator().manual_seed(0), 6
    q, k = (0.8 * torch.randn(1, h, 5, D, generator=generator) for h in (2, 1))
    draws = []
    for _ in range(4000):
        layer = LayerPerformer(2, 1, D, R, generator)
        draws.append(layer.phi(q) @ layer.psi(k).transpose(-1, -2))
    estimates = torch.stack(draws)
    kernel, standard = (q @ k.transpose(-1, -2) / D**0.5).exp(), estimates.std(0) / 4000**0.5
    assert ((estimates.mean(0) - kernel).abs() < 5 * standard).all()
    assert (standard < 0.05 * kernel).float().mean() > 0.8, "so many draws can tell a wrong factor"
    assert (estimates > 0).all()


def test_performer_directions_are_orthogonal_within_blocks_of_the_head_size():
    layer = LayerPerformer(1, 1, 6, 15, torch.Generator().manual_seed(0))
    unit = layer.directions[0] / layer.directions[0].norm(dim=0)
    for block in unit.split(6, 1):
        torch.testing.assert_close(block.T @ block, torch.eye(block.shape[1]), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- making
@pytest.mark.parametrize(
    ("heads", "kv_heads", "D", "R", "hidden"), [(4, 2, 6, 3, 7), (8, 1, 16, 8, 32), (2, 2, 5, 1, 1)]
)
def test_parameter_count(heads, kv_heads, D, R, hidden):
    kernels = Kernels.new(
        {"layers": 3, "heads": heads, "kv_heads": kv_heads, "head_dim": D}, R, hidden
    )
    phi, psi = (
        heads * (D * hidden + hidden * R),
        kv_heads * (D * hidden + hidden * R + R * R + 2 * R),
    )
    assert parameter_count(kernels) == 3 * (phi + psi)
    assert parameter_count(kernels) == 3 * (
        (heads + kv_heads) * (D + R) * hidden + kv_heads * R * (R + 2)
    )
    assert parameter_count(Kernels.performer(SHAPE)) == 0


def test_initial_weights_follow_the_seed_alone(kernels):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again, other = Kernels.new(SHAPE, 3, 7, seed=5), Kernels.new(SHAPE, 3, 7, seed=6)
    assert torch.equal(torch.get_rng_state(), before), "nobody else's random numbers are used up"
    assert all(
        torch.equal(a, b) for a, b in zip(kernels.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(other[0].phi_w1, again[0].phi_w1)
    assert not torch.equal(again[1].phi_w1, again[0].phi_w1), "layers differ"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Kernels.new(SHAPE, 0, 7), "kernel_size=0"),
        (lambda: Kernels.new(SHAPE, 3, 7.5), r"hidden=7\.5"),
        (lambda: Kernels.performer(SHAPE, -1), "kernel_size=-1"),
        (lambda: Kernels.new(SHAPE | {"layers": 0}, 3, 7), "layers=0"),
        (lambda: Kernels.new(SHAPE | {"heads": 3}, 3, 7), "3 query heads do not divide into 2"),
        (lambda: Kernels.performer(SHAPE | {"heads": 3}), "3 query heads do not divide into 2"),
    ],
)
def test_sizes_that_cannot_be(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("dtype", "tokens"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 3)]
)
def test_compiled_features_are_the_same(dtype, tokens):
    layer = Kernels.new(SHAPE, 3, 7)[0].eval().to(dtype)
    q, k = (
        torch.randn(1, SHAPE[heads], tokens, SHAPE["head_dim"]) for heads in ("heads", "kv_heads")
    )
    for feature, x in ((layer.phi, q), (layer.psi, k)):
        torch.testing.assert_close(
            torch.compile(feature, backend="eager", fullgraph=True)(x), feature(x)
        )


# ---------------------------------------------------------------- checkpoints
def test_save_and_load_give_the_same_kernels(kernels, path):
    loaded = Kernels.load(path)
    assert loaded.header == kernels.header
    assert not loaded.training
    states = (kernels.state_dict(), loaded.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    loaded.check(SHAPE, IDENTITY)


def test_weights_lie_in_the_order_of_their_longer_side(path):
    """Also after loading and in another type: a decode step reads them so."""
    for layer in Kernels.load(path).to(torch.bfloat16).layers:
        assert layer.phi_w1.is_contiguous()
        assert all(
            w.mT.is_contiguous() and not w.is_contiguous() for w in (layer.phi_w2, layer.psi_w2)
        )


def test_performers_are_saved_too(tmp_path):
    made = Kernels.performer(SHAPE, 5, seed=3)
    made.save(tmp_path / "p.safetensors")
    loaded, x = Kernels.load(tmp_path / "p.safetensors"), torch.randn(1, 2, 4, 6)
    assert torch.equal(loaded[1].psi(x), made[1].psi(x))


def test_an_interrupted_save_leaves_the_old_file_whole(kernels, path, monkeypatch):
    before = path.read_bytes()
    with torch.no_grad():
        kernels[0].s1 += 1
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        kernels.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path], "no scratch file stays behind"


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no kernels at .*python -m lesslib\.train"):
        Kernels.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 40, 0.5, -1])
def test_a_file_cut_short_is_refused(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Kernels.load(path)


def test_another_kind_of_file_is_refused(path):
    path.write_bytes(save({"weight": torch.ones(3)}))
    with pytest.raises(ValueError, match=f"format None, not '{FORMAT}'"):
        Kernels.load(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "less-kernels-0"}, "format 'less-kernels-0'"),
        ({"header": None}, "header is damaged"),
        ({"header": "{"}, "header is damaged"),
        ({"header": "[]"}, "header is damaged"),
        (header(kernel_size=None), "header is damaged.*kernel_size"),
        (header(heads="4"), "header is damaged.*heads='4'"),
        (header(head_dim=0), "header is damaged.*head_dim=0"),
        (header(layers=3), r"layers\.2\.\w+ is missing"),
        (header(layers=1), r"layers\.1\.\w+ is \(.*not to be there"),
        (header(heads=2), r"layers\.0\.phi_w1 is \(4, 6, 7\), the header says \(2, 6, 7\)"),
        (header(head_dim=8), r"layers\.0\.phi_w1 is \(4, 6, 7\), the header says \(4, 8, 7\)"),
        (header(kernel_size=4), r"layers\.0\.phi_w2 is \(4, 7, 3\), the header says \(4, 7, 4\)"),
        (
            {"tensors": {"layers.0.s1": torch.full((2, 1, 3), float("nan"))}},
            r"layers\.0\.s1 holds NaN",
        ),
        (
            {"tensors": {"layers.1.psi_w3": torch.full((2, 3, 3), float("inf"))}},
            r"layers\.1\.psi_w3 holds NaN or infinite",
        ),
        ({"tensors": {"layers.1.s2": None}}, r"layers\.1\.s2 is missing"),
        (
            {"tensors": {"extra": torch.ones(1)}},
            r"extra is \(1,\), the header says not to be there",
        ),
    ],
)
def test_a_file_that_does_not_hold_together_names_the_field(path, change, says):
    rewrite(path, **change)
    with pytest.raises(ValueError, match=says):
        Kernels.load(path)


@pytest.mark.parametrize(
    ("shape", "identity", "says"),
    [
        ({"layers": 3}, {}, "layers is 2 in the kernels and 3 in the model"),
        ({"heads": 8}, {}, "heads is 4 in the kernels and 8 in the model"),
        ({"kv_heads": 4}, {}, "kv_heads is 2 in the kernels and 4 in the model"),
        ({"head_dim": 64}, {}, "head_dim is 6 in the kernels and 64 in the model"),
        ({}, {"model": "another"}, "model is mine in the kernels and another in the model"),
        ({}, {"revision": "def"}, "revision is abc in the kernels and def in the model"),
    ],
)
def test_kernels_of_another_model_are_refused(path, shape, identity, says):
    with pytest.raises(ValueError, match=says):
        Kernels.load(path).check(SHAPE | shape, IDENTITY | identity)


def test_nan_weights_are_refused(kernels):
    kernels.check(SHAPE)
    with torch.no_grad():
        kernels[1].psi_w2[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        kernels.check(SHAPE)
