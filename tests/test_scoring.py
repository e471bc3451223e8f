"""Logits and losses from hidden states are those of the whole model, whatever a family does to its logits."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, make_base, make_converted

from uniattn_cli.models.losses import Rows, row_losses
from uniattn_cli.training.objective import attach_objective
from uniattn_cli.training.validation import validation_loss

TOKENS = (torch.arange(48).view(2, 24) * 7) % 90 + 5


def models(entry):
    """A stock model and one converted from it."""
    return make_base(entry), make_converted(entry, "mixed")


@pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])
def test_logits_of_hidden_states_are_the_models(entry):
    from uniattn_cli.models.losses import head_logits

    for model in models(entry):
        with torch.no_grad():
            wanted = model(TOKENS, use_cache=False).logits
            hidden = model.model(TOKENS, use_cache=False).last_hidden_state
            assert torch.equal(head_logits(model, hidden.flatten(0, 1)), wanted.flatten(0, 1))


@pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])
def test_the_loss_while_training_is_the_loss_of_the_evaluation(entry):
    rows = Rows(list(TOKENS), list(TOKENS))
    for model in models(entry):
        wanted = row_losses(model, rows, batch_size=2).summary().mean
        attach_objective(model)
        assert validation_loss(model, rows, batch_size=2) == pytest.approx(wanted, rel=1e-5)
