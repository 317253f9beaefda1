"""Worlds with exact pictures, by style: drawn avatars, rendered heads, and letters in fonts."""

from hyperlora_jax.worlds import fonts, heads
from hyperlora_jax.worlds.avatars import Avatars
from hyperlora_jax.worlds.fonts import Fonts
from hyperlora_jax.worlds.heads import Heads

World = Avatars | Heads | Fonts


def open_world(style: str, size: int | None = None, split_seed: int = 0) -> World:
    """The world of a config's `data.style`: "heads", "fonts", or one of `avatar_styles.STYLES`.

    Raises:
        UserError: an unknown style, a size it is not drawn at, or a package that is missing.
    """
    if style == heads.STYLE:
        return Heads(size, split_seed)
    if style == fonts.STYLE:
        return Fonts(size, split_seed)
    return Avatars(style, size, split_seed)
