import pytest

from hyperlora_jax import facts


def test_all_that_differs_is_named_with_both_sides():
    saved = {"recipe": {"learning_rate": 0.01, "num_steps": 50}, "seed": 0, "sizes": (1, 2)}
    now = {"recipe": {"learning_rate": 0.001, "num_steps": 75}, "seed": 0, "sizes": [1, 2]}
    found = facts.differences(saved, now)
    assert found == {"recipe.learning_rate": (0.01, 0.001), "recipe.num_steps": (50, 75)}
    assert facts.refusal("w/targets", found) == (
        "w/targets was made with recipe.learning_rate = 0.01, recipe.num_steps = 50, this run has "
        "recipe.learning_rate = 0.001, recipe.num_steps = 75; use another workdir"
    )
    many = facts.differences({}, dict.fromkeys("abcdef", 1))
    assert "e = " not in facts.refusal("here", many) and "and 2 more" in facts.refusal("here", many)


def test_what_one_side_lacks_differs():
    assert facts.differences({"a": 1}, {"a": 1, "b": 3}) == {"b": (None, 3)}
    assert facts.differences({"a": {"b": 3}}, {}) == {"a": ({"b": 3}, None)}


@pytest.mark.parametrize(("place", "content"), facts.PLACES.items())
def test_a_place_is_compared_only_where_its_content_is_not_known(place, content):
    here, there = {place: "/here", content: "abc"}, {place: "/there", content: "abc"}
    assert not facts.differences({"data": here}, {"data": there})
    other = facts.differences(here, {**there, content: "xyz"})
    assert other == {content: ("abc", "xyz")}
    old = {place: "/here"}  # of a time when no hash was kept
    assert not facts.differences(old, here)
    assert facts.differences(old, there) == {place: ("/here", "/there")}
