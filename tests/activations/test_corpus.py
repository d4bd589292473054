"""How a text is held for an evaluation; what the batches hold is tested where they are evaluated."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

from unbraid.activations.corpus import read_corpus
from unbraid.activations.documents import Document
from unbraid.model.load import LanguageModel


def test_a_text_takes_a_few_bytes_a_token_while_it_is_read(lm: LanguageModel) -> None:
    def documents(count: int) -> Iterator[Document]:
        for number in range(count):
            yield Document.of_text(f"The dose of Zolvane is {number} mg a day, and not more. " * 20)

    def most(count: int) -> tuple[int, int]:
        tracemalloc.start()
        corpus = read_corpus(
            lm, documents(count), tokens=None, context=256, positions="all", batch_tokens=2048, by_length=True
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return corpus.tokens, peak

    most(5)  # what is made once
    few, many = most(20), most(220)
    # Tuples of Python's integers took 60 bytes or more.
    assert many[1] - few[1] < 25 * (many[0] - few[0])
