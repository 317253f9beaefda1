"""A folder of drawn avatars where a share of the captions is of other pictures. A base that learns
from it believes captions only in part, as bases of found pictures do: it needs guidance.

    python tools/mislabelled.py FOLDER
    hyperlora pretrain --config configs/finetune_unet.py --workdir runs/unsure \
        --config.data.source=FOLDER --config.data.num_identities=1024 \
        --config.train.num_steps=500 --config.train.optimizer.learning_rate=5e-4
    python tools/drawing.py branches --workdir runs/drawing --identities 48 \
        --base runs/unsure/base --variant "on a base that needs it" \
        --json docs/measurements/drawing_branches_unsure.json
"""

import argparse
import pathlib

import numpy as np


def main(arguments: list[str] | None = None) -> None:
    """Writes FOLDER/IDENTITY/VIEW.png and .txt of training identities."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--share", type=float, default=0.7, help="of captions that are others'")
    parser.add_argument("--identities", type=int, default=1024)
    parser.add_argument("--views", type=int, default=8, help="of each identity")
    given = parser.parse_args(arguments)
    from PIL import Image

    from hyperlora_jax.worlds.avatars import Avatars

    avatars, random = Avatars(), np.random.default_rng(0)
    views = avatars.views("train", given.identities * given.views)
    people = [avatars.identity("train", k // given.views) for k in range(len(views))]
    drawn = avatars.render_many(list(zip(people, views, strict=True)))
    wrong = np.flatnonzero(random.random(len(views)) < given.share)
    said = np.arange(len(views))
    said[wrong] = random.permutation(wrong)
    for k, picture in enumerate(drawn):
        folder = given.folder / f"{k // given.views:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{k % given.views}.png")
        (folder / f"{k % given.views}.txt").write_text(avatars.caption(views[said[k]]))
    print(f"wrote {len(views)} pictures to {given.folder}, {len(wrong)} with another's caption")


if __name__ == "__main__":
    main()
