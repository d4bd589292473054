"""Unbraid a language model's activations into features you can read, test and control.

The package is a house of rooms, each importing only the rooms below it. Nothing is imported here, so that
``import unbraid`` costs nothing; take what you need from its room::

    from unbraid.model.load import load_model
    from unbraid.sae.base import SAE
"""

from __future__ import annotations

__version__ = "0.1.0"
