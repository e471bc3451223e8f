"""The engine: the same text and numbers as transformers, for every family and kind of layer."""

from __future__ import annotations

import pytest
import tiny
import torch

from uniattn_cli.checkpoint import build_converted
from uniattn_cli.inference.engine import decode

NEW = 64
PROMPT = 13
PADDING = [0, 4, 9]


def make_model(entry, layout_name: str | None):
    base = tiny.make_base(entry)
    if layout_name is None:
        return base
    return tiny.randomise_compensation(build_converted(base, tiny.make_layout(layout_name, base.config))).eval()


def make_prompt(rows: int = 3, seed: int = 1):
    tokens = torch.randint(3, 97, (rows, PROMPT), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    for row, count in enumerate(PADDING[:rows]):
        tokens[row, :count], mask[row, :count] = 0, 0
    return tokens, mask


def generate(model, tokens, mask, new: int = NEW, **options):
    """What transformers says, end-of-sequence tokens ignored unless asked for."""
    options = {"eos_token_id": None} | options
    return model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize(("entry", "layout"), tiny.CASES, ids=tiny.CASE_IDS)
def test_greedy_text_of_a_padded_batch_is_that_of_transformers(entry, layout):
    model = make_model(entry, layout)
    tokens, mask = make_prompt()
    found = decode(model, tokens, mask, max_new_tokens=NEW, engine="engine")
    assert found.path == "engine"
    assert torch.equal(found.sequences, generate(model, tokens, mask))


@pytest.mark.parametrize("entry", tiny.FAMILIES, ids=[entry[0] for entry in tiny.FAMILIES])
def test_greedy_text_of_stock_models_is_that_of_transformers(entry):
    model = make_model(entry, None)
    tokens, mask = make_prompt()
    found = decode(model, tokens, mask, max_new_tokens=NEW, engine="engine")
    assert torch.equal(found.sequences, generate(model, tokens, mask))
