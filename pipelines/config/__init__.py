"""Recipes, their fields, and the command line that overrides these."""
