"""The CPU kernel of a prompt's rows: weights, and what each key got, as the torch form does it."""

import pytest
import torch
from tiny_models import close

from lesslib import H2O
from lesslib.attention.prompt import Candidates, attend_candidates
from lesslib.ops import blocks, dispatch

pytest.importorskip("numba", reason="numba is not installed")

from lesslib.ops import cpu


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 5, 7), (2, 3, 64, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_are_weighed_as_in_the_torch_form(shape, dtype):
    rows, G, b, n = shape
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(shape, generator=generator, dtype=dtype)
    # Keys that a query does not see, but for its own.
    logits[..., :-1].masked_fill_(
        torch.rand(shape, generator=generator)[..., :-1] < 0.3, -torch.inf
    )
    is_counted = torch.rand(rows, b, generator=generator) < 0.7
    columns = torch.rand(rows, G, n + 3, generator=generator, dtype=dtype)
    weights = {}
    results = {}
    for name, form in (("cpu", cpu.weigh_rows), ("torch", blocks.weigh_rows)):
        weights[name] = logits.clone()
        total = columns.clone()
        results[name] = (*form(weights[name], is_counted, total), total)
    atol = 1e-10 if dtype == torch.float64 else 1e-5
    close(weights["cpu"], weights["torch"], atol)
    for got, want in zip(results["cpu"], results["torch"], strict=True):
        torch.testing.assert_close(got, want, atol=atol, rtol=atol)
    assert torch.equal(results["cpu"][2][..., n:], columns[..., n:]), "later keys got nothing"


@pytest.mark.parametrize("pads", [[0, 0], [0, 90]], ids=str)
def test_a_prompt_at_the_shapes_of_smollm2_in_both_forms(pads, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    S = 200
    q, k, v = (torch.randn(2, heads, S, 64, generator=generator) for heads in (9, 3, 3))
    real = torch.arange(S) >= torch.tensor(pads)[:, None]
    position = blocks.positions(real)[:, None].expand(2, 3, S)
    prompt = Candidates(k, v, position, torch.zeros(2, 3, S))
    attended = {}
    for form in ("cpu", "torch"):
        monkeypatch.setenv("LESS_OPS", form)
        attended[form] = attend_candidates(H2O(2, 2), q, prompt, real, 0.125)
    close(attended["cpu"].part.output, attended["torch"].part.output, 1e-5)
    close(attended["cpu"].part.logsumexp, attended["torch"].part.logsumexp, 1e-5)
    close(attended["cpu"].columns, attended["torch"].columns, 1e-4)
    # Every real query gives 1 in all.
    totals = attended["cpu"].columns.sum((2, 3))
    close(totals, 3.0 * real.sum(1)[:, None].expand(2, 3), 1e-3)


def test_the_kernel_serves_unless_torch_is_forced_or_gradients_are_kept(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "weigh_rows", lambda *given: calls.append(given))
    given = (torch.zeros(1, 1, 1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, 1))
    with torch.no_grad():
        dispatch.weigh_rows(*given)
        monkeypatch.setenv("LESS_OPS", "torch")
        dispatch.weigh_rows(*given)
    monkeypatch.delenv("LESS_OPS")
    dispatch.weigh_rows(*given)
    assert len(calls) == 1
