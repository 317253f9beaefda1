"""What was done, in a few sentences: from the facts of the checkpoint and of the datasets, never
from the config at hand, which may be another run's."""

from collections.abc import Sequence

from hyperlora_jax.array_types import Json
from hyperlora_jax.evaluate.methods import title
from hyperlora_jax.evaluate.own_source import source_name
from hyperlora_jax.evaluate.picture_sets import AnySet
from hyperlora_jax.evaluate.protocol import EvaluationSet
from hyperlora_jax.evaluate.report.wording import counted, duration, joined, span

CLOSED_FORMS = ("mean", "nearest", "knn", "ridge", "pca_gaussian")


def lead(test: AnySet) -> str:
    """The sentence under the report's title."""
    name = source_name(test.facts)
    if isinstance(test, EvaluationSet):
        who = counted(test.num_identities, f"{name} identity", f"{name} identities")
    else:
        who = f"{counted(test.num_identities, 'subject')} of {name}"
    were = "was" if test.num_identities == 1 else "were"
    return (
        f"LoRAs for {who} that {were} never trained on, written in one pass from one reference "
        "picture each."
    )


def story(summary: Json) -> list[str]:
    """Paragraphs that say what was done, from the content of metrics.json."""
    facts = summary["facts"]
    told = [_dataset(facts, summary), _training(facts), _asked(summary), _conventional(summary)]
    return [paragraph for paragraph in told if paragraph]


def _dataset(facts: Json, summary: Json) -> str:
    if not facts["targets"]:
        return ""
    steps = {dataset.get("recipe", {}).get("num_steps") for dataset in facts["targets"]}
    verb = "was" if facts["num_targets"] == 1 else "were"
    made = f"{verb} fitted at once" if None not in steps else f"{verb} collected"
    each = f" ({span(sorted(steps))} steps each)" if None not in steps else ""
    controls = [title(name) for name in ("mean_lora", "nearest") if name in summary["strength"]]
    come = "comes the" if len(controls) == 1 else "come the controls"
    of_them = f"; of them {come} {joined(controls)}" if controls else ""
    loras = counted(facts["num_targets"], "conventional LoRA")
    identities = "training identities" if facts["num_targets"] != 1 else "a training identity"
    return f"{loras} of {identities} {made}{each}{of_them}."


def _training(facts: Json) -> str:
    if facts["generator"] in CLOSED_FORMS:
        return f"The LoRAs are written by {facts['generator']}, a closed form fitted to such LoRAs."
    identities = counted(facts["num_training_identities"], "identity", "identities")
    source = facts["data"].get("source")
    of_source = f" of {source_name(facts['data'])}" if source else ""
    took = facts["training_seconds"]
    within = f", which took {duration(took)}" if took else ""
    steps = counted(facts["training_steps"] or 0, "step")
    how = "through the frozen base model: every subject of a batch draws with the LoRA that was "
    how += "just written for it"
    if facts["trained_on_targets"]:
        how = "on their LoRAs"
    return f"A hypernetwork was trained for {steps}{within}, on {identities}{of_source} {how}."


def _asked(summary: Json) -> str:
    test = summary["evaluation"]["test"]
    real = "source" in test
    prompts = (
        counted(test["num_captions"], "prompt")
        if real
        else f"{test['num_captions']} captions that training never saw"
    )
    who = counted(test["num_identities"], "held-out identity", "held-out identities")
    how = f"Every method drew {who} under {prompts}, from the same noise"
    if "validation" in summary["evaluation"]:
        how += ", at the strength that was best for it on other held-out identities"
    if not real:
        return how + "."
    shown, judged_by = test["pictures_shown"], test["pictures_judged_by"]
    return (
        f"{how}. {_each(shown, 'picture')} of a subject may be shown to a method, the first of "
        f"which is the reference; {_each(judged_by, 'other')} judge it."
    )


def _each(numbers: Sequence[int], what: str) -> str:
    return f"{span(numbers)} {what}{'' if max(numbers) == 1 else 's'}"


def _conventional(summary: Json) -> str:
    if "conventional" not in summary["identity_top1"]:
        return ""
    test, top1 = summary["evaluation"]["test"], summary["identity_top1"]["conventional"]
    section = summary["facts"]["config"]["evaluate"]["conventional"]["recipe"]
    steps = section.get("num_steps", summary["facts"]["config"]["distill"]["num_steps"])
    shown = test.get("pictures_shown", [test["num_views"]])[: top1["n"]]
    who = f"of each of {top1['n']} of these identities"
    if top1["n"] == 1:
        who = "of the first of these identities" if test["num_identities"] > 1 else "of it"
    elif top1["n"] == test["num_identities"]:
        who = "of each of these identities"
    return f"The conventional LoRA was fitted to {_each(shown, 'picture')} {who} for {steps} steps."
