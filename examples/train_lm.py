"""Train a small causal transformer on characters, one feedback point a block, and sample text.

python examples/train_lm.py --method grape
"""

import argparse
import gzip
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.live import Live
from rich.text import Text
from torch import Tensor, nn

import grapefx

TEXT = Path(__file__).resolve().parent / "data" / "tinyshakespeare.txt.gz"


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer; each is added, then normalised.

    The norms come after the additions, so that a block ends where a feedback point belongs.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.norm1(x + self.proj(attended.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.mlp(x))


class CharTransformer(nn.Module):
    """Token and position embeddings, blocks, a linear head."""

    def __init__(self, vocab: int, context: int, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(vocab, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(context, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.head = nn.Linear(dim, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.blocks(x))


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (the same, one character later) at ``starts``."""
    index = starts[:, None] + torch.arange(context + 1)
    return text[index[:, :-1]], text[index[:, 1:]]


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss(model: CharTransformer, text: Tensor, batch: int = 64) -> float:
    """Mean loss over evenly spread windows of ``text``, in nats a character."""
    starts = torch.linspace(0, len(text) - model.context - 2, 4 * batch).long()
    losses = [
        token_loss(model(x), y)
        for x, y in (windows(text, s, model.context) for s in starts.split(batch))
    ]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def sample(model: CharTransformer, prompt: Tensor, length: int, temperature: float) -> Tensor:
    """``prompt`` continued by ``length`` characters."""
    for _ in range(length):
        logits = model(prompt[None, -model.context :])[0, -1] / temperature
        prompt = torch.cat([prompt, torch.multinomial(logits.softmax(-1), 1)])
    return prompt


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", default="grape", help="bp, dfa, fdfa, grape")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--epoch-steps", type=int, default=100, help="steps between calibrations")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=400, help="characters to sample at the end")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--text", type=Path, default=TEXT, help="text file to learn, .gz or not")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    raw = args.text.read_bytes()
    text = (gzip.decompress(raw) if args.text.suffix == ".gz" else raw).decode()
    letters = sorted(set(text))
    number = {c: i for i, c in enumerate(letters)}
    codes = torch.tensor([number[c] for c in text])
    split = int(0.9 * len(codes))
    train, valid = codes[:split], codes[split:]
    model = CharTransformer(len(letters), args.context, args.dim, 4, args.depth)

    net = grapefx.compile(model, method=args.method, granularity="block", seed=args.seed)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr)
    decay = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=args.steps)
    net.record()  # for the report: alignment by layer, times
    with Live(auto_refresh=False) as live:
        for step in range(args.steps):
            net.set_epoch(step // args.epoch_steps)
            starts = torch.randint(len(train) - args.context - 1, (args.batch_size,))
            x, y = windows(train, starts, args.context)
            loss = token_loss(net(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            decay.step()
            if (step + 1) % args.epoch_steps == 0 or step + 1 == args.steps:
                # net trains the model's own weights: it can be used, saved and sampled as ever.
                nats = validation_loss(model.eval(), valid)
                live.console.print(f"step {step + 1}: validation loss {nats:.3f}")
                live.update(Text(net.report().text()), refresh=True)
                model.train()

    prompt = codes[:1] if "\n" not in number else torch.tensor([number["\n"]])
    written = sample(model.eval(), prompt, args.sample, args.temperature)
    print("".join(letters[i] for i in written.tolist()))


if __name__ == "__main__":
    main()
