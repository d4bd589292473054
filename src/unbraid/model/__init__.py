"""The only room that touches a model's insides: sites, reading, edits, generation."""

from unbraid.model.apply import applied
from unbraid.model.edits import Edit, Gate
from unbraid.model.generate import generate
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.read import read_images, read_sites
from unbraid.model.sites import Site

__all__ = [
    "Edit",
    "Gate",
    "LanguageModel",
    "Site",
    "applied",
    "generate",
    "load_model",
    "read_images",
    "read_sites",
]
