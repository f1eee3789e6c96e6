"""The built-in reward recipes: what each gives, and what it refuses."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinker_core.plugins import Plugins
from tinker_core.rewards import Judged, Reward, RewardError
from tinker_jobs.recipes import BUILT_IN, last_number

RECIPES = Plugins.load("jobs").reward_recipes()
FLAG = "sha256:" + hashlib.sha256(b"FLAG{1}").hexdigest()


def judge(recipe: str, completion: str, **fields: Any) -> Reward:
    return RECIPES[recipe].score(Judged(completion=completion, row={}, **fields))


def test_the_recipes_of_the_reference_are_registered() -> None:
    assert set(RECIPES) == {recipe.name for recipe in BUILT_IN}
    assert [name for name, recipe in RECIPES.items() if recipe.needs_task] == ["task_verifier_v1"]


@pytest.mark.parametrize(
    ("completion", "fields", "value"),
    [
        ("4", {"expected_output": " 4\n"}, 1.0),
        ("four", {"expected_output": "4"}, 0.0),
        ("four", {"expected_output": "4", "params": {"expected": "four"}}, 1.0),
        ("4", {"expected_output": "4", "params": {"expected": ""}}, 1.0),
        ("4", {"params": {"expected": 4}}, 1.0),
        ("Four", {"expected_output": "four"}, 0.0),
    ],
)
def test_exact_match_compares_without_white_space(completion: str, fields: dict[str, Any], value: float) -> None:
    reward = judge("exact_match_v1", completion, **fields)
    assert (reward.value, reward.metrics) == (value, {"reward/passed": value})


@pytest.mark.parametrize("recipe", ["exact_match_v1", "trajectory_imitation_v1", "gsm8k_v1"])
def test_what_needs_an_expected_output_says_so(recipe: str) -> None:
    with pytest.raises(RewardError, match=f"^{recipe} requires an expected output$"):
        judge(recipe, "4")


@pytest.mark.parametrize(
    ("completion", "params", "value"),
    [
        ("a = b", {"needle": "="}, 1.0),
        ("a = b", {"needle": "B"}, 0.0),
        ("a = b", {"needle": "=", "reward_if_true": 2, "reward_if_false": -1}, 2.0),
        ("a", {"needle": "=", "reward_if_true": 2, "reward_if_false": -1}, -1.0),
        ("a", {"needle": "=", "reward_if_true": 2}, 0.0),
    ],
)
def test_contains_looks_for_its_needle(completion: str, params: dict[str, Any], value: float) -> None:
    assert judge("contains_v1", completion, params=params).value == value


@pytest.mark.parametrize("params", [{}, {"needle": ""}, {"needle": None}, {"needle": 5}])
def test_contains_requires_its_needle_when_the_job_is_submitted(params: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match=r"^contains_v1 requires params\.needle$"):
        RECIPES["contains_v1"].check_params(params)
    with pytest.raises(RewardError, match=r"^contains_v1 requires params\.needle$"):
        judge("contains_v1", "5", params=params)


@pytest.mark.parametrize(
    ("reward", "params", "value"), [(0.25, {"default": 3}, 0.25), (0.0, {"default": 3}, 0.0), (None, {"default": 3}, 3)]
)
def test_row_reward_is_the_rows_or_the_default(reward: float | None, params: dict[str, Any], value: float) -> None:
    assert judge("row_reward_v1", "", reward=reward, params=params).value == value
    assert judge("row_reward_v1", "", params={}).value == 0.0


@pytest.mark.parametrize(
    ("completion", "reward", "params", "value"),
    [
        ("ls", None, {}, 1.0),
        ("ls", 0.5, {}, 0.5),
        ("ls", 0.0, {"reward_if_true": 2}, 0.0),
        ("ls", None, {"reward_if_true": 2}, 2.0),
        ("cd", 0.5, {}, 0.0),
        ("cd", 0.5, {"reward_if_false": -0.5}, -0.5),
    ],
)
def test_imitation_is_worth_what_the_trajectory_was(
    completion: str, reward: float | None, params: dict[str, Any], value: float
) -> None:
    fields: dict[str, Any] = {"expected_output": "ls", "reward": reward, "params": params}
    assert judge("trajectory_imitation_v1", completion, **fields).value == value


@pytest.mark.parametrize(
    "verification",
    [
        {"method": "flag", "hash": FLAG},
        {"hash": FLAG},
        {"method": "flag", "flag_hash": FLAG},
        {"method": "flag", "hash": "sha256:" + FLAG.removeprefix("sha256:").upper()},
    ],
)
def test_the_task_verifier_knows_a_flag_by_its_hash(verification: dict[str, Any]) -> None:
    params = {"reward_if_true": 5, "reward_if_false": -5}
    assert judge("task_verifier_v1", "FLAG{1}", verification=verification).value == 1.0
    assert judge("task_verifier_v1", "FLAG{2}", verification=verification).value == 0.0
    assert judge("task_verifier_v1", "FLAG{1}", verification=verification, params=params).value == 5.0
    assert judge("task_verifier_v1", "", verification=verification, params=params).value == -5.0


@pytest.mark.parametrize(
    ("verification", "message"),
    [
        ({"method": "script"}, "task_verifier_v1 currently supports only flag-based task verification"),
        ({"method": "env_flag", "hash": FLAG}, "task_verifier_v1 currently supports only flag-based task verification"),
        ({"method": "flag"}, "task_verifier_v1 requires verification.hash as sha256:<64 hexadecimal digits>"),
        ({"hash": "sha256:abc"}, "task_verifier_v1 requires verification.hash as sha256:<64 hexadecimal digits>"),
        ({"hash": FLAG[7:]}, "task_verifier_v1 requires verification.hash as sha256:<64 hexadecimal digits>"),
        (None, "task_verifier_v1 requires a task with verification"),
    ],
)
def test_the_task_verifier_refuses_other_verifications(verification: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(RewardError) as error:
        judge("task_verifier_v1", "FLAG{1}", verification=verification)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", 72.0),
        ("5 apples\n#### 1,234.5", 1234.5),
        ("#### 3 and then #### 4", 4.0),
        ("#### 3, not 9", 3.0),
        ("#### $18", 18.0),
        ("#### -7", -7.0),
        ("the answer is 1,000.", 1000.0),
        ("7 + 5 = 12", 12.0),
        ("it is -3", -3.0),
        ("it is +3", 3.0),
        ("10-7", 7.0),
        ("from 3 to .5", 0.5),
        ("#### none, so 6", 6.0),
        ("no number", None),
        ("", None),
        ("####", None),
        (", , -", None),
    ],
)
def test_the_last_number_counts_and_the_marked_one_before_it(text: str, number: float | None) -> None:
    assert last_number(text) == number


@given(st.text())
def test_any_text_has_a_last_number_or_none(text: str) -> None:
    found = last_number(text)
    assert found is None or not math.isnan(found)


@given(st.integers(-(10**12), 10**12), st.text("abc .,\n", max_size=20))
def test_a_number_is_found_however_it_is_written(number: int, before: str) -> None:
    expected = f"some steps\n#### {number}"
    for written in (f"{number}", f"{number:,}", f"{number}.0", f"#### {number:,}"):
        assert judge("gsm8k_v1", f"{before} {written}", expected_output=expected).value == 1.0
    assert judge("gsm8k_v1", f"{before} {number + max(1, abs(number) // 1000)}", expected_output=expected).value == 0.0


def test_gsm8k_tells_a_wrong_number_from_none() -> None:
    wrong = judge("gsm8k_v1", "so 5", expected_output="#### 6", params={"reward_if_false": -1})
    none = judge("gsm8k_v1", "no idea", expected_output="#### 6", params={"reward_if_false": -1})
    assert wrong.value == none.value == -1.0
    assert wrong.metrics == {"reward/passed": 0.0, "reward/extraction_failed": 0.0}
    assert none.metrics == {"reward/passed": 0.0, "reward/extraction_failed": 1.0}
    with pytest.raises(RewardError, match=r"^gsm8k_v1 requires an expected output with a number$"):
        judge("gsm8k_v1", "6", expected_output="six")


@pytest.mark.parametrize("value", ["1", True, None, math.nan, math.inf])
@pytest.mark.parametrize(
    ("recipe", "name"),
    [("contains_v1", "reward_if_true"), ("gsm8k_v1", "reward_if_false"), ("row_reward_v1", "default")],
)
def test_what_a_reward_is_worth_must_be_a_number(recipe: str, name: str, value: object) -> None:
    params = {name: value, **({"needle": "a"} if recipe == "contains_v1" else {})}
    with pytest.raises(RewardError, match=rf"^params\.{name} must be a number, got "):
        RECIPES[recipe].check_params(params)


def test_a_parameter_that_a_recipe_does_not_have_is_refused() -> None:
    with pytest.raises(RewardError) as error:
        RECIPES["contains_v1"].check_params({"needle": "a", "reward_if_ture": 1})
    assert str(error.value) == (
        "contains_v1 does not know params.reward_if_ture; "
        "it takes params.needle, params.reward_if_true, params.reward_if_false"
    )
    with pytest.raises(RewardError, match=r"params\.expected must be text or a number"):
        RECIPES["gsm8k_v1"].check_params({"expected": ["6"]})
