"""Trains the lab's model from nothing: `python -m benchmarks.quality.train`.

Everything is drawn on the fly from a seed. A run that is stopped goes on where its last checkpoint
was; a finished run writes a Hugging Face folder that `vllm serve` loads like any other.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from tqdm import tqdm

from benchmarks.quality import curriculum, reader
from benchmarks.quality.batches import IGNORE, Collator
from benchmarks.quality.scenes import Palette
from benchmarks.quality.tower import attend_in_batches
from vllm_budgetkv.testing.models import build_processor

if TYPE_CHECKING:
    from benchmarks.quality.batches import Batch
    from benchmarks.quality.conversations import Conversation

BETAS = (0.9, 0.98)
WARMUP_STEPS = 100
CLIP_NORM = 1.0
SAVE_EVERY_STEPS = 100
PIXEL_NOISE = 0.05


class Trainer:
    """One run: model, optimiser, the place in the curriculum.

    Args:
        work: folder of the checkpoint and of the log.
        peak_rate: highest learning rate.
        seed: of weights and data.
    """

    def __init__(self, work: Path, peak_rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.work, self.peak_rate, self.seed = work, peak_rate, seed
        self.vocabulary = reader.build_vocabulary()
        self.model = reader.build_untrained(self.vocabulary)
        attend_in_batches(self.model.model.visual)
        self.collate = Collator(self.vocabulary)
        self.patches = Palette().patches(build_processor(self.vocabulary))
        groups = split_decay(self.model)
        self.optimiser = torch.optim.AdamW(groups, lr=peak_rate, betas=BETAS, fused=True)
        self.step = 0
        self.seconds = 0.0  # of training, all its legs together
        self.totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        if self._checkpoint.is_file():
            self._resume()

    @property
    def _checkpoint(self) -> Path:
        return self.work / "checkpoint.pt"

    def _resume(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Writes the checkpoint; a stop while it writes leaves the last one whole."""
        draft = self._checkpoint.with_suffix(".draft")
        state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        torch.save(state | {"step": self.step, "seconds": self.seconds}, draft)
        draft.replace(self._checkpoint)

    def export(self, folder: Path) -> None:
        """Writes the model as a Hugging Face folder in bfloat16."""
        self.model.to(torch.bfloat16).save_pretrained(folder)
        build_processor(self.vocabulary).save_pretrained(folder)
        self.model.float()

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [answer tokens, vocabulary], their labels)."""
        inner = self.model.model
        embeds = inner.get_input_embeddings()(batch.input_ids)
        pixels = self.patches[batch.cells].flatten(0, 1)
        pixels = pixels + PIXEL_NOISE * torch.randn_like(pixels)
        rows, columns = batch.grid
        num_frames = len(batch.cells) // (rows * columns)
        grid = torch.tensor([[num_frames, 2 * rows, 2 * columns]])
        vision = inner.visual(pixels, grid_thw=grid).pooler_output
        embeds = embeds.masked_scatter(batch.is_vision[..., None], vision.to(embeds.dtype))
        hidden = inner.language_model(
            inputs_embeds=embeds, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        answers = batch.labels != IGNORE
        return self.model.lm_head(hidden[answers]), batch.labels[answers]

    def train_step(self, rate: float, tokens: int) -> float:
        """One update; returns its loss."""
        rng = curriculum.rng_of(self.seed, self.step)
        torch.manual_seed(int(rng.integers(2**62)))  # the noise on the pixels
        talks = curriculum.sample(self.step, tokens, rng)
        batch = self.collate(talks)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        logits, labels = self.forward(batch)
        loss = functional.cross_entropy(logits, labels)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimiser.step()
        self.step += 1
        self._count(batch, talks, (logits.argmax(-1) == labels))
        return loss.item()

    def _count(self, batch: Batch, talks: list[Conversation], right: torch.Tensor) -> None:
        """Adds the answers of a batch that are right in full to the totals of their kinds."""
        rows, places = torch.nonzero(batch.labels != IGNORE, as_tuple=True)
        wrong: dict[tuple[int, int], bool] = defaultdict(bool)
        turns = batch.turns[rows, places].tolist()
        for row, turn, place, good in zip(
            rows.tolist(), turns, places.tolist(), right.tolist(), strict=True
        ):
            # each digit within a content is an answer of its own
            wrong[row, turn if turn >= 0 else -place] |= not good
        for (row, turn), is_wrong in wrong.items():
            kind = curriculum.kind_of(talks[row].turns[turn][0]) if turn >= 0 else "recited"
            total = self.totals[kind]
            total[0] += not is_wrong
            total[1] += 1

    def take_totals(self) -> dict[str, float]:
        """Share of right answers by kind since the last call."""
        shares = {kind: right / count for kind, (right, count) in sorted(self.totals.items())}
        self.totals.clear()
        return shares


def split_decay(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for norms, biases and embeddings."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "embed" not in name else free).append(parameter)
    return [{"params": decayed, "weight_decay": 0.01}, {"params": free, "weight_decay": 0.0}]


def rate_at(step: int, last_step: int, peak: float) -> float:
    """Linear warm-up, a plateau, and a cosine over the last third."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    start = last_step * 2 // 3
    if step < start:
        return peak
    share = (step - start) / max(1, last_step - start)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def main() -> int:
    options = parse_arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    trainer = Trainer(options.work, options.rate, options.seed)
    last_step = min(options.steps, curriculum.LAST_STEP)
    started = time.monotonic() - trainer.seconds
    bar = tqdm(total=last_step, initial=trainer.step, unit="step", mininterval=5.0)
    with (options.work / "log.csv").open("a", newline="") as log:
        writer = csv.writer(log)
        while trainer.step < last_step:
            rate = rate_at(trainer.step, last_step, options.rate)
            loss = trainer.train_step(rate, options.batch_tokens)
            bar.update()
            bar.set_postfix(stage=curriculum.stage_at(trainer.step - 1).name, loss=f"{loss:.3f}")
            if trainer.step % SAVE_EVERY_STEPS == 0 or trainer.step == last_step:
                shares = trainer.take_totals()
                text = " ".join(f"{kind}={share:.2f}" for kind, share in shares.items())
                bar.write(f"{trainer.step} loss {loss:.3f} {text}")
                trainer.seconds = time.monotonic() - started
                writer.writerow([trainer.step, round(trainer.seconds), loss, text])
                log.flush()
                trainer.save()
    bar.close()
    trainer.export(options.out)
    print(f"wrote {options.out}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the lab's model on rendered scenes.")
    work = Path("build/quality/train")
    parser.add_argument("--work", type=Path, default=work, help="checkpoint and log")
    parser.add_argument("--out", type=Path, default=reader.FOLDER, help="folder of the model")
    parser.add_argument("--steps", type=int, default=curriculum.LAST_STEP, help="stop after these")
    parser.add_argument("--batch-tokens", type=int, default=6144, help="tokens of a batch")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
