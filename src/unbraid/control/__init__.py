"""Policies, intent gates and the guard that runs a model under them."""
