"""Turns the numbers of metrics.json into tables and sentences. Pure functions of the summary."""

from collections.abc import Mapping, Sequence

from hyperlora_jax.array_types import Json
from hyperlora_jax.evaluate.methods import meaning, method_order, title

Summary = Json

COLUMNS = {  # name in metrics.json: (title, digits, whether more is better)
    "identity_top1": ("identity top-1", 3, True),
    "image_error": ("error (MSE)", 4, False),
    "lpips": ("LPIPS", 3, False),
    "similarity": ("similarity", 3, True),
    "caption_accuracy": ("caption parts", 3, True),
    "clip_text": ("prompt (CLIP-T)", 3, True),
}
STANDARD_ERRORS = 3.0  # what counts as a difference
TIMING_NAMES = {  # in the order of the page
    "distill": "conventional LoRAs of training identities",
    "train": "training of the hypernetwork",
    "evaluate": "evaluation",
    "sampling": "drawing all pictures, and fitting LoRAs to compare with",
    "export": "LoRA files",
    "torch": "PyTorch’s pictures of them",
    "speed": "measuring speed",
    "total": "all of it",
    "generate_one_lora": "one generated LoRA (amortised, without compilation)",
    "fit_one_lora": "one conventional LoRA, fitted alone (without compilation)",
}


def tiles(summary: Summary) -> list[dict[str, str]]:
    """The few large numbers on top."""
    cards = []
    top1 = summary["identity_top1"].get("generated")
    chosen_from = summary["evaluation"]["test"].get("num_candidates")
    if top1:
        among = f" of {chosen_from}" if chosen_from else ""
        label = f"identity recognised, top-1{among}"
        cards.append({"value": percent(top1["mean"]), "label": label})
    pair = summary["paired"]
    if pair.get("ratio") is not None:
        error = "" if pair["ratio_stderr"] is None else f" (± {pair['ratio_stderr']:.2f})"
        label = f"of a conventional LoRA’s identity score{error}"
        cards.append({"value": f"{pair['ratio']:.2f}×", "label": label})
    caption = summary.get("caption_accuracy", {}).get("generated")
    if caption:
        cards.append({"value": percent(caption["mean"]), "label": "caption parts right"})
    speed = speed_up(summary)
    if speed:
        cards.append({"value": f"{speed:,.0f}×", "label": "less time per LoRA than fitting one"})
    return cards


def score_table(summary: Summary) -> Json:
    """Methods × scores with standard errors."""
    measured = {name: spec for name, spec in COLUMNS.items() if name in summary}
    columns = [title for title, _, _ in measured.values()] + ["diversity", "strength", "n"]
    rows = []
    for name in method_order(summary["identity_top1"]):
        strength = summary["strength"].get(name, {})
        chosen = f"{strength['best']:g}" if strength.get("validation") else "–"
        cells = [
            estimate(summary[score][name], digits) for score, (_, digits, _) in measured.items()
        ]
        cells += [
            estimate(summary["diversity"][name], 2),
            {"value": chosen, "pm": ""},
            {"value": str(summary["identity_top1"][name]["n"]), "pm": ""},
        ]
        rows.append({"name": title(name), "mark": name == "generated", "cells": cells})
    return {"columns": columns, "rows": rows, "note": _score_note(summary)}


def _score_note(summary: Summary) -> str:
    test = summary["evaluation"]["test"]
    among = test.get("num_candidates", "?")
    if "image_error" in summary:
        told = (
            f"Identity top-1: nearest exact render among {among} identities under the same "
            "caption. Error: mean squared difference to the exact picture, pixels in [0, 1]. "
            "Caption parts: share that an attribute probe, trained on renders, sees as asked. "
            "Diversity: variance over captions, 1 = that of the exact pictures."
        )
    else:
        told = (
            f"Similarity: mean cosine, by {_judge(test)}, to the pictures of the subject that no "
            f"method was shown ({span(test['pictures_judged_by'])}). "
            f"Identity top-1: the most similar of {among} subjects. A copied reference tells how "
            "alike two real pictures are. Diversity: variance over captions, 1 = that of the "
            "subject’s pictures; – where a subject has too few."
        )
    if "lpips" in summary:
        told += " LPIPS: perceptual distance to the exact picture."
    if "clip_text" in summary:
        told += " CLIP-T: cosine of CLIP’s picture and prompt embeddings."
    return (
        f"Mean ± standard error over identities. {told} A picture that could not be made counts "
        "as wrong. Strength multiplies a LoRA when it is used; it was chosen on other, validation "
        "identities, – means that there was nothing to choose. n: identities."
    )


def _judge(test: Mapping[str, object]) -> str:
    if test.get("judge_is_condition_encoder"):
        return "the encoder that conditions the hypernetwork (not independent)"
    return f"the judge {test['judge']}"


def difference_table(summary: Summary) -> Json:
    """Paired differences of generated to all others."""
    measured = {name: spec for name, spec in COLUMNS.items() if name in summary}
    rows = []
    for name in method_order(summary["differences"]):
        difference = summary["differences"][name]
        cells = [
            _signed(difference[score], digits, more_is_better=more)
            for score, (_, digits, more) in measured.items()
        ]
        rows.append({"name": title(name), "cells": cells})
    note = (
        "Same identities, captions and start noise; mean ± standard error of the paired difference"
    )
    colour = f"in colour where it exceeds {STANDARD_ERRORS:g} standard errors"
    columns = [title for title, _, _ in measured.values()]
    return {"columns": columns, "rows": rows, "note": note, "colour": colour}


