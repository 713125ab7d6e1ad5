"""Recipes of ``adq train --config NAME``, one YAML file each."""
