"""Turns the numbers of metrics.json into tables and sentences. Pure functions of the summary."""

from collections.abc import Mapping
from typing import Any

from hyperlora_jax.evaluate.method_names import CONTROLS, ORDER, TITLES

Summary = Mapping[str, Any]

STANDARD_ERRORS = 3.0  # what counts as a difference
MAX_PARITY = 1e-3
TIMING_NAMES = {
    "generate_one_lora": "one generated LoRA (amortised, without compilation)",
    "fit_one_lora": "one conventional LoRA, fitted alone (without compilation)",
}


def method_order(names: Any) -> list[str]:
    """Known methods in the order of tables, then all others."""
    known = [name for name in ORDER if name in names]
    return known + [name for name in names if name not in known]


def tiles(summary: Summary) -> list[dict[str, str]]:
    """The few large numbers on top."""
    found = []
    top1 = summary["identity_top1"].get("generated")
    chosen_from = summary["evaluation"]["test"].get("num_candidates")
    if top1:
        among = f" of {chosen_from}" if chosen_from else ""
        label = f"identity recognised, top-1{among}"
        found.append({"value": percent(top1["mean"]), "label": label})
    pair = summary["paired"]
    if pair.get("ratio") is not None:
        label = f"of a conventional LoRA’s identity score (± {pair['ratio_stderr']:.2f})"
        found.append({"value": f"{pair['ratio']:.2f}×", "label": label})
    caption = summary["caption_accuracy"].get("generated")
    if caption:
        found.append({"value": percent(caption["mean"]), "label": "caption parts right"})
    speed = speed_up(summary)
    if speed:
        found.append({"value": f"{speed:,.0f}×", "label": "less time per LoRA than fitting one"})
    return found


def score_table(summary: Summary) -> dict[str, Any]:
    """Methods × scores with standard errors."""
    columns = ["identity top-1", "error (MSE)", "caption parts", "diversity", "strength", "n"]
    rows = []
    for name in method_order(summary["identity_top1"]):
        strength = summary["strength"].get(name, {})
        chosen = f"{strength['best']:g}" if strength.get("validation") else "–"
        cells = [
            estimate(summary["identity_top1"][name], 3),
            estimate(summary["image_error"][name], 4),
            estimate(summary["caption_accuracy"][name], 3),
            estimate(summary["diversity"][name], 2),
            {"value": chosen, "pm": ""},
            {"value": str(summary["identity_top1"][name]["n"]), "pm": ""},
        ]
        rows.append({"name": title(name), "mark": name == "generated", "cells": cells})
    test = summary["evaluation"]["test"]
    note = (
        f"Mean ± standard error over identities. Identity top-1: nearest exact render among "
        f"{test.get('num_candidates', '?')} identities under the same caption. Error: mean squared "
        "difference to the exact picture, pixels in [0, 1]. Caption parts: share that an attribute "
        "probe, trained on renders, sees as asked. Diversity: variance over captions, 1 = that of "
        "the exact pictures. A picture that could not be made counts as wrong. Strength was chosen "
        "on other, validation identities; – means that there was nothing to choose."
    )
    return {"columns": columns, "rows": rows, "note": note}


def difference_table(summary: Summary) -> dict[str, Any]:
    """Paired differences of generated to all others."""
    rows = []
    for name in method_order(summary["differences"]):
        found = summary["differences"][name]
        cells = [
            _signed(found["identity_top1"], 3, more_is_better=True),
            _signed(found["image_error"], 4, more_is_better=False),
            _signed(found["caption_accuracy"], 3, more_is_better=True),
        ]
        rows.append({"name": title(name), "cells": cells})
    note = (
        "Same identities, captions and start noise; mean ± standard error of the paired "
        f"difference, in colour where it exceeds {STANDARD_ERRORS:g} standard errors."
    )
    columns = ["identity top-1", "error (MSE)", "caption parts"]
    return {"columns": columns, "rows": rows, "note": note}


def judge_table(summary: Summary) -> dict[str, Any]:
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
        "Cosine of the embeddings of generated picture and reference; an undetected subject counts "
        "0. The condition encoder is a leaky judge: the hypernetwork was trained to listen to it."
    )
    return {"columns": columns, "rows": rows, "note": note}


def verdicts(summary: Summary) -> list[dict[str, str]]:
    """What the numbers say, good and bad, one sentence each."""
    found = []
    for name in CONTROLS:
        if name not in summary["differences"]:
            continue
        difference = summary["differences"][name]
        better = [
            _beats(difference["identity_top1"], True),
            _beats(difference["image_error"], False),
        ]
        words = {2: "in identity and in error", 1: "in one of identity and error only", 0: "not"}
        text = (
            f"Generated LoRAs beat “{title(name)}” {words[sum(better)]} "
            f"by more than {STANDARD_ERRORS:g} standard errors."
        )
        found.append(_verdict(all(better), text))
    found += _copy_verdict(summary) + _paired_verdict(summary) + _parity_verdict(summary)
    found += _memorisation_verdict(summary) + _steps_verdict(summary)
    failures = {n: k for n, k in summary["failures"].items() if k}
    text = (
        "No method failed to make a picture."
        if not failures
        else "Failed pictures, counted as wrong: "
        + ", ".join(f"{title(name)} {count}" for name, count in failures.items())
    )
    found.append(_verdict(not failures, text))
    return found


