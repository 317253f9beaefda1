import compatibility_page

from hyperlora_jax.lora_files.compatibility import TOOLS


def test_the_page_is_current():
    assert compatibility_page.PAGE.read_text() == compatibility_page.page(), (
        "run python tools/compatibility_page.py"
    )


def test_every_tool_says_how_it_was_checked():
    assert tuple(compatibility_page.CHECKED) == TOOLS
