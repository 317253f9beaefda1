"""What a run was made of, compared with what is asked for now: by content, never by place.

Facts are JSON: nested dicts of settings and hashes. A path is kept to be shown; it is compared only
where one of both sides does not know the hash of what lies there, as older runs do not.
"""

import json
from collections.abc import Mapping

# Paths, and the hashes beside them that say what lay there.
PLACES = {"base": "base_hash", "source": "pictures"}
SHOWN = 4  # differences named in a message
Differences = dict[str, tuple[object, object]]


def differences(saved: Mapping[str, object], expected: Mapping[str, object]) -> Differences:
    """{dotted name: (saved, expected)} of all facts that differ; a missing one is None."""
    return _differences(_plain(saved), _plain(expected), "")


def _differences(
    saved: Mapping[str, object], expected: Mapping[str, object], prefix: str
) -> Differences:
    differing: Differences = {}
    ignored = set()
    for place, content in PLACES.items():
        if content in saved and content in expected:
            ignored.add(place)
        elif place in saved and place in expected:
            ignored.add(content)
    for name in sorted({*saved, *expected}):
        ours, theirs = saved.get(name), expected.get(name)
        if ours == theirs or name in ignored:
            continue
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            differing |= _differences(ours, theirs, f"{prefix}{name}.")
        else:
            differing[f"{prefix}{name}"] = (ours, theirs)
    return differing


def refusal(where: str, differing: Differences) -> str:
    """One line that names both sides of what differs."""
    names = list(differing)[:SHOWN]
    more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    ours = ", ".join(f"{name} = {_short(differing[name][0])}" for name in names)
    theirs = ", ".join(f"{name} = {_short(differing[name][1])}" for name in names)
    return f"{where} was made with {ours}{more}, this run has {theirs}; use another workdir"


def _plain(facts: Mapping[str, object]) -> dict[str, object]:
    return json.loads(json.dumps(facts))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
