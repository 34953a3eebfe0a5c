"""The commands of owner and querier, a module for each part of the work; only typer is imported at the top of any of them."""
