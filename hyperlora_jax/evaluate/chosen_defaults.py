"""The strength (and guidance) that an evaluation chose, as the checkpoint's default.

One rule: an evaluation on the pictures that the hypernetwork was trained on replaces the defaults
of the one before; one on other pictures leaves them alone. Either is said.
"""

import dataclasses
from typing import Any

from hyperlora_jax.evaluate.compare import MethodResult
from hyperlora_jax.evaluate.own_source import source_name
from hyperlora_jax.evaluate.questions import Questions
from hyperlora_jax.hypernet.model import Hypernetwork


@dataclasses.dataclass(frozen=True)
class ChosenDefaults:
    """What was chosen.

    Attributes:
        strength: the default before, and the best one on validation subjects.
        guidance: likewise; None where there was nothing to choose.
        chosen_on: the validation subjects, in words.
        kept: whether the checkpoint keeps it.
    """

    strength: tuple[float, float]
    guidance: tuple[float, float] | None
    chosen_on: str
    kept: bool

    @classmethod
    def of(
        cls, hyper: Hypernetwork, chosen: MethodResult, validation: Questions, *, kept: bool
    ) -> "ChosenDefaults":
        """From the result of the hypernetwork's own LoRAs."""
        guidance = None
        if chosen.guidance_curve:
            guidance = (hyper.default_draw.guidance, chosen.guidance)
        count = validation.num_identities
        return cls(
            (hyper.default_strength, chosen.strength),
            guidance,
            f"{count} validation {'subject' if count == 1 else 'subjects'} of "
            f"{source_name(validation.facts)}",
            kept,
        )

    def applied(self, hyper: Hypernetwork) -> Hypernetwork:
        """The hypernetwork with them as its defaults."""
        generate = dict(hyper.facts.get("generate", {}))
        if self.guidance is not None:
            generate["guidance"] = self.guidance[1]
        return hyper.with_facts(
            default_strength=self.strength[1],
            default_strength_chosen_on=self.chosen_on,
            generate=generate,
        )

    def line(self, where: str) -> str:
        """What happened to the defaults of the checkpoint `where`."""
        pairs = {"strength": self.strength, "guidance": self.guidance}
        said = {name: pair for name, pair in pairs.items() if pair is not None}
        if self.kept:
            changes = [f"default {name} {_change(*pair)}" for name, pair in said.items()]
            return f"{where}: {', '.join(changes)}, chosen on {self.chosen_on}"
        changes = [f"default {name} stays {pair[0]:g}" for name, pair in said.items()]
        best = ", ".join(f"{name} {pair[1]:g}" for name, pair in said.items())
        return (
            f"{where}: {', '.join(changes)}, as these are not the pictures that it was trained on "
            f"(best on {self.chosen_on}: {best})"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return dataclasses.asdict(self)


def _change(before: float, now: float) -> str:
    return f"stays {now:g}" if before == now else f"{before:g} → {now:g}"
