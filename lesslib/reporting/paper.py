"""The paper's numbers (assets/paper.json), and how this project names their rows and columns."""

import json

from lesslib.util.paths import ASSETS

PAPER: dict = json.loads((ASSETS / "paper.json").read_text())

# The paper's row of a method, where it has another name.
ROWS = {"Performer": "H2O+Performer"}
# The paper's column of a policy.
POLICIES = {"h2o": "H2O", "lambda": "Lambda", "tova": "TOVA"}


def table2(corpus: str, fraction: float, method: str) -> float:
    """Word perplexity of Llama 2 7B under H2O on "WikiText" or "PG-19" (Table 2).

    Raises KeyError for a cell that the paper does not have.
    """
    table = PAPER["table2"]
    row = table[corpus][ROWS.get(method, method)]
    return row[table["columns"].index(f"{fraction:.0%}")]


def table7(corpus: str, policy: str, method: str) -> float:
    """Word perplexity of Llama 2 7B at 5% of the context, by policy (Table 7).

    Raises KeyError for a cell that the paper does not have.
    """
    table = PAPER["table7"]
    row = table[corpus][method]
    return row[table["columns"].index(POLICIES[policy])]
