"""Text from a checkpoint: `python sample.py --checkpoint out/small --prompt "def "`. Read `model.GPT.generate` for how.

The text streams to standard output as it comes; what it cost (tokens per second, bytes of the cache) goes to standard
error.
"""

from options import choose_device, fail, option, parse_options, run_program

import codecs
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import find_checkpoint, load_checkpoint, starts_bare
from data.tokenizer import encoding_of, load_tokenizer
from functional import PATHS, set_kernel


@dataclass
class Options:
    checkpoint: str = option("out/small", "run folder, a checkpoint file in one, a Hugging Face folder or hub name")
    prompt: str = option("", "text to go on from (default: the start of a document)", expand=False)
    prompt_file: str = option("", "read the prompt from this file; - is standard input")
    num_samples: int = option(1, "continuations to write", least=1)
    max_new_tokens: int = option(200, "tokens of each", least=0)
    temperature: float = option(0.8, "0 takes the likeliest token every time", least=0)
    top_k: int | None = option(50, "draw among this many of the likeliest tokens; 0 for all", least=0)
    top_p: float | None = option(None, "draw among the fewest tokens whose probabilities reach this", above=0, most=1)
    seed: int = option(0, "of the first sample; the next one takes the next number", least=0)
    no_cache: bool = option(False, "compute every token from its whole context: slow, the same at temperature 0")
    kernel: str = option("auto", "path of the attention (see functional.py)", PATHS)
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the best there is")
    threads: int = option(0, "CPU threads (0: as many as cores)", least=0, most=1024)


def read_prompt(o):
    if o.prompt and o.prompt_file:
        raise ValueError("prompt and prompt_file are both given: leave one out")
    if not o.prompt_file:
        return o.prompt
    if o.prompt_file == "-" and sys.stdin is None:
        raise ValueError("prompt_file is - and standard input is closed")
    raw = sys.stdin.buffer.read() if o.prompt_file == "-" else Path(o.prompt_file).read_bytes()
    return raw.decode(encoding_of(raw), errors="replace")


def open_model(path, device):
    """(model in eval mode, tokenizer, ids that begin every text, ids that end one). Raises ValueError or OSError."""
    model, state = load_checkpoint(path, device)
    tokenizer = load_tokenizer(find_checkpoint(path).parent)
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens and the model {model.config.vocab_size}"
        raise ValueError(f"the tokenizer beside {path} has {sizes}")
    start = () if starts_bare(state) else tokenizer.start_of_text
    silent = range(tokenizer.vocab_size, model.config.vocab_size)  # published models have rows that spell nothing
    return model, tokenizer, start, {*tokenizer.end_tokens, *silent}


class TextStream:
    """The text that each new token adds: all of it but a character that is not complete.

    A token may end inside a character, and SentencePiece spells a space, or a byte, by what stands before.
    """

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.tokens, self.held = tokenizer, list(prompt), 0
        self.forget()

    def forget(self):
        """Keep a few tokens as context, from the start of a character: decoding all would take quadratic time."""
        for count in range(8, 12):
            if not self.tokenizer.decode(self.tokens[-count:]).startswith("\ufffd"):
                break
        self.tokens = self.tokens[-count:]
        self.shown = len(self.complete())

    def complete(self):
        """The text of the tokens up to a character that is not complete; other bytes that are no UTF-8 are U+FFFD."""
        return codecs.utf_8_decode(self.tokenizer.decode_bytes(self.tokens), "replace", False)[0]

    def add(self, token):
        self.tokens.append(token)
        text = self.complete()
        # SentencePiece gives U+FFFD for the bytes of a character that is not complete, three at most
        self.held = self.held + 1 if text.endswith("\ufffd") and not self.tokenizer.byte_level else 0
        if 0 < self.held < 4:
            return ""
        new, self.shown = text[self.shown :], len(text)
        if len(self.tokens) > 64:
            self.forget()
        return new

    def rest(self):
        return self.tokenizer.decode(self.tokens)[self.shown :]


def write(text):
    """To standard output at once; nowhere if that is closed."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk
        fail(f"standard output: {error}")


def main(argv=None):
    o, _ = parse_options(Options, argv)
    try:
        set_kernel(o.kernel)
        prompt = read_prompt(o)
        model, tokenizer, start, stop = open_model(o.checkpoint, choose_device(o.device))
    except (ValueError, OSError) as error:
        fail(error)
    if o.threads:
        torch.set_num_threads(o.threads)
    tokens = [*start, *tokenizer.encode(prompt)] or [tokenizer.end_of_text]
    how = dict(temperature=o.temperature, top_k=o.top_k or None, top_p=o.top_p, stop_tokens=stop, keep=len(start))
    how["use_cache"] = not o.no_cache
    count, began = 0, time.monotonic()
    for sample in range(o.num_samples):
        write(prompt)
        text = TextStream(tokenizer, tokens)

        def show(_, token):
            write(text.add(token))

        try:
            new = model.generate([tokens], o.max_new_tokens, **how, seed=o.seed + sample, on_token=show)
        except ValueError as error:  # logits that are not finite, or a path that this machine has not
            fail(error)
        count += len(new[0])
        last = sample + 1 == o.num_samples
        write(text.rest() + ("\n" if last else "\n\n" + "-" * 80 + "\n"))
    seconds = max(time.monotonic() - began, 1e-9)
    positions = min(model.config.block_size, len(tokens) + o.max_new_tokens)
    size = model.config.kv_bytes_per_token()
    cache = "no cache" if o.no_cache else f"cache {size * positions:,} bytes ({size:,} a token, {positions} positions)"
    print(f"{count} tokens, {count / seconds:,.1f} tokens/s, {cache}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
