"""Rows of many subjects on disk, and the batches that training draws from them."""
