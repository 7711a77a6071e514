"""The paper's claims (assets/claims.json): which recorded results decide each, and whether it holds, fails or was not measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise, product
from typing import Any

import numpy as np

from lesslib.evaluation import gap_closed, paired
from lesslib.experiments import claims
from lesslib.experiments.claims import Verdict, groups
from lesslib.reporting.paper import PAPER, POLICIES
from lesslib.reporting.results import load
from lesslib.util.paths import ASSETS

PLUS, FULL = "Baseline+", "Full"


def difference(a: list[float], b: list[float]) -> str:
    """mean(a) - mean(b) in words, with its paired interval, and whether that holds zero."""
    mean, low, high = paired(a, b)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" + (", within noise" if low <= 0 <= high else "")


def nats_apart(a: dict, b: dict) -> list[float]:
    """Nats a token that result `a` loses beyond `b` on the same windows, and a 95% interval over documents."""
    return [
        len(a["by_document"]) / a["tokens"] * x
        for x in paired(*([nll for nll, _ in r["by_document"]] for r in (a, b)))
    ]


def ordered(*records: dict, performer: bool = False) -> Iterator[Verdict]:
    """Table 2, at every budget: LESS trained at it below Baseline+ below Baseline; or `performer`: random features in place of learned ones
    close none of the gap, by its interval over documents."""
    for group, rows in ((g, r) for record in records for g, r in groups(record).items()):
        label = f"{rows[PLUS]['parameters'].get('name', '')} {group}".strip()
        if performer:
            share, low, high = gap_closed(rows[FULL], rows["Baseline"], rows["Performer"])
            yield Verdict(
                f"{label}: Performer closes none of the gap",
                low <= 0,
                f"{share:.1%} [{low:.1%}, {high:.1%}]",
            )
        else:
            ppl = [
                rows[m]["token_ppl"] for m in (f"LESS ({group.split('/')[1]})", PLUS, "Baseline")
            ]
            yield Verdict(
                f"{label}: LESS < Baseline+ < Baseline",
                ppl[0] < ppl[1] < ppl[2],
                ", ".join(f"{x:.2f}" for x in ppl),
            )


def language(record: dict, word: str, smallest: bool = False) -> list[Verdict]:
    """The verdicts on Table 2 that speak of `word`; of the `smallest` budget alone."""
    budgets = sorted(
        {
            p["parameters"]["fraction"]
            for p in record["points"].values()
            if "fraction" in p["parameters"]
        }
    )
    found = claims.language_modeling(
        record, dict.fromkeys(name.split("/")[0] for name in record["points"]), budgets
    )
    return [
        v
        for v in found
        if word in v.claim and (not smallest or f"H2O at {budgets[0]:.0%}:" in v.claim)
    ]


def policies(record: dict, full: dict) -> list[Verdict]:
    """Table 7, at 5%: each policy with LESS against the same policy with Baseline+; `full` has H2O's rows and the whole cache's."""
    cells = groups({"points": full["points"] | record["points"]})
    at_5 = [group for group in cells if group.split("/")[1] in ("5%", *POLICIES)]
    return [
        claims.perplexity_table(cells[group][FULL], cells[group], "LESS (5%)", group)[1]
        for group in at_5
    ]


def skilled(*full: dict) -> bool:
    """Whether the full cache itself does a task, without which no method can lose anything: the 95% interval of its accuracy lies above
    the commonest answer's share, or that of its ROUGE-1 above the ROUGE-1 of another text's reference."""
    pairs = (
        (x["right"], x["majority"])
        if "right" in x
        else (x["scores"]["rouge1"], x["chance"]["rouge1"])
        for x in full
    )
    return all(paired(scores, [chance] * len(scores))[1] > 0 for scores, chance in pairs)


def ahead(claim: str, a: list[float], b: list[float], full: dict, more: str = "") -> Verdict:
    """`claim` that a is above b on average, decided where the difference is beyond noise and the `full` cache does the task."""
    (_, low, high), able = paired(a, b), skilled(full)
    numbers = difference(a, b) + more + ("" if able else "; the full cache fails at the task")
    return Verdict(claim, low > 0 if able and not low <= 0 <= high else None, numbers)


def classification(record: dict, withheld: bool = True) -> Iterator[Verdict]:
    """Table 3: per task, LESS against Baseline+ by question, and that without the text nothing is left but chance."""
    for task, rows in groups(record).items():
        ours, plus = (np.multiply(100.0, rows[m]["right"]).tolist() for m in ("LESS (5%)", PLUS))
        claim = f"{task}: LESS (5%) is right more often than Baseline+"
        yield ahead(
            claim, ours, plus, rows[FULL], f"; {np.mean(ours):.1f}% against {np.mean(plus):.1f}%"
        )
        if withheld and (asked := rows.get("withheld")):
            n, chance, accuracy = len(asked["right"]), 1 / asked["options"], asked["accuracy"]
            near = abs(accuracy - chance) <= 2 * (chance * (1 - chance) / n) ** 0.5
            yield Verdict(
                f"{task}: without its text accuracy is at chance (within two standard errors)",
                near,
                f"{accuracy:.1%} of {n}",
            )


def recovered(rows: dict[str, dict], method: str, rival: str = PLUS) -> float | None:
    """The share of the ROUGE-1 that `rival` loses to Full which `method` gives back (section 4.2); None where nothing is lost."""
    full, other, ours = (rows[m]["rouge1"] for m in (FULL, rival, method))
    return (ours - other) / (full - other) if full > other else None


def summarization(
    *records: dict,
    rival: str = PLUS,
    least: float = 0.0,
    only: str | Iterable[str] = "",
    method: str = "LESS",
) -> Iterator[Verdict]:
    """Tables 4 and 5: rows of LESS against `rival`, by text; or whether they give back the share `least` of what it loses to Full.
    `only`: groups that end so, or in one of these ways; `method`: rows that begin so."""
    ends = only if isinstance(only, str) else tuple(only)
    for group, rows in (
        (g, r) for record in records for g, r in groups(record).items() if g.endswith(ends)
    ):
        full, other = (np.array(rows[m]["scores"]["rouge1"]) for m in (FULL, rival))
        for m in (m for m in rows if m.startswith(method)):
            back = f"; {recovered(rows, m, rival) or 0:.0%} of the {full.mean() - other.mean():.1f} that {rival} loses"
            does = (
                f"gives back at least {least:.1%} of what {rival} loses"
                if least
                else f"scores above {rival}"
            )
            claim, bar = (
                f"{rows[m]['parameters']['name']}, {group}: {m} {does}",
                (1 - least) * other + least * full,
            )
            yield ahead(claim, rows[m]["scores"]["rouge1"], bar.tolist(), rows[FULL], back)


def attention_maps(record: dict) -> Iterator[Verdict]:
    """Figure 6: the mean Hellinger distance of LESS against that of the sparse policy, layer by layer."""
    for case, point in record["points"].items():
        pairs = {
            i: (np.mean(d["LESS"]), np.mean(d["sparse"])) for i, d in point["distances"].items()
        }
        numbers = ", ".join(f"layer {i}: {a:.3f} against {b:.3f}" for i, (a, b) in pairs.items())
        yield Verdict(
            f"{case}: LESS attends nearer to the original in every layer",
            all(a < b for a, b in pairs.values()),
            numbers,
        )


def kernel_size(record: dict) -> Iterator[Verdict]:
    """Figure 7: by budget, larger R is better, each doubling gains less, and LESS beats tokens of the same bytes."""
    for budget in dict.fromkeys(name.split("/")[0] for name in record["points"]):
        cells = {
            int(g.split("/")[1]): rows
            for g, rows in groups(record).items()
            if g.split("/")[0] == budget
        }
        nats = {
            R: (cells[R][f"LESS ({budget})"]["log_ppl"], cells[R][PLUS]["log_ppl"])
            for R in sorted(cells)
        }
        gains = [a - b for (a, _), (b, _) in pairwise(nats.values())]
        shown = ", ".join(
            f"R={R}: {np.exp(ours):.2f} against {np.exp(plus):.2f}"
            for R, (ours, plus) in nats.items()
        )
        yield Verdict(
            f"{budget}: LESS beats as many bytes of tokens at every R",
            all(ours < plus for ours, plus in nats.values()),
            shown,
        )
        if len(gains) > 1:
            by = " then ".join(f"{g:.3f}" for g in gains) + " nats a token"
            yield Verdict(f"{budget}: every doubling of R lowers perplexity", min(gains) > 0, by)
            yield Verdict(
                f"{budget}: and gains less than the one before",
                all(a > b for a, b in pairwise(gains)),
                by,
            )


def by_length(record: dict, task: str, method: str) -> tuple[np.ndarray, np.ndarray]:
    """(prompt lengths in tokens, ROUGE-1) of all texts of a task under one method, by length."""
    points = [
        p
        for n, p in record["points"].items()
        if n.split("/")[0] == task and n.split("/")[-1] == method
    ]
    lengths, scores = (
        np.concatenate(
            [x[i] for x in ((p["prompt_tokens"], p["scores"]["rouge1"]) for p in points)]
        )
        for i in (0, 1)
    )
    order = np.argsort(lengths, kind="stable")
    return lengths[order], scores[order]


def neighbours(
    lengths: np.ndarray, scores: np.ndarray, at: np.ndarray, share: float = 0.25
) -> np.ndarray:
    """Nearest-neighbour regression, as Figure 8's: at each length, the mean score of the `share` of all texts nearest to it."""
    count = max(1, round(share * len(lengths)))
    return np.array(
        [scores[np.argsort(np.abs(lengths - x), kind="stable")[:count]].mean() for x in at]
    )


