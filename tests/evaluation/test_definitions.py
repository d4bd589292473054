"""A definition's id stands for its formula, not for the words in a table."""

from __future__ import annotations

from unbraid.evaluation.definitions import Definition


def test_the_id_follows_the_formula_alone() -> None:
    one = Definition("error", "E‖x − x̂‖²", "lower")
    assert one.id == Definition("squared error", "E‖x − x̂‖²").id
    assert one.id != Definition("error", "E‖x − x̂‖").id
    assert len(one.id) == 12
