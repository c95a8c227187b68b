"""The portable model: recipe, head, decision; ensembles; predictions; scoring."""
