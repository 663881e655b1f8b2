"""Tokenizer and T5 encoder of the embedded `tiny` Chroma.

The tokenizer knows whole words and, for every other word, falls back to characters, so any trigger word gives tokens of
its own. It has exactly the parts that `T5TokenizerFast` rebuilds when it loads a folder (a Unigram model behind a
Metaspace splitter and no normaliser); anything else would be lost on the way through `from_pretrained`.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue] (made when it is asked for)
)

from chroma_core.model.text_encoder import T5Encoder

from .world import COLOURS, PLACES, SHAPES

PAD, EOS, UNK = 0, 1, 2
SPACE = "▁"  # how Metaspace writes the start of a word

TAUGHT = sorted(
    {*COLOURS, *SHAPES, *" ".join(PLACES.values()).split()}
    | set("a an of on picture photo small large big shape background".split())
)
UNTAUGHT = sorted(
    set(
        "sks ohwx zwx and with two drawing painting image style emblem badge symbol logo sign flag toy heart moon sun "
        "flower leaf tree house cat dog person man woman striped dotted grey gray brown".split()
    )
)
"""Words that have a token but occur in no training caption: room for trigger words and their nouns."""


def _forms(word: str) -> list[str]:
    """The spellings of a word that share one meaning: there is no lower-casing step in this tokenizer."""
    return list(dict.fromkeys([word, word.capitalize(), word.upper()]))


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Words score far above the characters that spell them; pad is 0, `</s>` (appended to every text) 1, unknown 2."""
    letters = [chr(c) for c in (*range(0xA1, 0x180), *range(0x386, 0x460)) if chr(c).isalpha()]
    kana = [chr(c) for c in (*range(0x3041, 0x3097), *range(0x30A1, 0x30FB))]
    characters = list(dict.fromkeys([*string.printable.strip(), *letters, *kana]))
    words = list(dict.fromkeys(SPACE + form for word in TAUGHT + UNTAUGHT for form in _forms(word)))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -1.0) for word in words]
    pieces += [(SPACE, -8.0)] + [(character, -10.0) for character in characters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNK, byte_fallback=False))
    metaspace = {"replacement": SPACE, "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    return T5TokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_ids=0,
    )


def new_text_encoder(vocabulary: int) -> T5Encoder:
    """A T5 v1.1 encoder in miniature: 3 layers, width 128, no dropout; its heads begin with a sense of order.

    The transformer gives all text tokens one position, so only the relative position bias of T5 tells `red circle on
    blue` from `blue circle on red`. From T5's own start (a bias near zero) training stays a bag of words for thousands
    of steps: the right two colours, in either role.
    """
    architecture: dict[str, Any] = {
        "vocab_size": vocabulary,
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 256,
        "num_layers": 3,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
    }
    encoder = T5Encoder(**architecture)
    encoder.load_state_dict(T5EncoderModel(T5Config(**architecture)).state_dict())  # drawn as T5 draws them
    favour_neighbours(encoder)
    return encoder


@torch.no_grad()
def favour_neighbours(encoder: T5Encoder, strength: float = 4.0) -> None:
    """Starts head 0 on the next token, head 1 on the one before, head 2 on both sides; head 3 looks everywhere.

    Rows of the bias are buckets: d for a key d tokens back, 16 + d for one d tokens ahead (d < 8).
    """
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    bias = encoder.get_parameter(name)  # [32 buckets, 4 heads]
    bias[17, 0] += strength
    bias[1, 1] += strength
    bias[[1, 2, 17, 18], 2] += strength / 2


@torch.no_grad()
def share_spellings(tokenizer: PreTrainedTokenizerFast, encoder: T5Encoder) -> None:
    """Gives `Red` and `RED`, `B` and so on the embedding of the lower-case piece, which is the one that was trained."""
    vocabulary = tokenizer.get_vocab()
    table = encoder.shared.weight
    for piece, row in vocabulary.items():
        lower = vocabulary.get(piece.lower())
        if lower is not None and lower != row and row > UNK:
            table[row] = table[lower]


def tokens_with_one_pad(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, T] and lengths [B] of n real tokens (with `</s>`); T is the longest n + 1, so each row has a pad."""
    rows = tokenizer(texts).input_ids
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max()) + 1), PAD)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths
