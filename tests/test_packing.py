"""Packed documents never see each other: logits and gradients are those of each one alone, in every family and backend.

What is packed comes from TRL's packing and collator, as in training. FlashAttention needs a GPU; what it would be told
(where documents begin and end, window, soft cap) is checked with an attention function that knows nothing else.
"""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tiny import CASE_IDS, CASES, FAMILIES, backends, make_base, make_converted
from transformers import AttentionInterface, AttentionMaskInterface
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from uniattn_cli.errors import RecipeError
from uniattn_cli.models.families import check_packing, family_of
from uniattn_cli.models.losses import IGNORED
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.training.trainer import pack

LENGTHS = (7, 12, 1, 9, 3, 2)
PACKED = 20  # tokens of a packed sequence
# Weights are float64 where the model can be: experts cannot, and norms and eager softmaxes are always float32.
CLOSE = 1e-5
WITH_EXPERTS = ("mixtral", "qwen3_moe")
PACKING = {entry[0]: family_of(entry[1]().model_type).packs for entry in FAMILIES}
WITH_BACKEND = [
    (entry, name, backend) for entry, name in CASES if PACKING[entry[0]] for backend in backends(entry[1]())
]
IDS = [f"{entry[0]}-{name}-{backend}" for entry, name, backend in WITH_BACKEND]


def make_rows() -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * (length // 3) + ids[length // 3 :]})
    return rows


def packed_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    """All rows as TRL gives them to the model: one long row whose positions restart at each document, and no mask."""
    sequences = pack(Dataset.from_list(rows), PACKED)
    assert len(sequences) < len(rows)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(sequences.to_list())
    assert "attention_mask" not in batch and batch["input_ids"].shape == (1, sum(LENGTHS))
    return batch


def documents(batch: dict[str, torch.Tensor]) -> list[slice]:
    starts = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], sum(LENGTHS)], strict=True)]


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        logits[0, :-1].float(), labels[0, 1:], ignore_index=IGNORED, reduction="sum"
    )


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Norm of the difference relative to the norm."""
    return ((one - other).norm() / other.norm().clamp(min=1e-9)).item()


def assert_apart(model, together, batch) -> None:
    """Compares logits and gradients of a packed batch with those of its documents one by one, unpacked."""
    labels = batch["labels"]
    places = documents(batch)
    assert sorted(place.stop - place.start for place in places) == sorted(LENGTHS)
    model.zero_grad()
    logits = together()
    loss(logits, labels).backward()
    packed = gradients(model)
    model.zero_grad()
    for place in places:
        alone = model(batch["input_ids"][:, place], use_cache=False).logits
        assert distance(logits[:, place], alone) < CLOSE
        if place.stop - place.start > 1:
            loss(alone, labels[:, place]).backward()
    separate = gradients(model)
    assert packed.keys() == separate.keys() and len(packed) > 10
    for name, gradient in packed.items():
        assert distance(gradient, separate[name]) < CLOSE, name


def make_model(entry, layout: str, backend: str):
    model = make_converted(entry, layout, backend=backend)
    model = model if entry[0] in WITH_EXPERTS else model.double()
    return model.train()


@pytest.mark.parametrize(("entry", "layout", "backend"), WITH_BACKEND, ids=IDS)
def test_packed_equals_separate(entry, layout, backend):
    model = make_model(entry, layout, backend)
    batch = packed_batch(make_rows())
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    assert_apart(model, lambda: model(**inputs, use_cache=False).logits, batch)


def test_the_comparison_notices_documents_that_see_each_other():
    model = make_model(FAMILIES[0], "mixed", "sdpa")
    batch = packed_batch(make_rows())
    whole = torch.arange(sum(LENGTHS))[None]
    with pytest.raises(AssertionError):
        assert_apart(model, lambda: model(batch["input_ids"], position_ids=whole, use_cache=False).logits, batch)


def by_documents(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, cu_seq_lens_k, **kwargs):
    """Attention that knows documents by their borders alone, as FlashAttention does; shapes as in transformers."""
    assert attention_mask is None and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(LENGTHS)
    window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outputs = []
    for start, end in zip(cu_seq_lens_q.tolist(), cu_seq_lens_q.tolist()[1:], strict=False):
        scores = query[:, :, start:end] @ key[:, :, start:end].transpose(2, 3) * scaling
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (distance < 0) | (distance >= (window or end))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append(weights @ value[:, :, start:end])
    return torch.cat(outputs, 2).transpose(1, 2), None


WITH_FLASH = [case for case in CASES if any(n.startswith("flash") for n in family_of(case[0][1]().model_type).backends)]


@pytest.mark.parametrize(
    ("entry", "layout"), WITH_FLASH, ids=[CASE_IDS[index] for index, case in enumerate(CASES) if case in WITH_FLASH]
)
def test_flash_attention_is_told_where_documents_end(entry, layout):
    AttentionInterface.register("by_documents", by_documents)
    AttentionMaskInterface.register("by_documents", lambda *args, **kwargs: None)
    model = make_model(entry, layout, backends(entry[1]())[-1])
    batch = packed_batch(make_rows())
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def together():
        usual = model.config._attn_implementation
        model.config._attn_implementation = "by_documents"
        try:
            return model(**inputs, use_cache=False).logits
        finally:
            model.config._attn_implementation = usual

    assert_apart(model, together, batch)


def test_flash_is_checked_in_most_families():
    assert len({entry[0] for entry, _ in WITH_FLASH}) >= 10


@pytest.mark.parametrize("family", [name for name, packs in PACKING.items() if not packs])
def test_packing_is_refused_where_stock_cannot_do_it(family):
    base = make_base(next(entry for entry in FAMILIES if entry[0] == family))
    batch = packed_batch(make_rows())
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(AssertionError):
        assert_apart(base, lambda: base(**inputs, use_cache=False).logits, batch)
    with pytest.raises(
        RecipeError, match=rf"train\.packing: transformers cannot .* of type '{family}'; set it to false"
    ):
        check_packing(base.config.model_type)


def test_flex_attention_is_refused_with_packing():
    tree = {"model": {"name": "m", "attention": "flex_attention"}, "train": {"packing": True}}
    with pytest.raises(RecipeError, match=r"train\.packing cannot separate rows"):
        Recipe.from_tree(tree)
    for change in ({"model": {"name": "m"}}, {"train": {"packing": False}}):
        assert Recipe.from_tree(tree | change).model.name == "m"
