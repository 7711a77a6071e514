"""Claims of the paper as functions from recorded results to verdicts: what holds here, what fails, and by which numbers."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lesslib.evaluation import gap_closed
from lesslib.evaluation.perplexity import RECURRENCE


@dataclass(frozen=True)
class Verdict:
    """A claim, whether the recorded numbers bear it out (None: they are noise, or the full cache itself fails at the task), and those."""

    claim: str
    holds: bool | None
    numbers: str

    @property
    def here(self) -> str:
        return {True: "holds", False: "FAILS", None: "undecided"}[self.holds]

    def __str__(self) -> str:
        return f"{self.here}: {self.claim}"


def groups(record: dict) -> dict[str, dict[str, dict]]:
    """Points by all of their name but the method, then by method, where Baseline+ is among these; with Full of the corpus or task."""
    found: dict[str, dict[str, dict]] = {}
    for name, point in record["points"].items():
        found.setdefault(name.rpartition("/")[0], {})[name.rpartition("/")[2]] = point
    return {
        g: found.get(g.split("/")[0], {}) | rows for g, rows in found.items() if "Baseline+" in rows
    }


def shares(record: dict) -> dict[tuple[str, str], tuple[str, str]]:
    """(share of the gap between Baseline and Full that is closed, its 95% interval) by group and method, of all but those two."""
    found = {}
    for group, rows in groups(record).items():
        for method in (m for m in rows if m not in ("Full", "Baseline")):
            share, low, high = gap_closed(rows["Full"], rows["Baseline"], rows[method])
            found[group, method] = (f"{share:.1%}", f"{low:.1%} to {high:.1%}")
    return found


def by_recurrence(points: dict[str, dict], budget: str) -> list[list[str]]:
    """Per corpus and kind of token (see `evaluate.RECURRENCE`): its share of the tokens, nats that the Baseline loses on one, its share
    of all that is lost, and the share of its loss that LESS, trained at `budget`, gives back."""
    rows = []
    for corpus in dict.fromkeys(name.split("/")[0] for name in points):
        methods = ("Full", f"{budget}/Baseline", f"{budget}/LESS ({budget})")
        full, baseline, less = (points[f"{corpus}/{m}"]["by_recurrence"] for m in methods)
        lost, tokens = (
            {k: baseline[k][0] - full[k][0] for k in RECURRENCE},
            {k: full[k][1] for k in RECURRENCE},
        )
        for k in RECURRENCE:
            of_tokens, of_loss = tokens[k] / sum(tokens.values()), lost[k] / sum(lost.values())
            closed = (baseline[k][0] - less[k][0]) / lost[k]
            rows.append(
                [
                    corpus,
                    k,
                    f"{of_tokens:.0%}",
                    f"{lost[k] / tokens[k]:.3f}",
                    f"{of_loss:.0%}",
                    f"{closed:.0%}",
                ]
            )
    return rows


def perplexity_table(full: dict, rows: dict[str, dict], method: str, label: str) -> list[Verdict]:
    """What Tables 2, 3 and 7 claim for one corpus, policy and budget; `rows` are points by method, `method` a row of LESS."""
    found, plus = list[Verdict](), rows["Baseline+"]["token_ppl"]
    for row in (method, "Performer") if "Performer" in rows else (method,):
        (share, low, high), ours = (
            gap_closed(full, rows["Baseline"], rows[row]),
            rows[row]["token_ppl"],
        )
        closed, ppl = f"{share:.1%} [{low:.1%}, {high:.1%}]", f"{ours:.2f} against {plus:.2f}"
        if row == "Performer":
            found.append(
                Verdict(
                    f"{label}: Performer closes less than half of that gap", share < 0.5, closed
                )
            )
            found.append(Verdict(f"{label}: Performer does not beat Baseline+", ours >= plus, ppl))
        else:
            found.append(
                Verdict(
                    f"{label}: {row} closes at least half of the gap between Baseline and Full",
                    share >= 0.5,
                    closed,
                )
            )
            found.append(
                Verdict(f"{label}: {row} has lower perplexity than Baseline+", ours < plus, ppl)
            )
    return found


def language_modeling(
    record: dict, corpora: Iterable[str], fractions: Iterable[float], whose: str = ""
) -> list[Verdict]:
    """Table 2: every budget with the kernels trained at it, and what kernels trained at the largest do at the smallest; `whose` model."""
    found, cells, budgets = list[Verdict](), groups(record), [f"{f:.0%}" for f in sorted(fractions)]
    least, most = budgets[0], budgets[-1]
    for corpus in corpora:
        for f in budgets:
            rows = cells[f"{corpus}/{f}"]
            found += perplexity_table(
                rows["Full"], rows, f"LESS ({f})", f"{whose}{corpus}, H2O at {f}"
            )
        if least != most:
            a, b = (
                cells[f"{corpus}/{least}"][f"LESS ({trained})"]["token_ppl"]
                for trained in (least, most)
            )
            claim = (
                f"{corpus}: at {least}, kernels trained at {most} do worse than those trained at it"
            )
            found.append(Verdict(claim, b > a, f"{b:.2f} against {a:.2f}"))
    return found


def directions(record: dict, share: float) -> dict[str, tuple[int, int]]:
    """Per layer, singular directions that hold `share` of the energy of (attention outputs, their top-k residual)."""
    layers = record["points"]["singular values"]["layers"].items()
    energies = {
        i: [np.cumsum(np.square(x[part])) for part in ("full", "residual")] for i, x in layers
    }
    return {
        i: (1 + int((a < share * a[-1]).sum()), 1 + int((b < share * b[-1]).sum()))
        for i, (a, b) in energies.items()
    }


def low_rank_residuals(record: dict) -> list[Verdict]:
    """Figure 3: both halves."""
    points, counts = record["points"], directions(record, 0.9)
    ppl = {
        (p["parameters"]["fraction"], p["parameters"].get("rank")): p["token_ppl"]
        for p in points.values()
        if "token_ppl" in p
    }
    full, layers = ppl[1.0, None], points["singular values"]["layers"]
    beyond = {
        i: sum(x * x for x in v["residual"][4:]) / sum(x * x for x in v["full"])
        for i, v in layers.items()
    }
    found = [
        Verdict(
            "in every layer the top-12.5% residual needs fewer directions for 90% of its energy than the outputs do",
            all(r < f for f, r in counts.values()),
            ", ".join(f"layer {i}: {r} against {f}" for i, (f, r) in counts.items()),
        ),
        Verdict(
            "in every layer the residual beyond rank 4 holds less than 5% of the outputs' energy",
            max(beyond.values()) < 0.05,
            ", ".join(f"layer {i}: {b:.1%}" for i, b in beyond.items()),
        ),
    ]
    for fraction in sorted({f for f, rank in ppl if rank is not None}):
        closed = (ppl[fraction, 0] - ppl[fraction, 4]) / (ppl[fraction, 0] - full)
        found.append(
            Verdict(
                f"rank 4 takes back at least half of the perplexity that top-{fraction:.1%} caching loses",
                closed >= 0.5,
                f"{ppl[fraction, 0]:.2f} -> {ppl[fraction, 4]:.2f}, full {full:.2f}: {closed:.0%}",
            )
        )
    return found


def training_kernels(record: dict) -> list[Verdict]:
    """Section 3.2: training works in every layer, and beats more tokens."""
    curves = {
        f"{name}, layer {i}": c
        for name, p in record["points"].items()
        for i, c in p["layers"].items()
    }
    beside = [
        curves[name]["best"]
        for name in ("h2o 5%, here, layer 0", "h2o 5%, layer 0")
        if name in curves
    ]
    left, worst = max((c["best"], name) for name, c in curves.items())
    better = sum(c["best"] < c["baseline_plus"] for c in curves.values())
    return [
        Verdict(
            "trained kernels leave less error than eviction alone in every layer",
            left < 1.0,
            f"at most {left:.1%} of it ({worst})",
        ),
        Verdict(
            "and less than Baseline+ does",
            better == len(curves),
            f"in {better} of {len(curves)} cases",
        ),
        *(
            Verdict(
                "a layer trained here leaves as much as the carried one does (within 10%)",
                abs(beside[0] / beside[1] - 1) <= 0.1,
                f"{beside[0]:.3f} against {beside[1]:.3f}",
            )
            for _ in beside[1:]
        ),
    ]


def training_speed(record: dict) -> list[Verdict]:
    """Seconds an epoch against the step-by-step scheme, and the growth of peak memory with the length."""
    case = {
        (p["parameters"]["scheme"], p["parameters"]["length"]): p for p in record["points"].values()
    }
    ratio = {
        n: case["stepwise", n]["seconds_epoch"] / case["ours", n]["seconds_epoch"]
        for scheme, n in case
        if scheme == "stepwise"
    }
    if not {1024, 2048} <= set(ratio):
        return []
    numbers = ", ".join(f"{r:.0f}x at {n}" for n, r in sorted(ratio.items()))
    memory = [case["ours", n]["peak_mib"] for n in (1024, 2048, 4096)]
    growth = " -> ".join(f"{m:.0f}" for m in memory) + " MiB at 1,024, 2,048 and 4,096 tokens"
    return [
        Verdict(
            "an epoch takes at least 25 times fewer seconds at 1,024 tokens",
            ratio[1024] >= 25,
            numbers,
        ),
        Verdict("and the ratio is larger at 2,048", ratio[2048] > ratio[1024], numbers),
        Verdict(
            "peak memory grows linearly: at most 2.2 times per doubling",
            all(longer <= 2.2 * shorter for shorter, longer in pairwise(memory)),
            growth,
        ),
    ]


def generation(record: dict, tokens: int = 512) -> list[Verdict]:
    """What decoding with a bounded cache must show: flat bytes, fewer than the full cache's, and a prefill that LESS gains from."""
    points = record["points"]
    less = next(name.split("/")[1] for name in points if name.startswith("bytes/LESS"))
    held = {m: dict(points[f"bytes/{m}"]["bytes"]) for m in ("Full", "Baseline", "Baseline+", less)}
    found = [
        Verdict(
            "the bytes that LESS holds are the same at every length",
            len(set(held[less].values())) == 1,
            f"{min(held[less].values()):,} to {max(held[less].values()):,} bytes",
        )
    ]
    at = max(t for t in held["Full"] if t <= tokens)
    found.append(
        Verdict(
            "LESS holds less than a quarter of the full cache",
            held[less][at] < held["Full"][at] / 4,
            f"{held[less][at]:,} of {held['Full'][at]:,} bytes after {at} tokens",
        )
    )
    found.append(
        Verdict(
            "its state costs no more than Baseline+'s tokens (within 2%)",
            held[less][at] <= 1.02 * held["Baseline+"][at],
            f"{held[less][at]:,} against {held['Baseline+'][at]:,} bytes",
        )
    )
    nats = {
        name.removeprefix("prefill/"): p["nats"]
        for name, p in points.items()
        if name.startswith("prefill/")
    }
    lost = {how: nats[f"Baseline/{how}"] - nats["Full/dense"] for how in ("dense", "streaming")}
    back = {how: (nats[f"Baseline/{how}"] - nats[f"{less}/{how}"]) / lost[how] for how in lost}
    for how, prompt in (
        ("dense", "a prompt read densely, as the paper's"),
        ("streaming", "a prompt streamed through the bounded cache"),
    ):
        claim = f"after {prompt}, LESS gives back at least half of what eviction costs"
        found.append(
            Verdict(claim, back[how] >= 0.5, f"{back[how]:.1%} of {lost[how]:.3f} nats a token")
        )
    return found
