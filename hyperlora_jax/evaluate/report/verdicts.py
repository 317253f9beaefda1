"""What the numbers of metrics.json say, good and bad, one sentence each."""

from hyperlora_jax.array_types import Json
from hyperlora_jax.evaluate.methods import CONTROLS, title
from hyperlora_jax.evaluate.report.wording import (
    COLUMNS,
    STANDARD_ERRORS,
    Summary,
    beats,
    counted,
    duration,
)

LOSSES = ("image_error", "similarity")  # what tells beside identity how good a picture is
MAX_PARITY = 1e-3
GOOD_AUC = 0.9
FEWEST = 3  # identities from which on a standard error says something


def verdicts(summary: Summary) -> list[dict[str, str]]:
    """[{"tone": "good" or "bad", "text"}] of a summary."""
    lines = []
    loss = next(name for name in LOSSES if name in summary)
    word = {"image_error": "error"}.get(loss, loss)
    lines += _judge_verdict(summary)
    tested = summary["identity_top1"].get("generated", {"n": 0})["n"]
    if tested < FEWEST and summary["differences"]:
        text = f"{counted(tested, 'subject was', 'subjects were')} tested: too few to tell a "
        lines.append(_verdict(False, text + "difference between methods from chance."))
    for name in CONTROLS:
        if name not in summary["differences"] or tested < FEWEST:
            continue
        difference = summary["differences"][name]
        better = [
            beats(difference["identity_top1"], True),
            beats(difference[loss], COLUMNS[loss][2]),
        ]
        words = {
            2: f"in identity and in {word}",
            1: f"in one of identity and {word} only",
            0: "not",
        }
        text = (
            f"Generated LoRAs beat “{title(name)}” {words[sum(better)]} "
            f"by more than {STANDARD_ERRORS:g} standard errors."
        )
        lines.append(_verdict(all(better), text))
    lines += _copy_verdict(summary) + _paired_verdict(summary) + _parity_verdict(summary)
    lines += _memorisation_verdict(summary) + _confidence_verdict(summary)
    lines += _steps_verdict(summary)
    failures = {n: k for n, k in summary["failures"].items() if k}
    text = (
        "No method failed to make a picture."
        if not failures
        else "Failed pictures, counted as wrong: "
        + ", ".join(f"{title(name)} {count}" for name, count in failures.items())
    )
    lines.append(_verdict(not failures, text))
    return lines


def _verdict(good: bool, text: str) -> dict[str, str]:
    return {"tone": "good" if good else "bad", "text": text}


def _judge_verdict(summary: Summary) -> list[dict[str, str]]:
    if not summary["evaluation"]["test"].get("judge_is_condition_encoder"):
        return []
    text = (
        "The judge is not independent: it is the encoder that the hypernetwork was trained to "
        "listen to, so identity and similarity of generated LoRAs are optimistic."
    )
    return [_verdict(False, text)]


def _copy_verdict(summary: Summary) -> list[dict[str, str]]:
    if "copy_reference" not in summary["differences"] or "image_error" not in summary:
        return []
    difference = summary["differences"]["copy_reference"]
    better = beats(difference["image_error"], False) and beats(difference["caption_accuracy"], True)
    start = "They are no copies of the reference" if better else "They may be copies"
    return [_verdict(better, f"{start}: compared with copying it, by error and caption.")]


def _paired_verdict(summary: Summary) -> list[dict[str, str]]:
    pair = summary["paired"]
    if pair.get("ratio") is None:
        return []
    stderr = "" if pair["ratio_stderr"] is None else f" ± {pair['ratio_stderr']:.2f}"
    text = (
        f"Without a single training step they reach {pair['ratio']:.2f}{stderr} of the "
        "conventional LoRA’s identity score, on the same "
        f"{counted(pair['n'], 'identity', 'identities')} "
        f"({pair['generated']:.3f} against {pair['conventional']:.3f})."
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
    lines = []
    for space, audit in summary.get("memorisation", {}).get("weights", {}).items():
        text = (
            f"Memorisation audit ({space}): generated LoRAs are {audit['median_ratio']:.2f} times "
            "as far from the nearest training LoRA as training LoRAs are from each other; noisy "
            f"copies would be {audit['noisy_copy'] / audit['median_leave_one_out']:.2f} times."
        )
        lines.append(_verdict(audit["passed"], text))
    return lines


def _confidence_verdict(summary: Summary) -> list[dict[str, str]]:
    kinds = summary.get("confidence", {}).get("strangers", {})
    if not kinds:
        return []
    worst = min(kinds, key=lambda kind: kinds[kind]["auc"])
    text = (
        "Pictures that are not of its subjects are less familiar to the hypernetwork than held-out "
        f"subjects are: AUC {kinds[worst]['auc']:.2f} or more over {len(kinds)} kinds, the least "
        f"for “{worst}”."
    )
    return [_verdict(kinds[worst]["auc"] >= GOOD_AUC, text)]


def _steps_verdict(summary: Summary) -> list[dict[str, str]]:
    headline = summary.get("steps_to_quality", {}).get("headline", {})
    if "hypernetwork" not in headline or "zero" not in headline:
        return []
    ours, theirs = headline["hypernetwork"], headline["zero"]
    text = f"95 % of the full conventional LoRA’s identity score is reached {_when(ours)} from the "
    text += f"generated LoRA and {_when(theirs)} from nothing."
    good = ours["steps"] is not None and ours["steps"] <= 25
    return [_verdict(good, text)]


def _when(headline: Json) -> str:
    if headline["steps"] is None:
        return "never"
    return f"after {headline['steps']} steps ({duration(headline['seconds_per_lora'])} per LoRA)"
