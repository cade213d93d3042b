"""One page about one or more runs, a single file that opens in any browser without a network.

In go the folders of runs: config.json, metrics.jsonl, environment.json, and of every validation scores.json and the
pictures of its views. `read` turns what is there into plain data and what is not into sentences, `summary` and `curves`
make numbers, sentences and drawings of it, and `scenes` lets the run's reconstructor make objects of the pictures
again. Out comes page/report.html.jinja filled with all this, and with the viewer that the objects need.
"""

from ddpo.report.page import write_report, write_table, write_viewer

__all__ = ["write_report", "write_table", "write_viewer"]
