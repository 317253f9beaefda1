"""Pictures of identities as plain arrays, and endless batches of them.

Rendered once from training identities, then fed to the tasks of `encoder_task` and `probe_task`.
"""

import dataclasses
import json
from collections.abc import Mapping

import grain
import numpy as np
from etils import epath

from hyperlora_jax.array_types import Int, Json, JsonDict, UInt8
from hyperlora_jax.batches.pipelines import step_batches
from hyperlora_jax.errors import UserError
from hyperlora_jax.worlds.by_style import World
from hyperlora_jax.worlds.named_views import NamedView


@dataclasses.dataclass(frozen=True, eq=False)
class RenderBundle:
    """Pictures of identities with their labels, as plain arrays.

    Attributes:
      images: [i, v, h, w, 3] uint8, v views of each of i identities.
      neutral: [i, h, w, 3] uint8, every identity in the same neutral view.
      identity_labels: [i, p] class of every identity part.
      view_labels: [i, v, q] class of every view (caption) part.
      identity_parts: {part: class names} in the order of the labels' last axis.
      view_parts: the same for view parts.
      facts: where the pictures come from (style, seeds, identity ids, licence), JSON-able.
    """

    images: UInt8[np.ndarray, "i v h w 3"]
    neutral: UInt8[np.ndarray, "i h w 3"]
    identity_labels: Int[np.ndarray, "i p"]
    view_labels: Int[np.ndarray, "i v q"]
    identity_parts: Mapping[str, tuple[str, ...]]
    view_parts: Mapping[str, tuple[str, ...]]
    facts: Json = dataclasses.field(default_factory=dict)

    @property
    def num_identities(self) -> int:
        """Number of identities."""
        return len(self.images)

    @property
    def image_size(self) -> int:
        """Height of the pictures in pixels."""
        return self.images.shape[2]

    def facts_of(self, training: Json | None) -> JsonDict:
        """What an exported network says of its training: on these pictures, and `training`."""
        numbers = {"num_identities": self.num_identities, "num_views": int(self.images.shape[1])}
        return {"data": dict(self.facts), **numbers, **(training or {})}

    def save(self, path: epath.PathLike) -> None:
        """Writes one .npz file."""
        text = {
            "identity_parts": {k: list(v) for k, v in self.identity_parts.items()},
            "view_parts": {k: list(v) for k, v in self.view_parts.items()},
            "facts": dict(self.facts),
        }
        with epath.Path(path).open("wb") as stream:
            np.savez(
                stream,
                images=self.images,
                neutral=self.neutral,
                identity_labels=self.identity_labels,
                view_labels=self.view_labels,
                json=np.frombuffer(json.dumps(text).encode(), np.uint8),
            )

    @classmethod
    def load(cls, path: epath.PathLike) -> "RenderBundle":
        """Reads what `save` wrote; UserError when the file is something else."""
        try:
            with epath.Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            text = json.loads(arrays.pop("json").tobytes())
            parts = {
                name: {part: tuple(classes) for part, classes in text[name].items()}
                for name in ("identity_parts", "view_parts")
            }
            return cls(**arrays, **parts, facts=text["facts"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"render bundle {path}: cannot be read ({type(error).__name__}: {error}), "
                "expected an .npz file that RenderBundle.save wrote"
            ) from error


def neutral_view(avatars: World) -> NamedView:
    """The view that hides least: optional parts left out, else the first class; white behind."""
    wanted = {"no": 0, "white": 1}
    classes = [
        min(names, key=lambda name: wanted.get(name, len(wanted)))
        for names in avatars.part_names.values()
    ]
    return avatars.view_of(classes)


def render_bundle(
    avatars: World,
    num_identities: int,
    num_views: int,
    *,
    cache_dir: epath.PathLike | None = None,
    progress: bool = True,
) -> RenderBundle:
    """Draws the first training identities, each in `num_views` views of its own and in one neutral
    picture. Raises UserError when there are fewer identities."""
    people = avatars.training_people(num_identities, num_views)
    neutral = neutral_view(avatars)
    pairs = [(person, view) for person, own in people for view in (*own, neutral)]
    drawn = np.asarray(avatars.render_many(pairs, cache_dir, progress=progress))
    drawn = drawn.reshape(num_identities, num_views + 1, *drawn.shape[1:])
    return RenderBundle(
        images=drawn[:, :-1],
        neutral=drawn[:, -1],
        identity_labels=np.array([list(avatars.identity_parts(p).values()) for p, _ in people]),
        view_labels=np.array(
            [[list(avatars.caption_parts(v).values()) for v in own] for _, own in people]
        ),
        identity_parts={k: tuple(v) for k, v in avatars.identity_part_names.items()},
        view_parts={k: tuple(v) for k, v in avatars.part_names.items()},
        facts={
            "style": avatars.style,
            "size": avatars.size,
            "split_seed": avatars.split_seed,
            "split": "train",
            "start": 0,
            "licence": avatars.licence,
        },
    )


def pair_batches(
    bundle: RenderBundle,
    batch_size: int,
    seed: int,
    rows: Int[np.ndarray, " b"] | None = None,
) -> grain.DatasetIterator:
    """Endless batches of view pairs: identities without repetition in a batch, two random views.

    Batch k depends on (seed, k) alone, so that a restored run sees what it would have seen; a host
    gets its `rows` of it (None = all).

    Raises:
      UserError: the bundle has fewer identities than a batch, or one view.
    """
    if bundle.num_identities < batch_size or bundle.images.shape[1] < 2:
        raise UserError(
            f"encoder pre-training: found {bundle.num_identities} identities with "
            f"{bundle.images.shape[1]} views, expected at least {batch_size} (the batch size) "
            "with 2"
        )
    own = np.arange(batch_size) if rows is None else rows

    def make_batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((seed, step))
        who = random.choice(bundle.num_identities, batch_size, replace=False)
        views = np.argsort(random.random((batch_size, bundle.images.shape[1])), axis=1)
        who, views = who[own], views[own]
        return {
            "first": bundle.images[who, views[:, 0]],
            "second": bundle.images[who, views[:, 1]],
            "neutral": bundle.neutral[who],
            "labels": bundle.identity_labels[who].astype(np.int32),
        }

    return step_batches(make_batch)


def view_batches(
    bundle: RenderBundle,
    batch_size: int,
    seed: int,
    rows: Int[np.ndarray, " b"] | None = None,
) -> grain.DatasetIterator:
    """Endless batches of single views with their view labels, for the attribute probe; batch k
    depends on (seed, k) alone, and a host gets its `rows` of it (None = all)."""
    identities, num_views = bundle.images.shape[:2]
    own = np.arange(batch_size) if rows is None else rows

    def make_batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((seed, step))
        who = random.integers(identities, size=batch_size)[own]
        view = random.integers(num_views, size=batch_size)[own]
        return {
            "images": bundle.images[who, view],
            "labels": bundle.view_labels[who, view].astype(np.int32),
        }

    return step_batches(make_batch)
