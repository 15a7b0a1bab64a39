"""Bits per byte of a language model on text.

Letters: H sequences, S positions, V vocabulary.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def bits_per_byte(folder: Path, texts: Sequence[str], batch_sequences: int = 16) -> float:
    """Negative log2 likelihood of `texts` per UTF-8 byte, under the checkpoint in `folder`.

    Each text is cut into pieces of the context length less one, and each piece is read after BOS without sight of the
    piece before it, so the figure is an upper bound of what a sliding window would give.

    Args:
        folder: a `transformers` checkpoint with a tokenizer that has a BOS token.
        texts: documents, scored apart from each other.
        batch_sequences: pieces per forward pass.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = model.config.max_position_embeddings - 1
    pieces = []
    for row in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
        pieces.extend([tokenizer.bos_token_id, *row[at : at + length]] for at in range(0, len(row), length))
    pieces.sort(key=len)
    nats = 0.0
    for at in range(0, len(pieces), batch_sequences):
        group = pieces[at : at + batch_sequences]
        width = max(map(len, group))
        tokens_HS = torch.tensor([piece + [tokenizer.bos_token_id] * (width - len(piece)) for piece in group])
        target_HS = torch.tensor([piece[1:] + [-100] * (width - len(piece)) for piece in group])
        # bf16 matmuls cost about 1e-4 bits here and halve the time.
        with torch.autocast("cpu", torch.bfloat16):
            logits_HSV = model(input_ids=tokens_HS, use_cache=False).logits[:, :-1]
        nats += F.cross_entropy(logits_HSV.flatten(0, 1).float(), target_HS.flatten(), reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)
