"""Weights and hidden states on their way: one layer at a time gives what the whole model gives."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, make_base, make_layout, typical_families
from torch import nn

from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.fitting.match_outputs import Limits, SourceChooser
from uniattn_cli.fitting.stream import release, start_batches, visit
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.modeling.sharing_uniattn import SharedStates
from uniattn_cli.models import residence
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.residence import layer_by_layer, resident
from uniattn_cli.recipe.schema import ConversionSpec

# To PyTorch this is another device than the plain CPU, so that tensors are copied to it and back.
ACCELERATOR = torch.device("cpu:0")
families = pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def windows(rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (rows, 32), generator=generator).cumsum(1) % 90 + 5


def places(*modules):
    return [tensor.data_ptr() for module in modules for tensor in (*module.parameters(), *module.buffers())]


def test_a_resident_module_is_moved_and_comes_home():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    home, before = places(module), [p.clone() for p in module.parameters()]
    with resident(ACCELERATOR, module):
        assert not set(home) & set(places(module))
        module[0].weight.mul_(2)
    assert places(module) == home
    assert torch.equal(module[0].weight, 2 * before[0]) and torch.equal(module[0].bias, before[1])


def test_what_is_new_or_replaced_meanwhile_stays():
    module = nn.Linear(4, 4)
    with resident(ACCELERATOR, module):
        module.weight = nn.Parameter(torch.ones(4, 4))
        module.more = nn.Linear(4, 2)
        expected = module.more.weight.clone()
    assert torch.equal(module.weight, torch.ones(4, 4)) and torch.equal(module.more.weight, expected)


def test_modules_that_share_weights_share_them_there_too():
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    home = one.weight.data_ptr()
    with resident(ACCELERATOR, one, other):
        assert one.weight.data_ptr() == other.weight.data_ptr() != home
    assert one.weight.data_ptr() == other.weight.data_ptr() == home


def test_weights_come_home_after_an_error():
    module = nn.Linear(4, 4)
    home = places(module)
    with pytest.raises(RuntimeError, match="broken"), resident(ACCELERATOR, module):
        raise RuntimeError("broken")
    assert places(module) == home
    with resident(None, module):
        assert places(module) == home


class Visits:
    """Counts how many decoder layers are resident at once, and how many visits there were."""

    def __init__(self, monkeypatch, model):
        self.layers, self.open, self.most, self.total = list(model.model.layers), 0, 0, 0
        original = residence.resident
        visits = self

        class Counting:
            def __init__(self, device, *modules):
                self.inner, self.count = original(device, *modules), any(m in visits.layers for m in modules)

            def __enter__(self):
                visits.open += self.count
                visits.total += self.count
                visits.most = max(visits.most, visits.open)
                return self.inner.__enter__()

            def __exit__(self, *error):
                visits.open -= self.count
                return self.inner.__exit__(*error)

        monkeypatch.setattr(residence, "resident", Counting)


@families
def test_a_model_runs_with_one_layer_at_a_time(entry, monkeypatch):
    base = make_base(entry)
    converted = build_converted(base, make_layout("mixed", base.config))
    tokens = windows(3)
    for model in (base, converted):
        expected, home = model(tokens).logits, places(model)
        visits = Visits(monkeypatch, model)
        with layer_by_layer(model, ACCELERATOR):
            assert torch.equal(model(tokens, use_cache=False).logits, expected)
        monkeypatch.undo()
        assert (visits.most, visits.total, visits.open) == (1, len(visits.layers), 0)
        assert places(model) == home
        assert torch.equal(model(tokens).logits, expected)
        with layer_by_layer(model, None):
            assert torch.equal(model(tokens).logits, expected)


@typical_families
@pytest.mark.parametrize("matched", [False, True], ids=["given_heads", "matched_heads"])
def test_a_fit_with_one_layer_resident_gives_the_same_weights(entry, matched):
    base = make_base(entry)
    layout = make_layout("mixed", base.config)
    chooser = None
    if matched:
        from test_sources import matcher_of

        matcher = matcher_of(base, distance=5)
        chooser = SourceChooser(matcher, matcher.lenders, Limits(4096, 512))
    home, found = places(base), []
    before = {name: value.clone() for name, value in base.state_dict().items()}
    for device in (None, ACCELERATOR):
        model = build_converted(base, layout)
        fits = fit_layers(base, model, windows(20), ConversionSpec(align=5, refine=5), chooser=chooser, device=device)
        found.append((model.config.layout, fits, model.state_dict()))
    (layout, fits, weights), (other_layout, other_fits, other_weights) = found
    assert layout == other_layout and fits == other_fits and set(weights) == set(other_weights)
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    assert places(base) == home and all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_one_batch_at_a_time_is_where_layers_run():
    batches = start_batches(make_base(FAMILIES[0]), windows(6), 0.3, 2, ACCELERATOR)
    first = [batch.base for batch in batches]
    for batch in visit(batches):
        # Tensors of both devices say that they are on the CPU, but one that was moved is another.
        assert [other.base is not at_home for other, at_home in zip(batches, first, strict=True)] == [
            other is batch for other in batches
        ]
        assert batch.base is batch.converted
        batch.converted = batch.shared.keys[0] = batch.base + 1
    for batch, states in zip(batches, first, strict=True):
        assert batch.base is states and torch.equal(batch.converted, states + 1)
        assert batch.shared.keys[0] is batch.converted


@pytest.mark.parametrize(
    ("rows", "holdout", "held"), [(1, 0.5, 0), (2, 0.01, 1), (10, 0.15, 2), (10, 0.0, 0), (3, 0.5, 2)]
)
def test_the_last_sequences_are_held_out_in_batches_of_their_own(rows, holdout, held):
    tokens = windows(rows)
    base = make_base(FAMILIES[0])
    batches = start_batches(base, tokens, holdout, 4)
    assert sum(len(batch.base) for batch in batches if batch.held) == held
    together = torch.cat([batch.base for batch in batches])
    assert torch.equal(together, base.model.embed_tokens(tokens))
    assert all(len(batch.base) <= 4 and len(batch.kwargs) == 6 for batch in batches)


def test_states_are_let_go_after_their_last_borrower():
    layout = Layout.from_list([{}, {}, {"leader": 0}, {"kind": "kv", "leader": 1}, {}, {"leader": 0}])
    shared = SharedStates()
    for states in (shared.queries, shared.keys, shared.values):
        states.update(dict.fromkeys((0, 1, 4), torch.zeros(1)))
    release(shared, layout, 2)
    assert set(shared.keys) == {0, 1}
    release(shared, layout, 3)
    assert set(shared.queries) == set(shared.values) == {0}
    # A layout that may still change keeps what is near, and never lets go of what it has.
    shared.queries[4] = shared.keys[4] = torch.zeros(1)
    release(shared, layout, 4, max_distance=2)
    assert set(shared.keys) == {0, 4}
    release(shared, layout, 5, max_distance=2)
    assert set(shared.keys) == {4}
    release(shared, Layout.own(6), 4, max_distance=2)
    assert not shared.values
