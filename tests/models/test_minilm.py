"""all-MiniLM-L6-v2 (BERT, real weights): embeddings of sentences."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.models import load_minilm
from tests.models.harness import compiled_like_eager, emulated

SENTENCES = [
    "A cat sits on the mat.",
    "There is a kitten on the rug, and it has no intention of getting up before noon.",
    "Interest rates rose again.",
]


def test_sentence_embeddings_are_eagers() -> None:
    model, tokenizer = load_minilm()
    encoded = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = encoded["attention_mask"][..., None]
    assert mask.min() == 0, "sentences of different length"

    def embed() -> Tensor:
        with torch.inference_mode():
            states = model(**encoded).last_hidden_state
        pooled: Tensor = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled)

    options = emulated(gpu_memory="24MiB")  # of about 43 MiB without the embedding table
    found = compiled_like_eager(model, embed, options=options, calls=1)
    similarity = found.compiled @ found.compiled.T
    assert similarity[0, 1] > similarity[0, 2] + 0.2, "these are the real weights"
