"""Text written character by character by a decoder-only transformer, built like
GPT-2 (document 002, section 4).

    accelerate launch launch/train.py recipes/char_gpt.py --text FILE

Measured: 1.678 nats per character (1.667 to 1.680) on the last tenth of the
embedded "Pride and Prejudice" (set "test"), after 2 epochs, 54 s (median and
range of 3 seeds, 2026-11-30, two threads of a 2-core AMD EPYC). On that of
tinyshakespeare.txt 1.781; the LSTM of char_rnn gets further there: 1.572 after
4 of its 5 epochs, in less time (1 seed each, 2026-11-21).

GPT-2 small's blocks, 124 million parameters with its 50,257 symbols, are
`--num-layers 12 --num-heads 12 --width 768 --context 1024`.

Differences from the document: it only surveys the family; the sizes, AdamW and
the schedule are chosen here. Characters replace GPT-2's word pieces.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from nndist import Answers, Batch, Data, DataConfig, History, Inputs, Networks, Recipe, ScheduleName
from nndist.datasets import text as texts
from nndist.recipe import Amount, Count, Fraction

Past = tuple[Tensor, Tensor] | None  # a block's keys and values so far, each [k, heads, t, width / heads]


class Block(nn.Module):
    """Causal attention, then a two-layer MLP; each reads normalised input and is added to it."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:  # [k, t, width], one symbol after a past
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, None, self.dropout.p * self.training, is_causal=past is None)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.contract(F.gelu(self.expand(self.norm2(x))))), (k, v)


class GPT(nn.Module):
    def __init__(self, num_symbols: int, num_layers: int, num_heads: int, width: int, context: int, dropout: float):
        super().__init__()
        self.context = context
        self.symbols = nn.Embedding(num_symbols, width)  # its weights produce the logits too
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # the more layers add to x, the smaller each
                is_added = name.endswith(("project.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * num_layers) ** 0.5 if is_added else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, symbols: Tensor) -> Tensor:  # [k, t], t at most the context
        return self.read(symbols, [None] * len(self.blocks))[0]

    def read(self, symbols: Tensor, past: list[Past]) -> tuple[Tensor, list[Past]]:
        """Logits after each symbol, [k, t, symbols], and the blocks' keys and values, including the past's."""
        start = 0 if past[0] is None else past[0][0].shape[2]
        x = self.dropout(self.symbols(symbols) + self.positions.weight[start : start + symbols.shape[1]])
        present = []
        for block, before in zip(self.blocks, past, strict=True):
            x, keys_and_values = block(x, before)
            present.append(keys_and_values)
        return F.linear(self.norm(x), self.symbols.weight), present

    def advance(self, symbols: Tensor, state: tuple[Tensor, list[Past]] | None) -> tuple[Tensor, Any]:
        """Logits after the last symbol, [k, symbols], for `sample`; the state is the symbols read and their past."""
        nothing: list[Past] = [None] * len(self.blocks)
        seen, past = (symbols, nothing) if state is None else (torch.cat([state[0], symbols], 1), state[1])
        if seen.shape[1] > self.context:  # no position is left: reread the newer half
            seen = symbols = seen[:, -max(1, self.context // 2) :]
            past = nothing
        logits, past = self.read(symbols, past)
        return logits[:, -1], (seen, past)


@dataclass(kw_only=True)
class CharGPT(Recipe):
    """Decoder-only transformer of characters."""

    document = "002, section 4"

    epochs: int = 2
    batch_size: int = 8
    lr: float = 3e-3
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 100
    clip_norm: float | None = 1.0
    evaluate_every: str = "500 steps"
    text: Path | None = None
    """UTF-8 text file to learn (default: the embedded "Pride and Prejudice")."""
    num_layers: Count = 4
    """Transformer blocks."""
    num_heads: Count = 4
    """Attention heads per block."""
    width: Count = 128
    """Features per symbol in the residual stream."""
    context: Count = 128
    """Characters per window, the most that the network sees."""
    dropout: Fraction = 0.0
    """Fraction of dropping a feature or an attention weight."""
    weight_decay: Amount = 0.1
    """Weight decay of the matrices; biases and norms have none."""

    def validate(self) -> None:
        super().validate()
        texts.check_heads(self)

    def data(self, config: DataConfig) -> Data:
        return texts.next_character_data(config, self.text, self.context)

    def networks(self) -> dict[str, nn.Module]:
        sizes = {name: getattr(self, name) for name in ("num_layers", "num_heads", "width", "context", "dropout")}
        return {"model": GPT(1 + len(texts.alphabet(self)), **sizes)}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        matrices = [p for p in network.parameters() if p.dim() >= 2]
        others = [p for p in network.parameters() if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        return optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), weight_decay=self.weight_decay, fused=True)

    def loss(self, networks: Networks, batch: Batch) -> Tensor:
        return texts.next_character_losses(networks, batch)

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        return {"samples": texts.continuations(texts.read_corpus(self.text), networks["model"], data)}

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        return texts.written(texts.alphabet(self), networks["model"], inputs)
