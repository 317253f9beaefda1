"""Numbers as tables, charts, sentences and one page."""
