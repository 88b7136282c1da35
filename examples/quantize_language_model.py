"""Quantize a decoder language model of transformers to W4A4: its loss on unseen text, and text written with cached keys.

python examples/quantize_language_model.py

The model is a small Llama (queries in groups, tied embeddings), trained here for some seconds on sentences of the embedded
world, so that nothing is downloaded. With a model of your own, begin at "Calibrate".
"""

import copy
import re

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ptq
from ptq.tiny.grammar import MEANINGS, NEUTRAL, calibration_prompts, held_out_prompts, parse_prompt

END, PAD = ".", "_"
WORDS = [END, PAD, ",", *sorted(NEUTRAL | {word for table in MEANINGS.values() for word in table})]


def windows(sentences, length=32):
    """Token numbers of the sentences one after the other, in rows of equal length: nothing is padded."""
    tokens = [WORDS.index(word) for text in sentences for word in [END, *re.findall(r"\w+|,", text)]]
    rows = len(tokens) // length
    return torch.tensor(tokens[: rows * length]).view(rows, length)


def loss(model, rows):
    """Cross-entropy of the next word, in nats."""
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def divergence(original, model, rows):
    """Kullback-Leibler divergence of the next word's probabilities from the original's, in nats: what quantization changed."""
    with torch.no_grad():
        expected, found = (one(input_ids=rows).logits.flatten(0, 1).log_softmax(-1) for one in (original, model))
    return float(torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean"))


def write(model, count):
    """Sentences that the model samples word by word, each step reading the keys and values that the earlier ones cached."""
    torch.manual_seed(0)
    start = torch.full((count, 1), WORDS.index(END))
    written = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=32, do_sample=True)
    return [" ".join(WORDS[token] for token in row if WORDS[token] not in (END, PAD)) for row in written]


def is_a_sentence(text):
    try:
        return bool(parse_prompt(text))
    except ValueError:
        return False


# Train.
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(WORDS),
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    eos_token_id=WORDS.index(END),
    pad_token_id=WORDS.index(PAD),
)
original = LlamaForCausalLM(config)
text = windows(calibration_prompts(3000))
optimizer = torch.optim.AdamW(original.parameters(), lr=0.01)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=240)
for _ in range(240):
    optimizer.zero_grad()
    rows = text[torch.randint(len(text), (16,))]
    original(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    schedule.step()
original.eval()

# Calibrate: text of the kind that the model will read. Targets: the Linears of the layers, without the head; None takes all.
model = copy.deepcopy(original)
batches = [{"input_ids": rows} for rows in text[:128].split(16)]
targets = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
report = ptq.quantize_module(model, batches, format="hif4", targets=targets)
print(f"{len(report.layers)} Linears are W4A4")

unseen = windows(held_out_prompts(100))
print(f"loss on unseen sentences: {loss(original, unseen):.4f}, quantized {loss(model, unseen):.4f}")
print(f"divergence from the original's probabilities: {divergence(original, model, unseen):.1e} nats a word")
for name, one in (("original", original), ("quantized", model)):
    sentences = write(one, 64)
    print(f"{name}: {sum(map(is_a_sentence, sentences))} of 64 are sentences of the world, such as: {sentences[0]}")
