"""The Triton kernels agree with plain torch: on a GPU, or in Triton's interpreter, which conftest.py turns on."""

from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NEWER
from torch import Tensor, nn

from lit_model import GPT, Config, attention, loss, packing
from lit_model.attention import plain_attention
from lit_model.decode import decode_attention
from lit_model.load import method_module, method_options
from lit_model.methods import lora
from lit_model.model import Linear
from lit_model.packing import Example, Segment, lay_out
from lit_model.quantize import _to_fp8, quantize
from lit_model.rope import Rope, rope_angles

kernels = pytest.importorskip("lit_model.kernels.packed_attention")
cross_entropy = pytest.importorskip("lit_model.kernels.cross_entropy")
long_attention = pytest.importorskip("lit_model.kernels.long_attention")
decode_kernels = pytest.importorskip("lit_model.kernels.decode")
swiglu_fp8 = pytest.importorskip("lit_model.kernels.swiglu_fp8")
SCALE = 0.3  # of the scores
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tree(n_tokens: int, seed: int) -> list[Segment]:
    """A root, a child of it, examples that descend from either, and others: as a walk through the tree."""
    rng = np.random.default_rng(seed)
    root = Segment(20)
    child = Segment(5, root)
    sizes = rng.integers(1, 70, n_tokens // 35)
    groups = [
        [Segment(int(n), parent) for n in part] for part, parent in zip(np.array_split(sizes, 3), (child, root, None))
    ]
    return [root, child, *(s for group in groups for s in group)]


def close(pairs: list[tuple[Tensor, Tensor]], tolerance: float = 1e-5) -> None:
    for got, expected in pairs:
        assert (got - expected).norm() < tolerance * expected.norm()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize(
    "n_tokens, nh, nkv, hs, n_virtual, window, softcap",
    [
        (150, 2, 2, 16, 0, None, None),
        (300, 4, 2, 32, 3, None, None),
        (700, 2, 1, 16, 0, None, None),
        (300, 4, 2, 16, 3, 24, None),
        (700, 2, 1, 16, 0, 24, 1.5),
        (300, 2, 2, 24, 3, None, 1.5),  # as 96: no power of two
        (150, 2, 1, 256, 0, 24, None),
    ],
)
@pytest.mark.parametrize("only_some", [False, True])
def test_packed_attention(n_tokens, nh, nkv, hs, n_virtual, window, softcap, only_some, monkeypatch):
    if DEVICE == "cuda" and hs > 128:
        pytest.skip("in float32 such heads want more shared memory than there is; test_gpu.py has them in bfloat16")
    monkeypatch.setattr(packing, "MOST_QUERY_BLOCKS", 2)
    monkeypatch.setattr(packing, "LONGER", 0)  # so that even a short row has keys that several programs share
    segments = tree(n_tokens, seed=n_tokens)
    packed = lay_out(segments, n_virtual, windows=(window,))
    assert packed.blocks[window].n_slots > 2 or n_tokens < 300
    if only_some:  # the last layer's queries: the last tokens of each example
        ends = [s.until - n_virtual for s in segments[2:]]
        wanted = [np.arange(end - min(3, s.length), end) for s, end in zip(segments[2:], ends)]
        packed = packing._for_last_layer(packed, segments, np.concatenate(wanted))
    packed = packed.to(torch.device(DEVICE))
    n_keys = len(packed.blocks[window].until)
    n_queries = len(packed.blocks[window].row)
    q, k, v = random(n_queries, nh, hs), random(n_keys, nkv, hs), random(n_keys, nkv, hs)
    gathered = k[packed.kv_index], v[packed.kv_index]
    expected = attention._attend_each(q, *gathered, packed, SCALE, window, softcap)
    got = kernels.packed_attention(q, k, v, packed.blocks[window], SCALE, window=window, softcap=softcap)
    towards = torch.randn_like(q)
    grads, expected_grads = (torch.autograd.grad(y, (q, k, v), towards) for y in (got, expected))
    close([(got, expected), *zip(grads, expected_grads)])


def test_lists_are_as_long_as_they_must_be():
    """A window leaves out blocks; one long example needs no parts of keys that are added up."""
    blocks = lay_out([Segment(2000)], windows=(None, 200)).blocks
    assert len(blocks[200].key_blocks) < len(blocks[None].key_blocks) / 3
    assert lay_out([Segment(60 * packing.BLOCK)]).blocks[None].n_slots == 2
    assert [*lay_out([Segment(90)], windows=(100,)).blocks] == [None]


@pytest.mark.parametrize("n_tokens, nh, nkv, hs", [(150, 2, 2, 16), (300, 4, 2, 32)])
def test_rope_in_packed_attention(n_tokens, nh, nkv, hs, monkeypatch):
    monkeypatch.setattr(packing, "MOST_QUERY_BLOCKS", 2)
    monkeypatch.setattr(packing, "LONGER", 0)
    packed = lay_out(tree(n_tokens, seed=n_tokens)).to(torch.device(DEVICE))
    T = len(packed.pos)
    rope = rope_angles(packed.pos, Rope(), hs, T, torch.float32)
    q, k, v = random(T, nh, hs), random(T, nkv, hs), random(T, nkv, hs)
    keys = rope.keys(k)[packed.kv_index]
    expected = attention._attend_each(rope.queries(q), keys, v[packed.kv_index], packed, SCALE)
    got = kernels.packed_attention(q, k, v, packed.blocks[None], SCALE, rope)
    towards = torch.randn_like(q)
    grads, expected_grads = (torch.autograd.grad(y, (q, k, v), towards) for y in (got, expected))
    close([(got, expected), *zip(grads, expected_grads)])


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing")
def test_no_kernel_is_compiled_anew_for_a_row_of_another_length():
    counts = []
    for length in (100, 112, 128, 113):
        packed = lay_out([Segment(length)]).to(torch.device(DEVICE))
        q, k, v = (random(length, 2, 16) for _ in range(3))
        kernels.packed_attention(q, k, v, packed.blocks[None], SCALE).sum().backward()
        of_each = (kernels._forward, kernels._backward_q, kernels._backward_kv, kernels._add_parts)
        counts.append([len(kernel.device_caches[0][0]) for kernel in of_each])
    assert counts[0] == counts[-1] and min(counts[0]) > 0


def test_long_attention_of_padded_examples(monkeypatch):
    """With cuDNN's two operations written out; test_gpu.py has the real ones."""

    def scores(q, k, scale):
        return (q @ k.mT * scale).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -torch.inf)

    def forward(q, k, v, *rest, scale):
        s = scores(q, k, scale)
        return s.softmax(-1) @ v, s.logsumexp(-1, keepdim=True)

    def backward(dy, q, k, v, y, lse, *rest, scale):
        p = (scores(q, k, scale) - lse).exp()
        ds = p * (dy @ v.mT - (dy * y).sum(-1, keepdim=True)) * scale
        return ds @ k, ds.mT @ q, p.mT @ dy

    monkeypatch.setattr(long_attention._OPS, "_scaled_dot_product_cudnn_attention", forward)
    monkeypatch.setattr(long_attention._OPS, "_scaled_dot_product_cudnn_attention_backward", backward)
    assert [long_attention._padding(n) for n in (99, 61, 4096, 4097, 2**17 + 1)] == [29, 67, 0, 255, 0]
    q, k, v, towards = (torch.randn(221, 2, 16, requires_grad=True) for _ in range(4))
    expected = attention._attend_each(q, k, v, lay_out([Segment(99), Segment(61), Segment(61)]), SCALE)
    got = long_attention.long_attention(q, k, v, torch.tensor([0, 99, 160, 221]), SCALE)
    close([(got, expected), *zip(*(torch.autograd.grad(y, (q, k, v), towards) for y in (got, expected)))])


