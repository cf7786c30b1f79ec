# SPDX-License-Identifier: Apache-2.0
"""GGUF writing and reading (llama.cpp conventions, architecture "llama")."""
from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch

from .model import Config, Model

BLOCK_NAMES = {"attn_norm": "attn_norm", "q.weight": "attn_q", "k.weight": "attn_k", "v.weight": "attn_v",
               "o.weight": "attn_output", "ffn_norm": "ffn_norm", "gate.weight": "ffn_gate", "up.weight": "ffn_up",
               "down.weight": "ffn_down"}


def tensor_name(name: str) -> str:
    if name == "embd.weight":
        return "token_embd.weight"
    if name == "norm":
        return "output_norm.weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{BLOCK_NAMES[rest]}.weight"


def export(model: Model, tokenizer: Path, out: Path) -> None:
    c = model.cfg
    tok = json.loads(tokenizer.read_text(encoding="utf-8"))
    special = {t["content"] for t in tok["added_tokens"]}
    vocab = sorted(tok["model"]["vocab"].items(), key=lambda kv: kv[1])
    assert [i for _, i in vocab] == list(range(c.vocab_size))
    merges = [m if isinstance(m, str) else " ".join(m) for m in tok["model"]["merges"]]

    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = out.with_suffix(".tmp")
    w = gguf.GGUFWriter(str(tmp), "llama")
    w.add_name("ThriftAttention demo model")
    w.add_description("Small GQA model for tests and demonstrations: documentation text and access-code recall")
    w.add_license("apache-2.0")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    w.add_vocab_size(c.vocab_size)
    w.add_context_length(c.n_ctx)
    w.add_embedding_length(c.n_embd)
    w.add_block_count(c.n_layer)
    w.add_feed_forward_length(c.n_ff)
    w.add_head_count(c.n_head)
    w.add_head_count_kv(c.n_kv)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_layer_norm_rms_eps(c.eps)
    w.add_rope_dimension_count(c.n_rot)
    w.add_rope_freq_base(c.rope_base)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list([t for t, _ in vocab])
    w.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t, _ in vocab])
    w.add_token_merges(merges)
    w.add_bos_token_id(tok["model"]["vocab"]["<|bos|>"])
    w.add_eos_token_id(tok["model"]["vocab"]["<|eos|>"])
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    for name, p in model.state_dict().items():
        t = p.detach().float().cpu()
        if t.dim() == 1:
            w.add_tensor(tensor_name(name), t.numpy())
        else:
            raw = t.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            w.add_tensor(tensor_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    tmp.replace(out)
    print(f"{out}: {out.stat().st_size} bytes")


def read_gguf(path: Path) -> Model:
    """The model of a file written by :func:`export`, weights widened to FP32."""
    r = gguf.GGUFReader(str(path))

    def val(key):
        return r.fields[f"llama.{key}"].contents()

    cfg = Config(vocab_size=val("vocab_size"), n_embd=val("embedding_length"), n_layer=val("block_count"),
                 n_head=val("attention.head_count"), n_kv=val("attention.head_count_kv"),
                 head_dim=val("attention.key_length"), n_rot=val("rope.dimension_count"),
                 n_ff=val("feed_forward_length"), rope_base=val("rope.freq_base"),
                 eps=val("attention.layer_norm_rms_epsilon"), n_ctx=val("context_length"))
    model = Model(cfg)
    data = {t.name: t for t in r.tensors}
    state = {}
    for name, p in model.state_dict().items():
        t = data.pop(tensor_name(name))
        raw = np.array(t.data)
        if t.tensor_type == gguf.GGMLQuantizationType.BF16:
            x = torch.from_numpy(raw.view(np.uint8).reshape(-1).copy()).view(torch.bfloat16).float()
        else:
            x = torch.from_numpy(raw.astype(np.float32))
        state[name] = x.reshape(p.shape)
    assert not data, sorted(data)
    model.load_state_dict(state)
    return model.eval()


def read_tokenizer(path: Path):
    """The tokenizer of a GGUF file as a Hugging Face tokenizer."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    from .tokenizer import QWEN2
    f = gguf.GGUFReader(str(path)).fields
    tokens = f["tokenizer.ggml.tokens"].contents()
    types = f["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in f["tokenizer.ggml.merges"].contents()]
    tok = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True) for t, k in zip(tokens, types) if k == 3])
    return tok
