"""Training recipes, data and evaluation behind the command line."""