def test_packed_attention_reads_heads_of_a_wider_tensor():
    packed = lay_out([Segment(40), Segment(30)]).to(torch.device(DEVICE))
    qkv = random(70, 3 * 2 * 16)
    q, k, v = (t.unflatten(-1, (2, 16)) for t in qkv.chunk(3, dim=-1))
    expected = attention._attend_each(q, k, v, packed, SCALE)
    got = kernels.packed_attention(q, k, v, packed.blocks[None], SCALE)
    close([(got, expected), *zip(*(torch.autograd.grad(y.square().sum(), qkv) for y in (got, expected)))])


@pytest.mark.parametrize("n_tokens, K, nh, nkv", [(40, 10, 2, 2), (300, 3, 4, 2), (300, 20, 2, 1)])
def test_a_prompt_that_every_token_sees(n_tokens, K, nh, nkv):
    packed = lay_out([Segment(n_tokens - 15), Segment(15)]).to(torch.device(DEVICE))
    q, k, v = (random(n_tokens, n, 16) for n in (nh, nkv, nkv))
    prompt = random(K, nkv, 16), random(K, nkv, 16), random(nh)
    pk, pv, gate = prompt
    expected = attention._attend_each(q, k, v, packed, SCALE) + gate[:, None] * plain_attention(q, pk, pv, SCALE)
    got = kernels.packed_attention(q, k, v, packed.blocks[None], SCALE, prompt=prompt)
    towards = torch.randn_like(q)
    grads, expected_grads = (torch.autograd.grad(out, (q, k, v, *prompt), towards) for out in (got, expected))
    close([(got, expected), *zip(grads, expected_grads)])
    got = kernels.packed_attention(
        *(t.detach() for t in (q, k, v)), packed.blocks[None], SCALE, prompt=(pk.detach(), pv.detach(), gate)
    )
    close([(torch.autograd.grad(got, gate, towards)[0], expected_grads[-1])])  # where only the gate is trained


