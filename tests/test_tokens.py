"""New tokens: rows of their own beside any method, equal to peft's, in training, files, decoding and merged folders."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import GPT2, LLAMA, fail, randomize, save_tokenizer, say
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_methods import METHODS, close, settings, shake, trained
from test_resume import run_until, tensors
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import lora
from finetune.lora import LoRA, Options, Train, build, main, start
from generate import base as generate_base
from lit_model import generate, load, model
from lit_model.data.tokenizer import Tokenizer
from lit_model.load import load_tokenizer, method_header, save_method
from lit_model.merge import merge
from lit_model.methods.tokens import Tokens
from lit_model.weights.folder import save_folder, tokenizer_files

ADDED = ["<eos>", "<tool>", "</tool>"]  # the first one exists
BASES = {"untied": LLAMA, "tied": dict(LLAMA, tie=True), "gpt2": GPT2}


@pytest.fixture(params=BASES)
def base(request, tmp_path, rows):
    """A checkpoint with one row more than the 398 of its tokenizer, beside rows that speak of tools."""
    save_tokenizer(tmp_path / "base", rows)
    gpt = randomize(model.GPT(model.Config(**BASES[request.param] | dict(vocab_size=399, block_size=256))), std=0.1)
    save_folder(tmp_path / "base", gpt.config, gpt.state_dict(), tokenizer_files(tmp_path / "base"))
    rows = [row | dict(output=f"<tool>{row['output'][:9]}</tool>") for row in rows[:24]]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path / "base"


def options(base, **more):
    values = dict(checkpoint_dir=base, data=str(base.parent / "data.json"), out_dir=base.parent / "out", devices="cpu")
    values |= dict(train=Train(lr=5e-3, batch_size=8, sample="", epochs=2), tokens=Tokens(",".join(ADDED)))
    return Options(**values | dict(dtype="float32", lora=LoRA(r=4, targets="o_proj")) | more)


def initial_rows(base, weight) -> tuple[list[int], torch.Tensor]:
    """Ids of ADDED, and the means of the rows of their pieces."""
    tokenizer = Tokenizer(base)
    rows = [weight.detach()[tokenizer.encode(text)].mean(0) for text in ADDED]
    return tokenizer.add(ADDED), torch.stack(rows)


def test_losses_and_rows_equal_peft(base):
    run = start(options(base))
    gpt = build(run, "lora", run.options.lora)
    hf = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    hf.resize_token_embeddings(gpt.config.vocab_size, mean_resizing=False)
    for ours, theirs in ((gpt.wte, hf.get_input_embeddings()), (gpt.lm_head, hf.get_output_embeddings())):
        ids, theirs.weight.data[ids] = initial_rows(base, ours.weight)
    how = dict(target_modules=["attn.c_proj" if gpt.wpe else "o_proj"], fan_in_fan_out=bool(gpt.wpe))
    how["trainable_token_indices"] = ids if gpt.config.tie else dict(embed_tokens=ids, lm_head=ids)
    peft = get_peft_model(hf, LoraConfig(r=4, lora_alpha=16, **how))
    for block, A in zip(gpt.blocks, (p for name, p in peft.named_parameters() if "lora_A" in name), strict=True):
        A.data.copy_(block.attn.o_proj.deltas["lora"].A)
    optimizers = [AdamW(trained(network).values(), lr=5e-3, weight_decay=0.1) for network in (gpt, peft)]
    for i in range(0, 20, 4):
        batch, peft_loss = run.train_examples[i : i + 4], 0
        for e in batch:
            idx = torch.from_numpy(e.ids).long()[None]
            labels = idx.masked_fill(torch.arange(len(e.ids)) < e.first_target, -100)
            peft_loss += peft(input_ids=idx, labels=labels).loss * e.n_targets
        losses = gpt(*run.rows(gpt, batch)[0]), peft_loss
        for loss, optimizer in zip(losses, optimizers):
            (loss / sum(e.n_targets for e in batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"step {i // 4 + 1}: loss {losses[0]:.4f}, {(losses[0] / losses[1] - 1).item():+.1e} of it to peft's")
        close(*losses, 1e-6)
    for ours, theirs in zip(*(trained(network).items() for network in (gpt, peft)), strict=True):
        print(f"{ours[0]}: {(ours[1] - theirs[1]).abs().max():.1e} of {theirs[1].abs().max():.2f}")
        close(ours[1], theirs[1], 5e-5)


def test_a_run_trains_its_rows_only_and_what_it_saves_generates_and_merges(base, capsys, monkeypatch, tmp_path):
    before, out = load(base), tmp_path / "out"
    main(options(base, train=Train(lr=3e-2, batch_size=8, sample="", epochs=12)))
    gpt, (ids, _), n = load(base, out), initial_rows(base, before.wte.weight), before.config.vocab_size
    assert ids == [1, n - 1, n] and gpt.config.vocab_size == n + 1  # it exists; was padding; is behind the last row
    assert method_header(out)["tokens"] == dict(zip(ADDED, ids))
    assert {name.split(".")[-1] for name in load_file(out / "lit_method.safetensors")} == {"A", "B", "rows"}
    assert torch.equal(gpt.wte(torch.arange(2, n - 1)), before.wte.weight[2:-1])
    for layer in (gpt.wte, gpt.lm_head):
        assert (layer.deltas["tokens"].rows != initial_rows(base, layer.weight)[1]).all()
    asked = f"--checkpoint_dir {base} --method_dir {out} --prompt river --temperature 0 --max_new_tokens 9 --device cpu"
    assert "<tool>" in say(generate_base, capsys, monkeypatch, asked)
    merge(base, out, tmp_path / "merged")
    tokenizer, hf_tokenizer = load_tokenizer(base, out), AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = "seven<tool> green </tool>"
    ids = tokenizer.encode(text)
    assert ids == hf_tokenizer.encode(text, add_special_tokens=False) and {n, n - 1} <= {*ids}
    assert hf_tokenizer.decode(ids) == tokenizer.decode(ids) == text
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    close(hf(torch.tensor([ids])).logits, gpt(torch.tensor([ids])))
    assert hf.config.tie_word_embeddings == before.config.tie and hf.config.vocab_size == n + 1


def test_resumes_over_nf4_bit_identical_and_only_with_the_same_tokens(base, capsys, monkeypatch, tmp_path):
    over_nf4 = options(base, quantize="nf4")
    main(replace(over_nf4, out_dir=tmp_path / "whole"))
    run_until(5, over_nf4, monkeypatch)
    with pytest.raises(ValueError, match="tokens.add <eos>,<tool>,</tool> there and <tool> here"):
        main(replace(over_nf4, tokens=Tokens("<tool>")))
    main(over_nf4)
    assert "resumed after step" in capsys.readouterr().out and tensors(tmp_path / "out") == tensors(tmp_path / "whole")


@pytest.mark.parametrize("method", METHODS)
def test_beside_every_method_packed_recomputed_saved_merged_and_decoded(base, method, tmp_path):
    run, (kind, own) = start(options(base)), settings(method)
    gpt, examples = shake(build(run, kind, own)), run.train_examples[:5]
    rows = gpt.wte.deltas["tokens"].rows
    one_by_one = sum(gpt(*run.rows(gpt, [e])[0]) for e in examples)
    (grad,) = torch.autograd.grad(one_by_one, rows)
    gpt.recompute = len(gpt.blocks)
    packed = gpt(*run.rows(gpt, examples)[0])
    close(packed, one_by_one)
    close(torch.autograd.grad(packed, rows)[0], grad)
    save_method(tmp_path / "m.safetensors", gpt, kind, own, run.base.identity)
    loaded, idx, n = load(base, tmp_path / "m.safetensors"), torch.randint(0, 400, (2, 30)), run.base.config.vocab_size
    with torch.no_grad():
        expected = gpt.eval()(idx)
        assert torch.equal(loaded(idx), expected) and expected.shape[-1] == n + 1
        if METHODS[method].merges or kind == "adapter_v2":
            merge(base, tmp_path / "m.safetensors", tmp_path / "merged")
            rest = next((tmp_path / "merged").glob("*/lit_method.safetensors"), None)
            close(load(tmp_path / "merged", rest)(idx), expected, 3e-5)
        text = [1, n - 1, 5]
        loaded.lm_head.deltas["tokens"].rows[-1] *= 99 / loaded(torch.tensor([text]))[0, -1, n]  # the next token is n
        tokens = list(generate(loaded, text, 6, temperature=0))
        assert tokens == [n, *(loaded(torch.tensor([text + tokens[:i]]))[0, -1].argmax() for i in range(1, 6))]


def test_beside_a_linear_head(base, labelled, tmp_path):
    main(options(base, data=str(labelled), head="linear", train=Train(max_steps=2)))
    merge(base, tmp_path / "out", tmp_path / "merged")
    gpt, idx = load(base, tmp_path / "out"), torch.randint(0, 400, (2, 30))
    close(load(tmp_path / "merged", tmp_path / "merged/full")(idx), gpt(idx), 3e-5)


def test_what_cannot_work_ends_in_one_line(base, capsys, monkeypatch, tmp_path):
    given = f"--checkpoint_dir {base} --data {tmp_path / 'data.json'} --out_dir {tmp_path / 'new'} --devices cpu"
    for wrong in ("a,,b", "a,a", ","):
        said = fail(lora, capsys, monkeypatch, f"{given} --tokens.add {wrong}")
        assert f"tokens.add is '{wrong}'; it must be different texts with commas between them" in said
    main(options(base))
    with pytest.raises(ValueError, match="adds tokens; side by side go methods over one vocabulary"):
        load(base, {"a": tmp_path / "out"})
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"] += [dict(tokenizer["added_tokens"][0], id=i, content=f"<{i}>") for i in (398, 399, 400)]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="its tokenizer is not the one that .* added tokens to"):
        load_tokenizer(base, tmp_path / "out")
    said = fail(lora, capsys, monkeypatch, f"{given} --tokens.add <tool>")
    assert "the network has 399 tokens, and the tokenizer numbers new ones to 401" in said
