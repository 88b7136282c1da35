"""The tokenizer made for the grammar and the frozen random UMT5 encoder, with the pipeline's own padding rules."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ptq.tiny import grammar

from .common import MAX_TOKENS

TEXT_DIM = 128
_TEXT = "a an and backdrop background big black blue bottom box bright circle clip cobalt crimson cross cyan dark diagonally disc disk donut down downward drifting drifts emerald glides gliding gray green grey hoop huge large left leftward lemon little lower magenta moves moving of on orange over pink plus purple pyramid red right rightward ring scarlet slides sliding small square striped stripy tangerine the tiny to top toward triangle turquoise up upper upward video violet white yellow"
#: The tokenizer's words in order; a few more than the grammar uses.
WORDS = tuple(_TEXT.split())
_SPECIAL = ("<pad>", "</s>", "<unk>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the grammar, lower-cased; punctuation is its own token; ``</s>`` ends every text."""
    missing = grammar.NEUTRAL.union(*grammar.MEANINGS.values()) - set(WORDS)
    if missing:
        raise ValueError(f"the tokenizer lacks words of the grammar: {sorted(missing)}")
    words = [*_SPECIAL, ",", ".", *WORDS]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\W_]+|[^\w\s]"), behavior="removed", invert=True)
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )


def make_encoder(tokenizer: PreTrainedTokenizerFast, seed: int) -> UMT5EncoderModel:
    """A frozen random encoder (2 layers of width 128) in eval mode, its weights rounded to bf16 values.

    Synonyms get nearby embeddings, as in an encoder that has learned a language.
    """
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    model = UMT5EncoderModel(config).eval().requires_grad_(False)
    table, ids = model.shared.weight, tokenizer.get_vocab()
    tables = (
        grammar.SHAPE_WORDS,
        grammar.COLOUR_WORDS,
        grammar.SIZE_WORDS,
        grammar.BACKGROUND_WORDS,
        grammar.DIRECTION_WORDS,
    )
    for first, *others in (words for kind in tables for words in kind.values()):
        for word in others:
            table[ids[word]] = 0.95 * table[ids[first]] + 0.31 * table[ids[word]]
    return model.to(torch.bfloat16).to(torch.float32)


@torch.no_grad()
def embed(tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, prompts: list[str]) -> torch.Tensor:
    """float32 ``[n, MAX_TOKENS, TEXT_DIM]``: what WanPipeline computes, zeros after the end of each prompt."""
    enc = tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    out = encoder(enc.input_ids, enc.attention_mask).last_hidden_state
    return out * enc.attention_mask[..., None].to(out.dtype)
