"""Sections 3.1 and 4: what the weights' shapes alone say of sizes; nothing is computed for them."""

from __future__ import annotations

from collections.abc import Iterator

from lesslib.experiments.claims import Verdict, claim
from lesslib.reporting.paper import PAPER

# Of the paper's kernels: their width, and R.
HIDDEN = 512
KERNEL_SIZE = 8


def layer_weights(model: dict, hidden: int = HIDDEN, R: int = KERNEL_SIZE) -> int:
    """Numbers in the kernels of one layer of a model of the paper's."""
    D = model["head_dim"]
    # Phi of a query head and psi of a KV head: D x hidden, hidden x R.
    two_layers = (model["heads"] + model["kv_heads"]) * (D + R) * hidden
    # Of psi only: W3 is R x R, and s1 and s2 have R each.
    residual = model["kv_heads"] * R * (R + 2)
    return two_layers + residual


@claim(
    "Section 3.1",
    "The kernels add less than 2% to the parameters",
    paper="<2%",
    needs=(),
)
def parameters(hidden: int = HIDDEN, R: int = KERNEL_SIZE) -> Iterator[Verdict]:
    """The kernels' parameters against the model's (section 3.1)."""
    for name, model in PAPER["models"].items():
        share = model["layers"] * layer_weights(model, hidden, R) / model["parameters"]
        claim = f"{name}: the kernels add less than 2% to its parameters"
        yield Verdict(claim, share < 0.02, f"{share:.2%}")


@claim("Section 4", "A state takes the memory of 4 tokens", paper="4", needs=())
def state(hidden: int = HIDDEN, R: int = KERNEL_SIZE) -> Iterator[Verdict]:
    """The state of a head in tokens of 2 D numbers (section 4).

    Beside it, in the same tokens, the kernels' weights, which all sequences of a batch share.
    """
    for name, model in PAPER["models"].items():
        token = 2 * model["head_dim"]
        # H is R x D, z is R.
        tokens = R * (model["head_dim"] + 1) / token
        weights = layer_weights(model, hidden, R) / model["kv_heads"] / token
        yield Verdict(
            f"{name}: a head's state takes the memory of 4 tokens (within 2%)",
            abs(tokens / 4 - 1) <= 0.02,
            f"{tokens:.2f} tokens; its kernels {weights:.0f}, "
            f"or {weights / 64:.1f} for each of a batch of 64",
        )


def verdicts() -> list[Verdict]:
    """Both claims on sizes."""
    return [*parameters(), *state()]
