import numpy as np
import pytest

from hyperlora_jax.evaluate.protocol import make_evaluation_set
from hyperlora_jax.worlds.avatars import Avatars


class OracleProbe:
    """Knows the captions of exact renders: names the parts of the nearest one it has seen."""

    def __init__(self, *sets):
        self.pictures = np.concatenate([s.exact.reshape(-1, 16, 16, 3) for s in sets])
        labels = [s.caption_labels.reshape(-1, len(s.parts)) for s in sets]
        views = [np.full((s.views[..., 0, 0, 0].size, len(s.parts)), -1) for s in sets]
        self.pictures = np.concatenate(
            [self.pictures, *(s.views.reshape(-1, 16, 16, 3) / 255.0 for s in sets)]
        )
        self.labels = np.concatenate([*labels, *views])

    def classes(self, images):
        flat = np.nan_to_num(np.asarray(images)).reshape(-1, 16, 16, 3)
        nearest = [np.square(self.pictures - x).mean(axis=(1, 2, 3)).argmin() for x in flat]
        return self.labels[nearest].reshape(*np.shape(images)[:-3], -1)


@pytest.fixture(scope="session")
def avatars():
    return Avatars()


@pytest.fixture(scope="session")
def test_set(avatars):
    return make_evaluation_set(
        avatars,
        num_identities=6,
        num_captions=3,
        num_views=2,
        num_candidates=5,
        num_pooled_captions=4,
        progress=False,
    )


@pytest.fixture(scope="session")
def validation_set(avatars):
    return make_evaluation_set(
        avatars,
        split="validation",
        num_identities=3,
        num_captions=2,
        num_views=2,
        num_candidates=5,
        num_pooled_captions=3,
        progress=False,
    )


@pytest.fixture(scope="session")
def probe(test_set, validation_set):
    return OracleProbe(test_set, validation_set)
