"""A policy and a state that users write in one file each get rows in a perplexity table."""

import every_second
import pytest
import running_mean

from lesslib.experiments import Method, compare, comparison_table, tour
from lesslib.profiles import get_profile

POLICY = every_second.EverySecond.name
STATE = running_mean.RunningMean.name


def test_a_policy_and_a_state_of_a_users_own_get_a_row():
    methods = [
        Method(POLICY, 0.05),
        Method(POLICY, 0.05, STATE),
        Method("h2o", 0.05, STATE),
    ]
    record = compare("own", methods, "smoke")
    corpus = get_profile("smoke").evaluation[0]
    ppl = {key: entry["token_ppl"] for key, entry in record["points"].items()}
    group = f"{corpus}/{POLICY} 5%"
    assert ppl[f"{corpus}/full 100%/Full"] < ppl[f"{group}/{STATE}"]
    assert ppl[f"{group}/{STATE}"] != ppl[f"{group}/Baseline"]
    assert set(ppl) == {
        f"{corpus}/full 100%/Full",
        f"{group}/Baseline",
        f"{group}/{STATE}",
        f"{corpus}/h2o 5%/{STATE}",
    }
    lines = comparison_table(record).data.splitlines()
    assert f"| {corpus} | {POLICY} 5% | {STATE} |" in "".join(lines)
    assert compare("own", methods, "smoke") == record


def test_a_record_of_another_experiment_is_not_replaced():
    tour.run("smoke")
    with pytest.raises(ValueError, match=r"'tour' is the record of another experiment"):
        compare("tour", [Method("h2o", 0.05)], "smoke")


def test_two_rows_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"two points are called .*12%"):
        compare("twice", [Method("h2o", 0.125), Method("h2o", 0.12)], "smoke")
