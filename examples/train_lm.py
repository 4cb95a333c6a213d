"""Train a byte-level language model on Python's standard library, or on a text of your own.

python -m examples.train_lm [--text PATH] [--preset small|gpt2-small] [--resume]
torchrun --nproc-per-node 4 -m examples.train_lm --parallel ddp|fsdp|tp|fsdp+tp [--resume]

Writes to runs/train_lm/: checkpoint.safetensors, loss.png, sample.txt and metrics.json.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file too
# Threads that wait by spinning are many times slower where others use the processor too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import torch
    from torch import Tensor, nn
    from tqdm import tqdm

    import trilith
    from examples.lm import BadInput, data, memory, plot
    from examples.lm.checkpoint import State, replace_file, restore, save
    from examples.lm.ranks import Group, Ranks, ranks_of, whole
    from examples.lm.settings import Settings, parse, settings_from
    from perf.models import eager_lm
    from trilith.blocks import build_lm
except ModuleNotFoundError as error:
    print(
        f"train_lm: {error.name} is missing; install it: pip install -e '.[examples]'",
        file=sys.stderr,
    )
    sys.exit(2)

EVAL_WINDOWS, EVAL_BATCH = 512, 32
SAMPLE_BYTES, PROMPT_BYTES, TEMPERATURE = 400, 32, 0.8
BAR_EVERY = 10


def main(argv: list[str] | None = None) -> int:
    try:
        return run(argv)
    except BadInput as error:
        if os.environ.get("RANK", "0") == "0":  # all of torchrun's processes find the same
            print(f"train_lm: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("train_lm: the GPU's memory is full; give a smaller --batch", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_lm: stopped at once; the last checkpoint stands", file=sys.stderr)
        return 130


def run(argv: list[str] | None) -> int:
    began = time.perf_counter()
    args = parse(argv)
    corpus = data.text_file(args.text) if args.text else data.standard_library()
    settings = settings_from(args, corpus.fingerprint())
    data.require_windows(corpus, settings.context)
    ranks = ranks_of(args, settings.batch)
    state = fresh_state(settings, corpus, ranks)
    if args.compile:
        state.trained = torch.compile(state.trained)
    checkpoint = args.out / "checkpoint.safetensors"
    resumed = checkpoint if args.resume == Path() else args.resume
    if resumed is not None:
        restore(resumed, state, settings)
    ranks.wait()  # until all have read what is put aside now
    if ranks.first:
        prepare(checkpoint, resumed)
        print(
            f"{corpus.name}: {len(corpus.train):,} bytes to train on, {len(corpus.held_out):,} "
            f"held out; {parameters_of(state.model):,} parameters on {args.device}"
        )
    windows = data.held_out_windows(corpus.held_out, settings.context, EVAL_WINDOWS)
    first_step = state.step
    with stop_requests() as stops:
        seconds, stopped = train(state, settings, windows, args, checkpoint, stops)
    save(checkpoint, state, settings)
    if stopped:
        if ranks.first:
            print(
                f"train_lm: interrupted at step {state.step}, saved; go on with --resume "
                f"{checkpoint}",
                file=sys.stderr,
            )
        ranks.close()
        return 128 + (stops[0] if stops else signal.SIGTERM)
    tokens = (state.step - first_step) * settings.batch * settings.accumulate * settings.context
    state = alone(state, settings, corpus, args)
    if ranks.first:
        metrics = {
            "val_loss": evaluate(state.model, windows, state.losses.device),
            "unigram_loss": data.unigram_loss(corpus.train, windows),
            "bigram_loss": data.bigram_loss(corpus.train, windows),
            "tokens_per_s": tokens / seconds if tokens else None,
            "preset": args.preset,
            "text": corpus.name,
            "step_bytes": step_bytes(state, settings, windows),
            "step_bytes_with_kernels": None
            if args.device == "cuda"
            else memory.counted_with_kernels(settings.model, settings.batch),
        }
        text = sample(state.model, corpus.held_out[:PROMPT_BYTES], settings)
        write_results(args.out, state, text, metrics, began)
    ranks.close()
    return 0


def alone(state: State, settings: Settings, corpus: data.Corpus, args: Namespace) -> State:
    """The state with all of the model in this process; every rank must ask."""
    if not isinstance(state.ranks, Group):
        return state
    weights = {name: whole(value) for name, value in state.model.state_dict().items()}
    own = fresh_state(settings, corpus, Ranks(args.device))
    own.model.load_state_dict(weights)
    return replace(own, losses=state.losses, step=state.step, evals=state.evals)


def write_results(
    out: Path, state: State, text: str, metrics: dict[str, object], began: float
) -> None:
    """Plot, sample and metrics, into files and in brief onto the screen."""
    evals = [*state.evals, (state.step, metrics["val_loss"])]
    baselines = {name: metrics[f"{name}_loss"] for name in ("unigram", "bigram")}
    losses = state.losses.cpu()
    replace_file(out / "loss.png", lambda path: plot.loss_curve(path, losses, evals, baselines))
    replace_file(out / "sample.txt", lambda path: path.write_text(text, encoding="utf-8"))
    metrics |= {
        "steps": state.step,
        "params": parameters_of(state.model),
        "device": device_name(state.losses.device),
        "seconds": time.perf_counter() - began,
        "versions": versions(),
    }
    lines = json.dumps(metrics, indent=2) + "\n"
    replace_file(out / "metrics.json", lambda path: path.write_text(lines))
    print(f"\n--- a sample, from {PROMPT_BYTES} bytes of held-out text ---\n{text}\n---")
    print(
        f"val_loss {metrics['val_loss']:.3f} nats per byte (bigram {metrics['bigram_loss']:.3f}, "
        f"unigram {metrics['unigram_loss']:.3f}) after {metrics['seconds']:.0f} s; see {out}/"
    )
    print("memory of a step at its peak: " + in_words(metrics["step_bytes"]))
    counted = metrics["step_bytes_with_kernels"]
    if counted is not None:
        print("on a GPU, counted in bfloat16 without running it: " + in_words(counted))


def in_words(peaks: dict[str, int | None]) -> str:
    names = {"fused": "", "logits": "with the logits of all tokens ", "plain": "in plain PyTorch "}
    return "; ".join(
        names[name] + ("does not fit" if peak is None else f"{peak / 1e6:.1f} MB")
        for name, peak in peaks.items()
    )


def step_bytes(state: State, settings: Settings, windows: Tensor) -> dict[str, int | None]:
    """Most bytes in use in a forward and backward pass: as trained, with all logits made, and of
    the same model in plain PyTorch (without dropout). None where that does not fit.
    """
    device = state.losses.device
    batch = windows[torch.arange(settings.batch) % len(windows)].to(device)
    state.optimizer.zero_grad(set_to_none=True)
    state.model.train()

    tokens, targets = batch[:, :-1], batch[:, 1:]
    losses: dict[str, Callable[[], Tensor]] = {
        "fused": lambda: state.model(tokens, targets),
        "logits": lambda: state.model(tokens, targets, logits=True)[0],
        "plain": lambda: eager_lm(tokens, targets, state.model),
    }

    def run(name: str) -> None:
        with low_precision(device):
            loss = losses[name]()
        loss.backward()
        state.optimizer.zero_grad(set_to_none=True)

    return {name: memory.peak_bytes(partial(run, name), device) for name in losses}


def fresh_state(settings: Settings, corpus: data.Corpus, ranks: Ranks) -> State:
    torch.manual_seed(settings.seed)
    model = build_lm(settings.model).to(ranks.device)
    trained = ranks.spread(model)
    if ranks.row_ranks > 1:  # other rows, other dropout
        torch.manual_seed(settings.seed + 1 + ranks.row_rank)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
    batches = data.Batches(corpus.train, settings.batch, settings.context, settings.seed)
    losses = torch.full((settings.steps,), math.nan, device=ranks.device)
    return State(model, trained, ranks, optimizer, batches, losses)


def prepare(checkpoint: Path, resumed: Path | None) -> None:
    """Make the output folder; another run's checkpoint there is kept under another name."""
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if checkpoint.exists() and not (resumed and checkpoint.samefile(resumed)):
            checkpoint.replace(checkpoint.with_name("previous.safetensors"))
    except OSError as error:
        raise BadInput(f"cannot write to --out {checkpoint.parent}: {error.strerror}") from None


def train(
    state: State,
    settings: Settings,
    windows: Tensor,
    args: Namespace,
    checkpoint: Path,
    stops: list[int],
) -> tuple[float, bool]:
    """Train to the last step or to a stop request.

    Returns the seconds spent in training steps, and whether a stop was asked for.
    """
    device = state.losses.device
    seconds, stopped = 0.0, bool(stops)
    with tqdm(
        total=settings.steps, initial=state.step, unit="step", disable=not state.ranks.first
    ) as bar:
        while state.step < settings.steps and not stopped:
            began = time.perf_counter()
            loss, stopped = state.ranks.agree(train_step(state, settings, device), bool(stops))
            state.losses[state.step] = loss
            state.step += 1
            if state.step % BAR_EVERY == 0 or state.step == settings.steps:
                bar.set_postfix(loss=f"{state.losses[state.step - 1].item():.3f}", refresh=False)
            seconds += time.perf_counter() - began
            bar.update()
            if state.step % args.eval_every == 0 and state.step < settings.steps:
                state.evals.append((state.step, evaluate(state.model, windows, device)))
            if state.step % args.save_every == 0:
                save(checkpoint, state, settings)
    return seconds, stopped


def train_step(state: State, settings: Settings, device: torch.device) -> Tensor:
    """One optimizer step over `accumulate` batches; returns the mean loss of this rank's rows."""
    state.model.train()
    for group in state.optimizer.param_groups:
        group["lr"] = settings.lr * schedule(state.step, settings)
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    for _ in range(settings.accumulate):
        drawn = (state.ranks.rows(part) for part in state.batches.next())
        tokens, targets = (part.to(device, non_blocking=True) for part in drawn)
        with low_precision(device):
            loss = state.trained(tokens, targets) / settings.accumulate
        loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(state.model.parameters(), settings.clip)
    state.optimizer.step()
    return total


