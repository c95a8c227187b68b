"""What a model saw: maps, contributions to the decision, faithfulness; figures and the HTML report.

`explain` gives arrays and tables for a notebook, `write_report` the page and the figures beside it.
"""
