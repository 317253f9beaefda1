"""Which of the methods asked for can run, and why the others cannot."""

from collections.abc import Collection, Sequence

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.lora_sources import NEED_LORAS, NEED_PICTURES, check_name
from hyperlora_jax.evaluate.training_loras import TrainingLoras

KEY = "evaluate.methods"
WITHOUT_MODEL = ("exact", "copy_reference")  # every comparison has them


def runnable_methods(
    asked: Sequence[str],
    others: Collection[str],
    loras: TrainingLoras,
    num_identities: int,
    *,
    given: bool,
) -> tuple[list[str], list[str]]:
    """(names to run, a line for every reason to leave others out).

    Args:
        asked: names, of a config; those of `WITHOUT_MODEL` are passed over.
        others: more generators by name.
        loras: the LoRAs that some methods need.
        num_identities: of the test set.
        given: whether somebody asked for these very methods; what cannot run then is an error.

    Raises:
        UserError: an unknown method, or one that was asked for and cannot run.
    """
    names = [name for name in dict.fromkeys([*asked, *others]) if name not in WITHOUT_MODEL]
    left_out: dict[str, list[str]] = {}
    for name in names:
        try:
            check_name(name, others)
        except ValueError as error:
            raise UserError(f"--config.{KEY}: {error}") from error
        why = _why_not(name, loras, num_identities)
        if why and given:
            raise UserError(f"--config.{KEY}: {name} cannot run ({why})")
        if why:
            left_out.setdefault(why, []).append(name)
    lines = [f"left out {', '.join(own)} ({why})" for why, own in left_out.items()]
    without = {name for own in left_out.values() for name in own}
    return [name for name in names if name not in without], lines


def _why_not(name: str, loras: TrainingLoras, num_identities: int) -> str:
    if name in NEED_LORAS and loras.no_loras:
        return loras.no_loras
    if name in NEED_PICTURES and loras.no_pictures:
        return loras.no_pictures
    if name == "noisy_copy" and len(loras) < 2:
        return f"it needs 2 training LoRAs, there is {len(loras)}"
    if name == "shuffled" and num_identities < 2:
        return "it needs 2 subjects to exchange their references, there is 1"
    return ""
