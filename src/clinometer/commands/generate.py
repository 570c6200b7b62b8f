"""`clinometer generate`: streams a continuation of a prompt."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import torch
from rich.console import Console

from clinometer.lm.generate import fit_prompt, generate
from clinometer.messages import InputError, say
from clinometer.messages.folding import tell
from clinometer.training.run.display import printable
from clinometer.training.run.load_run import load_run
from clinometer.training.run.run_tokens import begin_with
from clinometer.training.settings.config import LARGEST_SEED
from clinometer.training.settings.precision import choose_device


def generate_command(
    console: Console,
    run: Path,
    *,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    checkpoint: str,
    device: str,
) -> int:
    """Stream a continuation of the prompt to standard output; notices go to standard error."""
    undecoded = next((i for i, sign in enumerate(prompt) if 0xDC80 <= ord(sign) <= 0xDCFF), None)
    if undecoded is not None:  # how Python hands on a byte of the command line that is not UTF-8
        raise InputError("cli.prompt_bytes", at=undecoded)
    where = choose_device(device)
    trained = load_run(run, checkpoint, where)
    seed = secrets.randbits(32) if seed is None else seed
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError("config.seed", field="--seed", value=seed, largest=LARGEST_SEED)
    ids = trained.tokenizer.encode(prompt) or begin_with(trained.tokenizer, trained.separated, "")
    window, dropped = fit_prompt(torch.tensor([ids], device=where), trained.model.config)
    generator = torch.Generator(device=where).manual_seed(seed)
    continuation = generate(  # before anything is printed: raises for wrong settings
        trained.model,
        window,
        tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        stop_id=trained.tokenizer.end_of_text_id,
    )
    tell(console, say("cli.from_checkpoint", step=trained.step, path=run, seed=seed), "dim")
    if dropped:
        kept = window.shape[-1]
        told = say("cli.prompt_cut", dropped=dropped, kept=kept)
        tell(console, told, "yellow")
    on_terminal = sys.stdout.isatty()
    out = sys.stdout
    stream = trained.tokenizer.decode_stream()

    def write(text: str) -> None:
        out.write(printable(text) if on_terminal else text)
        out.flush()

    write(prompt)
    try:
        for token in continuation:
            if int(token[0]) != trained.tokenizer.end_of_text_id:
                write(stream.push(int(token[0])))
        write(stream.finish())
    finally:
        write("\n")
    return 0