def schedule(step: int, settings: Settings) -> float:
    """The share of the learning rate: linear warm-up, then half a cosine down to `final_lr`."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, device: torch.device) -> float:
    """Nats per byte over windows (W, context + 1)."""
    model.eval()
    total = 0.0
    for part in windows.split(EVAL_BATCH):
        part = part.to(device)
        with low_precision(device):
            total += model(part[:, :-1], part[:, 1:]).item() * len(part)
    return total / len(windows)


@torch.no_grad()
def sample(model: nn.Module, prompt: Tensor, settings: Settings) -> str:
    """The prompt and SAMPLE_BYTES that the model makes of it."""
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(settings.seed)
    tokens = prompt.long().to(device)[None, -settings.context :]
    for _ in range(SAMPLE_BYTES):
        with low_precision(device):
            logits = model(tokens[:, -settings.context :])[:, -1, : data.VOCAB_SIZE]
        chances = (logits.float() / TEMPERATURE).softmax(dim=-1)
        tokens = torch.cat([tokens, chances.multinomial(1, generator=generator)], dim=1)
    return bytes(tokens[0].tolist()).decode("utf-8", errors="replace")


def low_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Signals that ask to stop, in a list that fills; the second interrupt stops at once."""
    stops: list[int] = []

    def ask(number: int, _: object) -> None:
        stops.append(number)
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return {"trilith": trilith.__version__, **found}


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    sys.exit(main())
