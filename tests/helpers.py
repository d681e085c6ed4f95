"""What several test files share: command lines, refusals, models whose parameters all matter, tokenizers."""

import pytest
import torch

from model import GPT, GPTConfig

SHAPE = dict(vocab_size=37, block_size=24, n_layer=2, n_head=4, n_embd=24)
THEIRS = dict(vocab_size=41, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
THEIRS |= dict(num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, rms_norm_eps=1e-5)
THEIRS |= dict(bos_token_id=None, eos_token_id=None)
SPELLED = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581un", "\u2581noir"]


def arguments(*options):
    """The words of a command line; an option may be given as text with its value, a path or a number."""
    return " ".join(map(str, options)).split()


def refused(capsys, main, *options, silent=True):
    """The one line, but for notes, that a program ends with, exit code 2; `silent`: it has said nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments(*options))
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.startswith("note: ")]
    assert stopped.value.code == 2 and not (silent and said.out)
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def raises(words, function, /, *given, **named):
    """The function refuses what it is given in these words (a pattern), by an error that the programs catch."""
    with pytest.raises((ValueError, OSError), match=words):
        function(*given, **named)


def mistakes(table):
    """A test of what is `given` and `why` it is refused, for each line `given => why` of a table."""
    return pytest.mark.parametrize("given, why", [line.split(" => ") for line in table.strip().splitlines()])


def tokens(*shape, seed=1):
    return torch.randint(37, shape, generator=torch.Generator().manual_seed(seed))


def randomized(model, std=0.2):
    """The model with every parameter random, so that compositions, mixes, gains and biases all matter."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=std)
    return model


def make(seed=0, std=0.2, **fields):
    torch.manual_seed(seed)
    return randomized(GPT(GPTConfig(**{**SHAPE, **fields})).eval(), std)


def theirs(name="Llama", **fields):
    """A small model of `transformers`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**THEIRS, **fields})
    return randomized(getattr(transformers, f"{name}ForCausalLM")(config).eval())


def save_sentencepiece(folder, words, added=(), start=None):
    """A tokenizer.json that spells unknown bytes <0x..>, and a space by the word behind it; `start` begins a text."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary, d = {word: i for i, word in enumerate(words)}, tokenizers.decoders
    how = dict(byte_fallback=True, ignore_merges=True, unk_token="<unk>" if "<unk>" in words else None)
    t = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], **how))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    t.decoder = d.Sequence([d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    t.add_tokens([*added])
    if start:
        t.add_special_tokens([start, "</s>"])
        t.post_processor = tokenizers.processors.TemplateProcessing(f"{start} $A", special_tokens=[(start, 0)])
    t.save(str(folder / "tokenizer.json"))


def save_byte_level_bpe(folder, texts, vocab_size, special_tokens):
    """A tokenizer.json in the manner of GPT-2's, learned from texts."""
    tokenizers = pytest.importorskip("tokenizers")
    t, byte_level = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    t.pre_tokenizer, t.decoder = byte_level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    how = dict(vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False)
    trainer = tokenizers.trainers.BpeTrainer(**how, initial_alphabet=byte_level.alphabet())
    t.train_from_iterator(texts, trainer)
    t.save(str(folder / "tokenizer.json"))
