import json

import pytest
from ml_collections import ConfigDict

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.own_source import check_source, report_folder, source_name


def config_of(source, style="pixel-art", evaluated="", given=()):
    data = {"source": source, "style": style}
    return ConfigDict({"data": data, "evaluate": {"source": evaluated}, "given": tuple(given)})


def facts_of(source, **more):
    return {"data": {"source": source, **more}}


@pytest.mark.parametrize(
    ("facts", "config"),
    [
        (facts_of("pics"), config_of("pics")),
        (facts_of("pics"), config_of("./pics/")),
        (facts_of("a,b"), config_of("b, a")),
        (facts_of("pics"), config_of("avatars", evaluated="pics2")),
        (facts_of("pics"), config_of("moved/pics", given=["data.source"])),
        (facts_of("avatars", style="pixel-art"), config_of("avatars")),
        (facts_of("avatars", style="fonts"), config_of("avatars", given=["data.style"])),
        ({}, config_of("avatars")),
    ],
)
def test_pictures_that_may_be_meant(facts, config):
    check_source(config, facts, "runs/mine")


@pytest.mark.parametrize(
    ("facts", "config", "message"),
    [
        (facts_of("pics"), config_of("avatars"), "was trained on pics, .* data.source = avatars"),
        (facts_of("avatars"), config_of("pics"), "was trained on avatars, .* data.source = pics"),
        (
            facts_of("avatars", style="fonts"),
            config_of("avatars"),
            "was trained on fonts, .* data.style = pixel-art",
        ),
    ],
)
def test_others_are_refused_unless_they_were_asked_for(facts, config, message):
    with pytest.raises(UserError, match=f"runs/mine {message}"):
        check_source(config, facts, "runs/mine")


def test_no_report_takes_the_place_of_another_source(tmp_path):
    mine, other = {"source": "a/my faces"}, {"source": "b/my faces"}
    assert report_folder(tmp_path, mine, own=True) == tmp_path / "report"
    first = report_folder(tmp_path, mine, own=False)
    assert first == tmp_path / "report-my-faces"
    first.mkdir()
    (first / "metrics.json").write_text(json.dumps({"evaluation": {"test": mine}}))
    assert report_folder(tmp_path, mine, own=False) == first
    beside = report_folder(tmp_path, other, own=False)
    assert beside != first and beside.name.startswith("report-my-faces-")
    assert report_folder(tmp_path, {"style": "fonts"}, own=False).name == "report-fonts"


def test_sources_have_short_names():
    assert source_name({"source": "/data/faces"}) == "faces"
    assert source_name({"source": "/data/faces,/data/dogs/"}) == "faces, dogs"
    assert source_name({"style": "pixel-art"}) == "pixel-art"
