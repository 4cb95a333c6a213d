"""Continue a text with the model that `make train` made, and say how fast, with and without cache.

python -m examples.generate [--prompt TEXT] [--checkpoint PATH] [--tokens N] [--temperature T]
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file too
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import torch
    from safetensors import SafetensorError, safe_open

    from examples.lm import BadInput
    from trilith.blocks import LMConfig, TransformerLM, build_lm
except ModuleNotFoundError as error:
    print(
        f"generate: {error.name} is missing; install it: pip install -e '.[examples]'",
        file=sys.stderr,
    )
    sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    try:
        return run(argv)
    except (BadInput, ValueError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(argv: list[str] | None) -> int:
    args = parse(argv)
    model = load(args.checkpoint).to(args.device)
    prompt = torch.tensor(list(args.prompt.encode()), device=args.device)
    speeds = {}
    for name, use_cache in (("with cache", True), ("without cache", False)):
        speeds[name] = show(model, prompt, args, use_cache, silent=not use_cache)
    print("\n" + ", ".join(f"{name}: {speed:.1f} tokens/s" for name, speed in speeds.items()))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("runs/train_lm/checkpoint.safetensors"))
    add("--prompt", default="def ", help="text to continue")
    add("--tokens", type=int, help="how many; as many as the model's context allows")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.tokens is not None and args.tokens < 1:
        raise BadInput(f"--tokens must be positive, got {args.tokens}")
    if not args.prompt:
        raise BadInput("--prompt is empty; give at least one character")
    try:
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:
        raise BadInput(f"--device {args.device}: {error}".partition("\n")[0]) from None
    return args


def load(path: Path) -> TransformerLM:
    """The model of a checkpoint that train_lm wrote."""
    if not path.is_file():
        raise BadInput(f"no checkpoint at {path}; run `make train` first, or give --checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["run"])
            names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
            weights = {name.removeprefix("model."): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise BadInput(f"cannot read checkpoint {path}: {error}") from None
    fields = {field.name for field in dataclasses.fields(LMConfig)}
    settings = {name: value for name, value in about["settings"].items() if name in fields}
    model = build_lm(LMConfig(**settings))
    model.load_state_dict(weights)
    return model.eval()


def show(
    model: TransformerLM,
    prompt: torch.Tensor,
    args: argparse.Namespace,
    use_cache: bool,
    silent: bool,
) -> float:
    """Print the text as it comes; returns tokens per second."""
    context = min(m.max_len for m in model.modules() if hasattr(m, "acts_on"))
    count = args.tokens or context + 1 - len(prompt)
    if count < 1:
        raise BadInput(f"--prompt has {len(prompt)} bytes, and the model's context is {context}")
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    generator = torch.Generator(args.device).manual_seed(args.seed)
    stream = model.generate_stream(
        prompt[None], count, use_cache=use_cache, generator=generator, **options
    )
    model.generate(prompt[None], min(2, count), use_cache=use_cache)  # what a first call costs more
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    if not silent:
        print(args.prompt, end="", flush=True)
    began = time.perf_counter()
    for tokens in stream:
        text = decoder.decode(bytes([int(tokens) % 256]))
        if not silent:
            print(text, end="", flush=True)
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