def judge_table(summary: Summary) -> Json:
    """Methods × judges: similarity to the reference; no rows when there are no judges."""
    judges = summary.get("judges", {})
    names = method_order(sorted({n for judge in judges.values() for n in judge["similarity"]}))
    rows = [
        {
            "name": title(name),
            "mark": name == "generated",
            "cells": [estimate(judge["similarity"][name], 3) for judge in judges.values()],
        }
        for name in names
    ]
    columns = [
        name + (" (condition encoder)" if judge["is_condition_encoder"] else "")
        for name, judge in judges.items()
    ]
    note = (
        "Cosine of the embeddings of generated picture and "
        + ("reference" if "image_error" in summary else "the subject’s other pictures")
        + "; an undetected subject counts 0. The condition encoder is a leaky judge: the "
        "hypernetwork was trained to listen to it."
    )
    return {"columns": columns, "rows": rows, "note": note}


def timings(summary: Summary) -> list[dict[str, str]]:
    """Stage -> time, in the order of the stages; the speed-up last."""
    seconds = summary["seconds"]
    ordered = [name for name in TIMING_NAMES if name in seconds]
    rows = []
    for name in [*ordered, *(name for name in seconds if name not in TIMING_NAMES)]:
        # Drawing is most of the evaluation: a part of the row above it, where that is there.
        part = "of which " if name == "sampling" and "evaluate" in seconds else ""
        told = part + TIMING_NAMES.get(name, name)
        rows.append({"name": told, "value": duration(seconds[name])})
    speed = speed_up(summary)
    if speed:
        rows.append({"name": "fitted alone ÷ generated", "value": f"{speed:,.0f}×"})
    return rows


def reading(summary: Summary) -> list[dict[str, str]]:
    """What the columns of the picture on top of the page are, for those who know none of the words:
    [{"name", "text"}] in their order."""
    right = ("exact answer", "what would be right: the more a picture looks like it, the better")
    if "image_error" not in summary:
        right = ("another picture", "a real one of the same subject, which the program did not see")
    drawn = {
        "generated": "drawn with the file that the program wrote from the reference alone",
        "conventional": "drawn with a file trained on several pictures of the subject",
        "base": "drawn by the generator as it is",
        "shuffled": "drawn with a file that was written from somebody else’s picture",
    }
    there = [(title(name), how) for name, how in drawn.items() if name in summary["identity_top1"]]
    seen = ("reference", "the only picture of the subject that the program was shown")
    return [{"name": name, "text": text} for name, text in (seen, right, *there)]


def glossary(summary: Summary) -> list[dict[str, str]]:
    """What the methods of the table are."""
    meanings = {name: meaning(name) for name in method_order(summary["identity_top1"])}
    return [{"name": title(name), "text": text} for name, text in meanings.items() if text]


def provenance(summary: Summary) -> list[dict[str, str]]:
    """Seeds, sets, versions and whatever facts were recorded."""
    rows = []
    for name, facts in summary["evaluation"].items():
        text = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "licence")
        rows.append({"name": f"{name} set", "value": text})
    licence = summary["evaluation"]["test"].get("licence")
    if licence:
        rows.append({"name": "pictures", "value": licence})
    hidden = ("notes", "command")  # stand elsewhere on the page
    facts = {key: value for key, value in summary["facts"].items() if key not in hidden}
    rows += [{"name": key.replace("_", " "), "value": str(value)} for key, value in facts.items()]
    text = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return [*rows, {"name": "versions", "value": text}]


def speed_up(summary: Summary) -> float | None:
    """Seconds to fit one LoRA alone ÷ amortised seconds to generate one; None if unknown."""
    seconds = summary["seconds"]
    if not seconds.get("generate_one_lora") or not seconds.get("fit_one_lora"):
        return None
    return seconds["fit_one_lora"] / seconds["generate_one_lora"]


def percent(value: float) -> str:
    """0.634 -> "63 %"."""
    return f"{100 * value:.0f} %"


def counted(number: int, one: str, many: str = "") -> str:
    """ "1 subject", "2 subjects"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def span(numbers: Sequence[int]) -> str:
    """ "3", or "1 to 3" where they differ."""
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def joined(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min"


def estimate(score: Mapping[str, object], digits: int) -> dict[str, str]:
    """{"value", "pm"} of an Estimate's JSON; pm is empty when there is no standard error."""
    stderr = score["stderr"]
    if score["mean"] is None:
        return {"value": "–", "pm": ""}
    pm = "" if stderr is None else f"{stderr:.{digits}f}"
    return {"value": f"{score['mean']:.{digits}f}", "pm": pm}


def beats(difference: Json, more_is_better: bool) -> bool:
    """Whether a paired difference is a gain of more than `STANDARD_ERRORS`."""
    if difference["stderr"] is None:
        return False
    gain = difference["mean"] if more_is_better else -difference["mean"]
    return gain > 0 and gain > STANDARD_ERRORS * difference["stderr"]


def _signed(difference: Mapping[str, object], digits: int, more_is_better: bool) -> dict[str, str]:
    cell = estimate(difference, digits)
    tone = "good" if beats(difference, more_is_better) else ""
    tone = "bad" if beats(difference, not more_is_better) else tone
    return {**cell, "value": f"{difference['mean']:+.{digits}f}", "tone": tone}
