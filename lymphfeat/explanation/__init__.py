"""What a model saw: score maps, shares of the decision, faithfulness; figures and the HTML report.

`explain` gives arrays and tables for a notebook, `write_report` the page and the figures beside it.
"""
