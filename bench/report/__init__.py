"""The documents' tables, sentences and figures, made from the rows under bench/results.

``python -m bench.report`` makes them anew, and with ``--check`` finds those that are out of date.

A part is a `parts.Table`, which stands between two markers of a page, or a `parts.Figure`, a PNG
under docs/figures. `catalog.PARTS` lists them all, and `renewal.renew` makes or checks them.
"""