def prompt_length(record: dict) -> Iterator[Verdict]:
    """Figure 8: LESS's lead grows with the prompt: a slope, and its interval by a bootstrap over texts, each with all of its lengths."""
    rng = np.random.default_rng(0)
    for task, rival in product(
        dict.fromkeys(name.split("/")[0] for name in record["points"]), (PLUS, "Baseline")
    ):
        cells = [rows for group, rows in groups(record).items() if group.split("/")[0] == task]
        lengths = np.array([rows[FULL]["prompt_tokens"] for rows in cells])
        ours, other = (
            np.array([rows[m]["scores"]["rouge1"] for rows in cells]) for m in ("LESS (5%)", rival)
        )
        texts = [np.arange(len(ours[0])), *rng.integers(0, len(ours[0]), (2000, len(ours[0])))]
        slope, *slopes = (
            100 * np.polyfit(lengths[:, d].ravel(), (ours - other)[:, d].ravel(), 1)[0]
            for d in texts
        )
        low, high = np.quantile(slopes, [0.025, 0.975])
        holds = (
            slope > 0 if skilled(*(rows[FULL] for rows in cells)) and not low <= 0 <= high else None
        )
        yield Verdict(
            f"{task}: LESS's lead over {rival} grows with the prompt",
            holds,
            f"{slope:+.2f} points per 100 tokens [{low:+.2f}, {high:+.2f}]",
        )