def timings(summary: Summary) -> list[dict[str, str]]:
    """Stage -> time, in the order recorded; the speed-up last."""
    rows = [
        {"name": TIMING_NAMES.get(name, name), "value": duration(seconds)}
        for name, seconds in summary["seconds"].items()
    ]
    speed = speed_up(summary)
    if speed:
        rows.append({"name": "fitted alone ÷ generated", "value": f"{speed:,.0f}×"})
    return rows


def provenance(summary: Summary) -> list[dict[str, str]]:
    """Seeds, sets, versions and whatever facts were recorded."""
    rows = []
    for name, facts in summary["evaluation"].items():
        text = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "licence")
        rows.append({"name": f"{name} set", "value": text})
    licence = summary["evaluation"]["test"].get("licence")
    if licence:
        rows.append({"name": "pictures", "value": licence})
    rows += [{"name": key, "value": str(value)} for key, value in summary["facts"].items()]
    text = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return [*rows, {"name": "versions", "value": text}]


def speed_up(summary: Summary) -> float | None:
    """Seconds to fit one LoRA alone ÷ amortised seconds to generate one; None if unknown."""
    seconds = summary["seconds"]
    if not seconds.get("generate_one_lora") or not seconds.get("fit_one_lora"):
        return None
    return seconds["fit_one_lora"] / seconds["generate_one_lora"]


def title(name: str) -> str:
    """What a method is called in words."""
    return TITLES.get(name, name.replace("_", " "))


def percent(value: float) -> str:
    """0.634 -> "63 %"."""
    return f"{100 * value:.0f} %"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min"


def estimate(found: Mapping[str, Any], digits: int) -> dict[str, str]:
    """{"value", "pm"} of an Estimate's JSON; pm is empty when there is no standard error."""
    stderr = found["stderr"]
    pm = "" if stderr is None else f"{stderr:.{digits}f}"
    return {"value": f"{found['mean']:.{digits}f}", "pm": pm}


def _signed(found: Mapping[str, Any], digits: int, more_is_better: bool) -> dict[str, str]:
    cell = estimate(found, digits)
    tone = "good" if _beats(found, more_is_better) else ""
    tone = "bad" if _beats(found, not more_is_better) else tone
    return {**cell, "value": f"{found['mean']:+.{digits}f}", "tone": tone}


def _beats(found: Mapping[str, Any], more_is_better: bool) -> bool:
    if found["stderr"] is None:
        return False
    gain = found["mean"] if more_is_better else -found["mean"]
    return gain > 0 and gain > STANDARD_ERRORS * found["stderr"]


def _verdict(good: bool, text: str) -> dict[str, str]:
    return {"tone": "good" if good else "bad", "text": text}


def _copy_verdict(summary: Summary) -> list[dict[str, str]]:
    if "copy_reference" not in summary["differences"]:
        return []
    difference = summary["differences"]["copy_reference"]
    better = _beats(difference["image_error"], False) and _beats(
        difference["caption_accuracy"], True
    )
    start = "They are no copies of the reference" if better else "They may be copies"
    return [_verdict(better, f"{start}: compared with copying it, by error and caption.")]


def _paired_verdict(summary: Summary) -> list[dict[str, str]]:
    pair = summary["paired"]
    if pair.get("ratio") is None:
        return []
    text = (
        f"Without a single training step they reach {pair['ratio']:.2f} ± "
        f"{pair['ratio_stderr']:.2f} of the conventional LoRA’s identity score, on the same "
        f"{pair['n']} identities ({pair['generated']:.3f} against {pair['conventional']:.3f})."
    )
    return [_verdict(pair["ratio"] >= 0.7, text)]


def _parity_verdict(summary: Summary) -> list[dict[str, str]]:
    parity = summary["torch_parity"]
    if parity.get("max_abs_diff") is None:
        return []
    good = parity["max_abs_diff"] <= MAX_PARITY
    good = good and not parity.get("unexpected_keys") and not parity.get("missing_keys")
    text = (
        f"PyTorch diffusers loads the exported files: {parity.get('unexpected_keys', 0)} unexpected"
        f" and {parity.get('missing_keys', 0)} missing keys; its pictures differ from JAX’s by at "
        f"most {parity['max_abs_diff']:.1e}."
    )
    return [_verdict(good, text)]


def _memorisation_verdict(summary: Summary) -> list[dict[str, str]]:
    found = []
    for space, audit in summary.get("memorisation", {}).get("weights", {}).items():
        text = (
            f"Memorisation audit ({space}): generated LoRAs are {audit['median_ratio']:.2f} times "
            "as far from the nearest training LoRA as training LoRAs are from each other; noisy "
            f"copies would be {audit['noisy_copy'] / audit['median_leave_one_out']:.2f} times."
        )
        found.append(_verdict(audit["passed"], text))
    return found


def _steps_verdict(summary: Summary) -> list[dict[str, str]]:
    headline = summary.get("steps_to_quality", {}).get("headline", {})
    if "hypernetwork" not in headline or "zero" not in headline:
        return []
    ours, theirs = headline["hypernetwork"], headline["zero"]
    text = f"95 % of the full conventional LoRA’s identity score is reached {_when(ours)} from the "
    text += f"generated LoRA and {_when(theirs)} from nothing."
    good = ours["steps"] is not None and ours["steps"] <= 25
    return [_verdict(good, text)]


def _when(headline: Mapping[str, Any]) -> str:
    if headline["steps"] is None:
        return "never"
    return f"after {headline['steps']} steps ({duration(headline['seconds_per_lora'])} per LoRA)"
