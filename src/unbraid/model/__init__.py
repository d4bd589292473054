"""The only room that touches a model's insides: sites, reading, edits, generation."""
