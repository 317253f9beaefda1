import numpy as np

from hyperlora_jax.hypernet import familiarity


def people(random, count, views=3):
    """Subjects on a 3-dimensional part of a 16-dimensional space; views differ a little."""
    identity = random.normal(size=(count, 1, 3))
    wobble = 0.05 * random.normal(size=(count, views, 3))
    return (identity + wobble) @ np.eye(3, 16) + 0.01 * random.normal(size=(count, views, 16))


def test_strangers_score_low_and_people_alike():
    random = np.random.default_rng(0)
    known = people(random, 300)
    kept = familiarity.fit(known.mean(axis=1), known[:, 0])
    own = familiarity.score(kept, people(random, 200, views=1))
    assert 0.35 < own.mean() < 0.65, "new people score like training people, uniformly"
    strangers = familiarity.score(kept, random.normal(size=(50, 1, 16)))
    assert np.median(strangers) < 0.02 and strangers.max() <= 1.0
