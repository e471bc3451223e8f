"""Sharded with FSDP2, a converted model has the loss and the gradients that it has without."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, make_converted

QUICK = [("llama", "leader", False), ("llama", "key", True), ("llama", "kv", True)]
SLOW = [(entry[0], layout, True) for entry in FAMILIES for layout in ("mixed", "others")]
TOKENS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))


def converted_model(name, layout):
    return make_converted(next(entry for entry in FAMILIES if entry[0] == name), layout).train()


def backward(model, tokens):
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach()


def compare(name, layout, checkpointing, rank, processes):
    """Fails if loss or gradients of the sharded model, whose processes share the rows, are not those of all rows."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    whole = converted_model(name, layout)
    expected = backward(whole, TOKENS)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    model = converted_model(name, layout)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mesh = dist.init_device_mesh("cpu", (processes,))
    # With a dtype, FSDP casts what layers are called with, and copies every dict in it.
    policy = MixedPrecisionPolicy(param_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    loss = backward(model, TOKENS.chunk(processes)[rank])
    dist.all_reduce(loss)
    case = f"{name}, {layout}, checkpointing {checkpointing}"
    assert abs(loss / processes - expected) < 1e-5, case
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[key] is None), f"{case}: {key}"
        if parameter.grad is not None:
            difference = (parameter.grad.full_tensor() - gradients[key]).abs().max()
            assert difference <= 1e-5 * gradients[key].abs().max() + 1e-8, f"{case}: {key} {difference:.1e}"


def work(rank, rendezvous, cases, processes):
    """What each process does."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    try:
        for case in cases:
            compare(*case, rank, processes)
    finally:
        dist.destroy_process_group()


def test_a_sharded_model_equals_a_whole_one(tmp_path):
    work(0, tmp_path / "rendezvous", QUICK, 1)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [QUICK, SLOW], ids=["llama", "every_family"])
def test_two_processes_equal_one(cases, tmp_path):
    torch.multiprocessing.spawn(work, (tmp_path / "rendezvous", cases, 2), nprocs=2)
