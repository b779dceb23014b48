"""Text to tokens and back: from a GGUF file's metadata, a Hugging Face folder, or raw bytes for random models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from errors import UsageError
from weights import Gguf, HuggingFace, Random, Source


class Tokenizer(Protocol):
    """What the decoder needs of a tokenizer."""

    stop: frozenset[int]  # tokens that end a text

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, text: str) -> list[int]:
        """A conversation of one user message, ready for the assistant's answer."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens give no text; bytes that are no complete character give U+FFFD."""
        ...


def open_tokenizer(source: Source) -> Tokenizer:
    if isinstance(source, Gguf):
        return gguf_tokenizer(source)
    if isinstance(source, HuggingFace):
        return folder_tokenizer(source.path)
    assert isinstance(source, Random)
    return ByteTokenizer()


class BpeTokenizer:
    """A `tokenizers.Tokenizer` with its chat template and stop tokens."""

    def __init__(
        self, tokenizer: Any, stop: frozenset[int], begin: str, end: str, template: str | None, prepend: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.begin = begin
        self.end = end
        self.template = template
        self.prepend = [tokenizer.token_to_id(begin)] if prepend else []

    def encode(self, text: str) -> list[int]:
        return [*self.prepend, *self.tokenizer.encode(text).ids]

    def encode_chat(self, text: str) -> list[int]:
        if self.template is None:
            raise UsageError("--chat: this model brings no chat template; leave --chat out to continue plain text")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        # A template comes with the weights, from strangers: sandboxed, and with what Hugging Face gives it.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        messages = [{"role": "user", "content": text}]
        try:
            prompt = environment.from_string(self.template).render(
                messages=messages, add_generation_prompt=True, bos_token=self.begin, eos_token=self.end
            )
        except TemplateError as error:
            raise UsageError(f"--chat: the model's chat template failed: {error}") from error
        return list(self.tokenizer.encode(prompt, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


class ByteTokenizer:
    """For random models, which have no text: a prompt's bytes are its tokens, and tokens are shown as numbers."""

    stop: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, text: str) -> list[int]:
        raise UsageError("--chat: a random model has no chat template; leave --chat out")

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(f" {token}" for token in tokens)


def gguf_tokenizer(source: Gguf) -> BpeTokenizer:
    """Byte-level BPE as a GGUF file describes it: tokens, their types, merges, and the pre-tokenizer by name."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known = {
        "gpt-2": byte_level,
        # Digits one by one, then GPT-2's regular expression (llama.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM).
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    kind = (source.field("tokenizer.ggml.model"), source.field("tokenizer.ggml.pre", "absent"))
    if kind[0] != "gpt2" or kind[1] not in known:
        raise UsageError(
            f"{source.path}: tokenizer {kind[0]!r} with pre-tokenizer {kind[1]!r} is not read from GGUF "
            f"(known: gpt2 with {', '.join(known)}); use the model's Hugging Face folder"
        )
    tokens: list[str] = source.field("tokenizer.ggml.tokens")
    types: list[int] = source.field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in source.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = known[kind[1]]
    tokenizer.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4  # gguf.TokenType
    special = [
        AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == control
    ]
    tokenizer.add_special_tokens(special)
    plain = [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == user_defined]
    tokenizer.add_tokens(plain)
    end = source.field("tokenizer.ggml.eos_token_id")
    begin = source.field("tokenizer.ggml.bos_token_id", end)
    end_of_turn = source.field("tokenizer.ggml.eot_token_id", end)
    template = source.field("tokenizer.chat_template", "") or None
    prepend = source.field("tokenizer.ggml.add_bos_token", False)
    return BpeTokenizer(tokenizer, frozenset((end, end_of_turn)), tokens[begin], tokens[end], template, prepend)


def folder_tokenizer(path: Path) -> BpeTokenizer:
    """tokenizer.json of a Hugging Face folder, with what config.json and tokenizer_config.json say about it."""
    from tokenizers import Tokenizer

    if not (path / "tokenizer.json").is_file():
        raise UsageError(f"{path} has no tokenizer.json: download it with the model (older formats are not read)")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    settings = read_json(path / "tokenizer_config.json")
    ends = read_json(path / "generation_config.json").get("eos_token_id") or read_json(path / "config.json").get(
        "eos_token_id"
    )
    stop = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    template = settings.get("chat_template")
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text()
    begin, end = (special_token(settings.get(key)) for key in ("bos_token", "eos_token"))
    # tokenizer.json's own post-processor adds the first token where the model wants one.
    return BpeTokenizer(tokenizer, stop, begin, end, template, prepend=False)


def read_json(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return fields


def special_token(value: Any) -> str:
    """tokenizer_config.json writes a special token as text or as an object with the text in it."""
    return str(value["content"] if isinstance(value, dict) else value or "")


class TextStream:
    """Tokens in, text out, never half a character.

    A token may end inside a character of several bytes, and its text may depend on the token before it. So text is the
    difference between decoding with and without the new tokens, held back while it ends in an incomplete character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.tokens = list(prompt[-4:])  # context enough for decoders that look back one token
        self.start = 0
        self.printed = len(self.tokens)  # tokens whose text has been given out

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self.tokens.append(token)
        text = self.pending()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.start, self.printed = self.printed, len(self.tokens)
        return text

    def finish(self) -> str:
        """What is left when no more tokens come; an incomplete character as U+FFFD."""
        return self.pending()

    def pending(self) -> str:
        before = self.tokenizer.decode(self.tokens[self.start : self.printed])
        return self.tokenizer.decode(self.tokens[self.start :])[len(before) :]
