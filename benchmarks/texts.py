"""Networks that read text: a small encoder with SST-2, a small Llama with stories.

Weights and texts are looked for where ``weights.py`` says.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import common
from secateur.errors import MissingExtra
from secateur.tasks import Classification, LanguageModel
from weights import data_folder

TOKENS = 64
"""Length of a sentence of SST-2, with what fills it up."""


class Encoder(nn.Module):
    """Input (batch, tokens) of indices, 0 where a sentence has ended; output (batch, 2): logits of the sentiment."""

    def __init__(self, vocabulary: int = 8192, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.tok = nn.Embedding(vocabulary, width, padding_idx=0)
        self.pos = nn.Parameter(torch.zeros(TOKENS, width))
        layer = nn.TransformerEncoderLayer(width, 4, 256, 0.1, "gelu", norm_first=True, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids) + self.pos[: ids.shape[1]]
        return self.head(self.encoder(x, src_key_padding_mask=ids == 0)[:, 0])


def encoder() -> nn.Module:
    """The encoder, trained on SST-2: 79.0 % on the official development set."""
    model = Encoder()
    model.load_state_dict(load_file(data_folder() / "encoder_sst2/model.safetensors"))
    return model.eval()


def sst2() -> Classification:
    """Sentences and phrases of SST-2: 8,000 of training, 1,000 of validation, and the 6,735 of the train-dev split."""
    folder = data_folder()
    names = json.loads((folder / "encoder_sst2/vocab.json").read_text())
    vocabulary = {word: i for i, word in enumerate(names)}
    x, y = _sentences(folder / "text/sst2_train.tsv", vocabulary)
    test = _sentences(folder / "text/sst2_traindev.tsv", vocabulary)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, validation = order[:8_000], order[8_000:9_000]
    return Classification(
        train=(x[train], y[train]), validation=(x[validation], y[validation]), test=test, batch_size=64
    )


def _sentences(path: Path, vocabulary: dict[str, int]) -> tuple[Tensor, Tensor]:
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.rsplit("\t", 1) for line in lines]
    ids = torch.zeros(len(rows), TOKENS, dtype=torch.long)
    for row, (text, _) in zip(ids, rows, strict=True):
        words = [2, *(vocabulary.get(word, 1) for word in text.split()[: TOKENS - 2])]
        row[: len(words)] = torch.tensor(words)
    return ids, torch.tensor([int(label) for _, label in rows])


# --- Llama -------------------------------------------------------------------------------------------

BEGINNING = r"\n\s*\n(?=Once upon a time|One day,|Once there|There was|There once)"
CONTEXT = 512


def llama() -> nn.Module:
    """Llama of 260,000 parameters, trained on TinyStories: perplexity about 5.4."""
    common.torchvision()
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "the benchmark Llama") from error
    model = AutoModelForCausalLM.from_pretrained(data_folder() / "llama_stories260k", dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


class Stories(LanguageModel):
    """The score of a story is its mean log likelihood a token; each is a batch of its own."""

    def scores(self, output: Any, target: Tensor) -> Tensor:
        return -self.loss(output, target)[None]


def stories() -> Stories:
    """The stories in random order: half to train on, an eighth to choose by, the rest to report on."""
    common.torchvision()
    from transformers import PreTrainedTokenizerFast

    folder = data_folder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "llama_stories260k/tokenizer.json"))
    texts = [
        text.strip() for text in re.split(BEGINNING, (folder / "text/tinystories.txt").read_text(encoding="utf-8"))
    ]
    ids = [[1, *tokenizer(t.replace("\n\n", "\n"), add_special_tokens=False).input_ids][:CONTEXT] for t in texts]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    found = [torch.tensor(ids[i]) for i in order]
    half, more = len(found) // 2, len(found) // 8
    return Stories(found[:half], found[half : half + more], found[half + more :], batch_size=1)