def times_faster(
    row: dict[str, Any], method: str, what: str = "seconds"
) -> tuple[float, float, float]:
    """How many times faster `method` is than the quicker full cache of a load: by medians, then its slowest run against that one's
    quickest and the other way round. `what`: "seconds" of one batch, or "tokens_per_s" of all rows."""
    runs = {m: np.add(x["prompt_s"], x["decode_s"]) for m, x in row.items() if "seconds" in x}
    work = {m: row[m]["rows"] if what == "tokens_per_s" else 1 for m in runs}
    full = min((m for m in runs if m.startswith(FULL)), key=lambda m: np.median(runs[m]) / work[m])
    share = work[method] / work[full]
    pairs = [
        (f(runs[full]), g(runs[method]))
        for f, g in ((np.median, np.median), (min, max), (max, min))
    ]
    middle, low, high = (float(share * a / b) for a, b in pairs)
    return middle, low, high


def latency(record: dict, what: str = "seconds") -> Iterator[Verdict]:
    """Table 6: LESS against the quicker of the full caches, decided where the slowest of one's runs still beats the other's quickest. Both
    with as many rows ("seconds"), or each with as many as fit into the same memory ("tokens_per_s")."""
    throughput = what == "tokens_per_s"
    for name, point in record["points"].items():
        rows = {
            m: x for m, x in point["methods"].items() if "seconds" in x
        }  # others ran out of memory
        full = [x["rows"] for m, x in rows.items() if m.startswith(FULL)]
        if throughput == bool(point["parameters"]["cache_mib"]) and full and "LESS" in rows:
            middle, low, high = times_faster(rows, "LESS", what)
            claim = (
                f"{name}: LESS "
                + ("writes more tokens a second than" if throughput else "is done before")
                + " the quicker full cache"
            )
            more = f"; {rows['LESS']['rows']} rows against {max(full)}" * throughput
            yield Verdict(
                claim,
                None if low <= 1 <= high else middle > 1,
                f"{middle:.2f} times [{low:.2f}, {high:.2f}]{more}",
            )