def count_only(monkeypatch):
    """How often something is compiled is Dynamo's matter, whatever the backend."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, options=None: compile(f, dynamic=dynamic, backend="eager"))


def test_nothing_is_compiled_anew_for_other_segments_where_there_is_no_kernel(monkeypatch):
    """Rows of 1, 2, 3 and more examples through windows, soft-caps and experts."""
    count_only(monkeypatch)
    gpt = GPT(Config(**NEWER)).requires_grad_(False)
    lora.install(gpt, lora.LoRA())
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    gpt.compile()
    graphs = []
    for n in (2, 5, 9, 3, 7):
        ((idx, packed),) = packing.pack([Example(np.arange(8 + i, dtype=np.int32), 2) for i in range(n)], 400)
        gpt(idx, packed).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert len(set(graphs[2:])) == 1, graphs  # the second row says which sizes vary


GRAPHS = dict(adapter=4, adapter_v2=4, bottleneck=3, dora=3, ia3=3, lora=3, pissa=3, prefix=3, prompt=2)


@pytest.mark.parametrize("method", GRAPHS)
def test_nothing_is_compiled_anew_for_rows_of_another_length(method, monkeypatch):
    """Blocks are compiled once each for: the first ones, whose input needs no gradient (with and without an adapter);
    those between; the last one. Nothing in them ends a graph early."""
    monkeypatch.setattr(attention, "_has_kernels", lambda q: True)
    if DEVICE == "cpu":  # what the kernels compute does not matter here, and the interpreter takes its time
        for name in ("_forward", "_backward_q", "_backward_kv", "_add_parts"):
            monkeypatch.setattr(kernels, name, defaultdict(lambda: lambda *args, **options: None))
    count_only(monkeypatch)
    shape = dict(vocab_size=97, n_layer=5, n_head=2, n_embd=32, n_hidden=48)
    gpt = GPT(Config(**shape)).requires_grad_(False)
    method_module(method).install(gpt, method_options(method))
    gpt.to(DEVICE)
    rng = np.random.default_rng(0)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    gpt.compile()
    for n in (5, 9, 7, 2):
        examples = [Example(rng.integers(0, 97, k).astype(np.int32), 2) for k in rng.integers(8, 90, n)]
        for idx, packed in packing.pack(examples, 400, gpt.n_virtual_tokens, gpt.n_virtual_keys):
            gpt(idx.to(DEVICE), packed.to(torch.device(DEVICE))).backward()
        assert counters["stats"]["unique_graphs"] == GRAPHS[method] and not counters["graph_break"]
    torch._dynamo.reset()


def test_swiglu_to_fp8():
    gate, up, dh = random(30, 72), random(30, 72), torch.randn(30, 72, device=DEVICE)
    h = F.silu(gate) * up
    expected = [_to_fp8(t) for t in (h, *torch.autograd.grad(h, (gate, up), dh))]
    dgate, dgate_scale, dup, dup_scale = swiglu_fp8.swiglu_backward_to_fp8(dh, gate, up)
    got = [swiglu_fp8.swiglu_to_fp8(gate, up), (dgate, dgate_scale), (dup, dup_scale)]
    for (x, scale), (x_, scale_) in zip(got, expected):
        close([(scale, scale_)])
        tolerance = 1e-3 if DEVICE == "cuda" else 0.08  # the interpreter rounds to fp8 towards zero
        close([(x.float() * scale, x_.float() * scale_)], tolerance)


# ------------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("nh, nkv, hs", [(4, 2, 16), (2, 2, 24), (6, 1, 32)])
@pytest.mark.parametrize("window, softcap", [(None, None), (7, None), (None, 2.0), (90, 3.0)])
def test_attention_through_a_table(nh, nkv, hs, window, softcap):
    """Sequences of many lengths, some with slots in common."""
    n = torch.tensor([1, 5, 64, 65, 197], device=DEVICE)
    q, k, v = (torch.randn(*shape, device=DEVICE) for shape in ((5, nh, hs), (300, nkv, hs), (300, nkv, hs)))
    table = torch.stack([torch.randperm(300, device=DEVICE)[:200] for _ in n])
    table[:, :3] = table[0, :3]
    how = SCALE, window, softcap
    got = decode_kernels.attend_table(q, k, v, table, n, *how)
    for i, size in enumerate(n.tolist()):
        slots = table[i, max(0, size - (window or size)) : size]
        close([(got[i], plain_attention(q[i : i + 1], k[slots], v[slots], SCALE, softcap)[0])])
    close([(got, decode_attention(q, k, v, table, n, *how, plain=True))])
    n += 3  # so that all have what they share
    close(
        [
            (
                decode_kernels.attend_table(q, k, v, table, n, *how, 3),
                decode_kernels.attend_table(q, k, v, table, n, *how),
            )
        ]
    )


def test_rotated_and_stored():
    q, k, v = (torch.randn(3, n, 16, device=DEVICE) for n in (4, 2, 2))
    keys, values, slot = *torch.zeros(2, 9, 2, 16, device=DEVICE), torch.tensor([8, 0, 5], device=DEVICE)
    rope = rope_angles(torch.tensor([0, 7, 100], device=DEVICE), Rope(), 16, 0, torch.float32)
    got = decode_kernels.rotate_and_store(q, k, v, rope, slot, keys, values)
    close([(got, rope.queries(q)), (keys[slot], rope.keys(k)), (values[slot], v)])
    assert not keys[[1, 2, 3, 4, 6, 7]].any()


@pytest.mark.parametrize("m", [1, 5, 33])
@pytest.mark.parametrize("kind", ["none", "int8", "nf4", "fp8"])
def test_products_of_few_tokens(kind, m):
    linear = Linear(1344, 80).to(DEVICE).requires_grad_(False)  # no whole number of blocks
    x, block = torch.randn(m, 1344, device=DEVICE), nn.ModuleDict(dict(a=linear))
    if kind != "none":
        quantize(block, kind)
    if kind == "none":
        got = decode_kernels.few_times(x, linear.weight)
    else:
        got = decode_kernels.few_times(x, *linear.stored())
    close([(got, x @ linear.dense().T)], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy(dtype):
    """The gradient takes the place of the logits, of which a row is no whole number of blocks."""
    logits = (30 * torch.randn(5, 9000, device=DEVICE)).to(dtype)
    targets = torch.tensor([0, 8999, 4096, 4095, 17], device=DEVICE)
    expected = loss.chunk_loss(logits.float(), targets)
    got = cross_entropy.cross_entropy_(logits, targets)
    assert got[1] is logits
    close([(got[0], expected[0])])
    close([(got[1].float(), expected[1])], 1e-5 if dtype is torch.float32 else 5e-3)


def test_the_norm_of_few_rows():
    x, weight = torch.randn(3, 4, 24, device=DEVICE), torch.randn(24, device=DEVICE)
    close([(decode_kernels.rms_norm(x, weight, 1e-5), F.rms_norm(x, (24,), weight, 1e-5))])
