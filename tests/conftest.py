import pytest
import torch

from lit_model import model


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


LLAMA = dict(arch="llama", vocab_size=97, block_size=128, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_hidden=112)
GPT2 = dict(arch="gpt2", vocab_size=97, block_size=128, n_layer=3, n_head=4, n_embd=64, tie=True)
FAMILIES = {"llama": LLAMA, "gpt2": GPT2}


@pytest.fixture(params=FAMILIES)
def family(request) -> dict:
    """Config fields of a tiny model: LLaMA with grouped-query attention, and GPT-2."""
    return FAMILIES[request.param]


def randomize(gpt: model.GPT, std: float = 0.2) -> model.GPT:
    """Gives every parameter, gates and biases too, a random value, so that a wrong one shows."""
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, std)
    return gpt