def breakdown(record: dict, most: float = 0.175) -> Iterator[Verdict]:
    """Table 8: what a step of LESS costs beyond one of Baseline+, unobserved."""
    for name, point in record["points"].items():
        over = (
            point["methods"]["LESS"]["unobserved_ms"] / point["methods"][PLUS]["unobserved_ms"] - 1
        )
        yield Verdict(
            f"{name}: a step of LESS takes at most {most:.1%} more time than one of {PLUS}",
            over <= most,
            f"{over:+.1%}",
        )


def sizes(what: str, hidden: int = 512, R: int = 8) -> Iterator[Verdict]:
    """From the weights' shapes, the kernels' "parameters" against the model's (section 3.1), or the "state" of a head in tokens of 2 D
    numbers (section 4), and the kernels' weights, which all sequences of a batch share."""
    for name, m in PAPER["models"].items():
        heads, D = m["heads"] + m["kv_heads"], m["head_dim"]
        layer, state = heads * (D + R) * hidden + m["kv_heads"] * R * (R + 2), R * (D + 1) / (2 * D)
        share, weights = m["layers"] * layer / m["parameters"], layer / m["kv_heads"] / (2 * D)
        if what == "parameters":
            yield Verdict(
                f"{name}: the kernels add less than 2% to its parameters",
                share < 0.02,
                f"{share:.2%}",
            )
        else:
            yield Verdict(
                f"{name}: a head's state takes the memory of 4 tokens (within 2%)",
                abs(state / 4 - 1) <= 0.02,
                f"{state:.2f} tokens; its kernels {weights:.0f}, or {weights / 64:.1f} for each of a batch of 64",
            )


def claim_list() -> list[dict[str, Any]]:
    """Every claim: where the paper makes it, its numbers there (filled in from assets/paper.json), and what decides it here."""
    found: list[dict[str, Any]] = json.loads((ASSETS / "claims.json").read_text())
    return [c | {"paper": c["paper"].format(**PAPER)} for c in found]


def verdicts(claim: dict[str, Any], profile: str) -> list[Verdict]:
    """What the recorded results of `profile` say to a claim; nothing where a record that it needs is missing."""
    records = [load(name, profile) for name in claim["needs"]]
    decide = claim["decide"] and (
        globals().get(claim["decide"]) or getattr(claims, claim["decide"])
    )  # null: nothing decides it yet
    return (
        list(decide(*records, **claim.get("options", {}))) if decide and None not in records else []
    )


def status(found: list[Verdict]) -> str:
    """The verdicts on one claim in a few words."""
    here = [v.here for v in found] or ["not measured"]
    counts = {
        word: here.count(kind)
        for word, kind in (("hold", "holds"), ("fail", "FAILS"), ("open", "undecided"))
    }
    return (
        here[0]
        if len(set(here)) == 1
        else ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    )
