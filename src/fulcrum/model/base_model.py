"""The base model and its tokenizer; device, dtype and attention are resolved once, at load.

Probes find what the model allows; `LoadedModel.facts` says it, and from there the run's files. The
base model is never loaded twice and never changed: adapters are put on it and taken off
(`adapter`).
"""

import ctypes
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from fulcrum.config.sections import TrainSettings
from fulcrum.config.settings import Settings
from fulcrum.core.errors import ModelError
from fulcrum.core.store import file_sha256, fingerprint
from fulcrum.data import encode
from fulcrum.model import attention, distributed, download, packing

# oneDNN keeps the kernels of the last 1,024 shapes; rows and answers of ever new lengths made that
# 3 GiB and more. It reads this at its first product. 64 cost no speed
# (results/notes/2026-11-22-speed-and-memory.md).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def _keep_memory() -> None:
    """Let the C library keep freed blocks.

    Every step asks for the same ones again, and new pages cost up to a fifth of its time. glibc
    returns blocks of some MiB at once unless told otherwise; other systems' libraries are left as
    they are.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return
    # Before 2.35 it takes no more than 32 MiB. If it takes neither, setting the other alone would
    # make things worse.
    if mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25):
        mallopt(_M_TRIM_THRESHOLD, 2**29)


_keep_memory()


@dataclass
class LoadedModel:
    """A causal language model, ready to train adapters on.

    `dropouts` and `recomputes` are needed at every step, where a walk over thousands of modules
    would take 10 ms and more.
    """

    name: str  # as the user wrote it
    path: str  # a folder or a hub id
    causal: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype  # of matrix products
    context: int | None  # longest row in tokens; None if the architecture has no limit
    parameters: int
    packed: bool = False  # a row may hold several examples, else one
    shares: bool = False  # common prefixes of a row's examples may be computed once
    split_head: bool = False  # the output head can be applied to chosen positions only
    peft: Any = None  # PEFT's model around `causal`, if there is an adapter
    facts: tuple[str, ...] = ()
    # Layers that train compiled, with their compiled calls (`training.compile`):
    compiled: list[tuple[nn.Module, Any]] = field(default_factory=list)
    dropouts: list[nn.Module] = field(default_factory=list)  # the adapter's
    recomputes: bool = False  # layers recompute their activations

    @property
    def sharded(self) -> bool:
        """Return whether its layers are spread over processes (FSDP), which run it together."""
        return isinstance(self.body, FSDPModule)

    @property
    def flash(self) -> bool:
        """Return whether rows go to a GPU's variable-length kernel."""
        return self.device.type == "cuda" and self.packed

    @property
    def body(self) -> nn.Module:
        """Return the model below its output head: ids -> hidden states."""
        return cast(nn.Module, getattr(self.causal, self.causal.base_model_prefix))

    def fingerprint(self) -> str:
        """Return a SHA-256 over the model's files and, for a hub model, its commit."""
        folder = Path(self.path)
        files = []
        if folder.is_dir():
            files = sorted(file for file in folder.iterdir() if file.is_file())
        commit = getattr(self.causal.config, "_commit_hash", None)
        return fingerprint([commit, [(file.name, file_sha256(file)) for file in files]])

    def precision(self) -> torch.autocast:
        """Inside, matrix products run in the resolved dtype; adapters, optimizer stay in fp32."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits (n, vocabulary) of hidden states (n, d).

        The model's own bias, scale and soft-cap are applied.
        """
        logits: Tensor = self.causal.get_output_embeddings()(hidden)
        config = self.causal.config
        scale = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        cap = getattr(config, "final_logit_softcapping", None)
        if scale is not None:
            logits = logits * scale
        if divisor is not None:
            logits = logits / divisor
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits


def load_for(settings: Settings, train: TrainSettings | None = None) -> LoadedModel:
    """Load the model of a run; `train` replaces its training settings. Raises as `load` does."""
    return load(
        settings.model,
        train or settings.train,
        template=settings.template,
        trust_remote_code=settings.trust_remote_code,
    )


def load(
    name: str,
    settings: TrainSettings,
    *,
    template: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model by hub id, folder, .gguf file or built-in name, and probe what it allows.

    `template` names a chat template and its arguments, as the settings do. Raises ModelError if the
    name is unknown, the weights are not safe to load, or the model cannot be run.
    """
    path = download.prepare(name)
    device = _device(settings.device)
    dtype = distributed.agreed(_dtype(settings.dtype, device))
    sharded = distributed.wants_shards()
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
    }
    if sharded and settings.load_in_4bit:
        raise ModelError(
            "train.load_in_4bit: 4-bit weights are not spread over processes (FSDP); ask for one "
            "of the two"
        )
    if settings.load_in_4bit:
        options["quantization_config"] = _four_bit(device)
    with download.explained(name):
        tokenizer = download.tokenizer(path, trust_remote_code=trust_remote_code)
        causal, info = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, **options
        )
    _refuse_missing(name, sorted(info["missing_keys"]))
    if sharded:  # layer by layer, so that no device ever holds them all
        distributed.spread(getattr(causal, causal.base_model_prefix), device)
    if not settings.load_in_4bit:  # bitsandbytes has put its weights where they belong
        causal = causal.to(device)
    return adopt(name, path, causal, tokenizer, dtype, template)


def _refuse_missing(name: str, missing: Sequence[str]) -> None:
    """Raise ModelError if files lack weights, which Transformers would draw at random."""
    if missing:
        more = " ..." if len(missing) > 3 else ""
        raise ModelError(
            f"model {name!r}: its files lack {len(missing)} of the weights "
            f"({', '.join(missing[:3])}{more}), which would be random numbers; fetch or save the "
            "whole model again"
        )


def adopt(
    name: str,
    path: str,
    causal: Any,
    tokenizer: Any,
    dtype: torch.dtype,
    template: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Take a model and tokenizer that are in memory already: freeze, complete and probe them."""
    causal.requires_grad_(False)
    causal.eval()
    _drop_dropout(causal)
    head = causal.get_output_embeddings()
    if head is not None:
        # For a slice of the hidden states (the last position of each prompt) PyTorch copies the
        # head's weights once a row: 3.2 GiB for 60 prompts of SmolLM2, 19 GiB for Gemma.
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    facts = [f"matrix products in {str(dtype).removeprefix('torch.')}"]
    facts += download.complete(tokenizer, template or {})
    download.check_ids(name, tokenizer, causal.get_input_embeddings().weight.shape[0])
    _add_ends(causal, encode.make_format(tokenizer, None).end_ids)
    loaded = LoadedModel(
        name=name,
        path=path,
        causal=causal,
        tokenizer=tokenizer,
        device=next(causal.parameters()).device,
        dtype=dtype,
        context=download.context(causal.config),
        parameters=causal.num_parameters(),
    )
    with torch.no_grad():
        why = _probe_packing(loaded)
        loaded.split_head = _probe_head(loaded)
    if loaded.packed:
        facts.append("examples are packed into rows")
    else:
        facts.append(f"one example per row: {why}")
    if loaded.shares:
        facts.append("common prefixes are computed once")
    if loaded.sharded:
        facts.append(f"layers are spread over {distributed.processes().num_processes} processes")
    if not loaded.split_head:
        facts.append("the output head runs at every position (its own form is not known)")
    loaded.facts = tuple(facts)
    return loaded


def generation_attention(loaded: LoadedModel) -> str:
    """Switch to the stock attention for generation (padded batches, key/value cache).

    Returns the name of the attention to switch back to.
    """
    causal = loaded.causal
    training = str(causal.config._attn_implementation)
    if loaded.packed:
        cap = getattr(causal.config.get_text_config(), "attn_logit_softcapping", None)
        causal.set_attn_implementation("sdpa" if cap is None else "eager")
    return training


def _add_ends(causal: Any, ends: Sequence[int]) -> None:
    """Let the saved model stop where its chat template ends an answer: not every model's does."""
    config = causal.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    missing = [token for token in ends if token not in known]
    if missing:
        config.eos_token_id = [*(token for token in known if token is not None), *missing]


def _drop_dropout(causal: nn.Module) -> None:
    """Set all dropout of the frozen base to 0.

    A layer that recomputes its activations is flagged as training, and would draw it otherwise.
    """
    for module in causal.modules():
        for name, value in list(vars(module).items()):
            if ("dropout" in name or "layerdrop" in name) and isinstance(value, float):
                setattr(module, name, 0.0)


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "device 'cuda' was asked for and PyTorch sees no GPU; set train.device to auto or cpu"
        )
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ModelError(
            "device 'mps' was asked for and PyTorch sees no Apple GPU; set train.device to auto or "
            "cpu"
        )
    return torch.device(wanted)


def _dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Resolve `auto`: bf16 if it makes a small model's matrix product 1.3 times as fast."""
    if wanted != "auto":
        return cast(torch.dtype, getattr(torch, wanted))
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if _is_bf16_faster() else torch.float32


def _is_bf16_faster() -> bool:
    """Return whether a small model's matrix product is 1.3 times as fast in bf16.

    Processors without bf16 take a second for one such product, so a small one is tried first.
    """
    seconds = _product_seconds(16, rounds=3)
    if seconds[torch.bfloat16] > 4 * seconds[torch.float32]:
        return False
    seconds = _product_seconds(512, rounds=25)
    return seconds[torch.bfloat16] * 1.3 < seconds[torch.float32]


def _product_seconds(rows: int, rounds: int) -> dict[torch.dtype, float]:
    """Return the best of some timings of a product (rows, 576) x (576, 1536), by dtype.

    They take turns, so that other work on the machine does not decide.
    """
    factors = {}
    for dtype in (torch.float32, torch.bfloat16):
        factors[dtype] = torch.ones(rows, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    best = dict.fromkeys(factors, math.inf)
    for _ in range(rounds):
        for dtype, (a, b) in factors.items():
            start = time.perf_counter()
            torch.mm(a, b)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best


def _four_bit(device: torch.device) -> Any:
    if device.type != "cuda":
        raise ModelError(
            "train.load_in_4bit needs a GPU (bitsandbytes); set it to false on this machine"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


PROBE_TEXTS = (
    "The river rises in the hills and runs west to the sea.",
    "Please send the report before noon, so that we can read it on the train.",
    "A small shop sells bread, milk and newspapers to the people of the village, every day.",
    "They come before work, and the talk is of the weather.",
    "Some stay for a coffee until the bus comes.",
)


def probe_ids(loaded: LoadedModel, text: str, *, special: bool = False) -> Tensor:
    """Return the first tokens of a text: (1, at most 12).

    With `special`, they begin as the tokenizer begins a text; some models are lost without that.
    """
    encoded = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=special)
    ids: Tensor = encoded["input_ids"]
    return ids[:, :12].to(loaded.device)


def probe_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the nats of each token but the first, by logits (1, tokens, vocabulary)."""
    return functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")


def allowed_distance(
    loaded: LoadedModel, examples: Sequence[Tensor], stock: Sequence[Tensor]
) -> float:
    """Return how far from the stock attention another may be on some examples, in nats a token.

    bf16 keeps 8 bits, and sums run in other orders: twice the distance of two of the model's own
    attentions, within bounds.
    """
    if loaded.dtype != torch.bfloat16:
        return 1e-3
    return min(max(0.1, 2 * _rounding(loaded, examples, stock)), 0.3)


def _rounding(loaded: LoadedModel, examples: Sequence[Tensor], stock: Sequence[Tensor]) -> float:
    """Return the mean distance between the stock attention and the plainest one, in nats a token.

    0 if the model has no plain one.
    """
    causal = loaded.causal
    name = causal.config._attn_implementation
    try:
        causal.set_attn_implementation("eager")
        plain = [probe_losses(causal(input_ids=ids).logits, ids) for ids in examples]
    except Exception:  # whatever the model's own code raises
        return 0.0
    finally:
        causal.set_attn_implementation(name)
    distance = _mean_distance(plain, stock)
    return distance if math.isfinite(distance) else 0.0


def _mean_distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float((torch.cat(list(one)) - torch.cat(list(other))).abs().mean())


def declares_window(config: Any) -> bool:
    """Return whether some layer sees a window or chunk only.

    A probe's few words cannot tell, because windows are longer.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds:
        return bool(kinds & {"sliding_attention", "chunked_attention"})
    is_used = getattr(config, "use_sliding_window", True)
    return bool(getattr(config, "sliding_window", None)) and is_used


def _probe_packing(loaded: LoadedModel) -> str:
    """Switch packed attention on if a packed row computes what its examples are alone.

    Returns why not, or "". It is tried with the examples' common prefix in the row once, and, if
    that fails, or on a GPU, whose kernel cannot do that, with every example whole.
    """
    causal = loaded.causal
    stock = causal.config._attn_implementation
    gpu = loaded.device.type == "cuda"
    first, other, head = (probe_ids(loaded, text, special=True) for text in PROBE_TEXTS[:3])
    pair = [torch.cat([head, probe_ids(loaded, text)], dim=1) for text in PROBE_TEXTS[3:]]
    alone = [probe_losses(causal(input_ids=ids).logits, ids) for ids in (first, *pair)]
    allowed = allowed_distance(loaded, (first, *pair), alone)
    why = ""
    for shares in (False,) if gpu else (True, False):
        try:
            causal.set_attn_implementation("flash_attention_2" if gpu else attention.NAME)
            logits, windows = _probe_logits(loaded, [first, *pair], shares)
            moved, _ = _probe_logits(loaded, [other, *pair], shares)
        except Exception as error:  # of the model's code; it still runs one example at a time
            lines = str(error).splitlines() or [""]
            why = f"{type(error).__name__}: {lines[0][:120]}"
            continue
        if not gpu and declares_window(causal.config.get_text_config()) and windows == {None}:
            why = "its sliding window or chunked attention does not reach the packed attention"
            continue
        # Two checks. Another first example must not move the others' logits: models that mix
        # neighbours by convolutions or state spaces fail here. And the nats of every token must be
        # those of the stock attention on single examples.
        pairs = zip(logits[1:], moved[1:], strict=True)
        leak = max(float((a - b).abs().max()) for a, b in pairs)
        together = []
        for part, ids in zip(logits, (first, *pair), strict=True):
            together.append(probe_losses(part, ids))
        distance = _mean_distance(together, alone)
        if leak <= 1e-4 * float(logits[1].float().std()) and distance <= allowed:
            loaded.packed = True
            loaded.shares = shares
            return ""
        why = (
            f"packed examples differ from single ones (leak {leak:.2g}, {distance:.2g} nats a "
            f"token, allowed {allowed:g})"
        )
    causal.set_attn_implementation(stock)
    return why


def _probe_logits(
    loaded: LoadedModel, examples: Sequence[Tensor], shares: bool
) -> tuple[list[Tensor], set[int | None]]:
    """Return the logits (1, tokens, vocabulary) of each example, computed in one row.

    The windows that layers asked for come second.
    """
    ids = [example[0].cpu().numpy() for example in examples]
    forest = [packing.single(k, len(each)) for k, each in enumerate(ids)]
    if shares:
        forest = packing.trees(ids, sys.maxsize)
    laid = packing.layout(ids, forest)
    options = attention.keywords(laid.segments, loaded.device.type == "cuda", loaded.device)
    logits = loaded.causal(
        input_ids=torch.as_tensor(laid.ids, dtype=torch.int64, device=loaded.device)[None],
        position_ids=torch.as_tensor(laid.positions, dtype=torch.int64, device=loaded.device)[None],
        use_cache=False,
        **options,
    ).logits
    windows = options["segments"].windows if "segments" in options else set()
    return [logits[:, laid.places[k]] for k in range(len(examples))], windows


def _probe_head(loaded: LoadedModel) -> bool:
    """Return whether `head` on the body's hidden states gives the model's own logits."""
    ids = probe_ids(loaded, PROBE_TEXTS[0])
    try:
        apart = loaded.head(loaded.body(input_ids=ids, use_cache=False)[0])
    except (TypeError, AttributeError, RuntimeError):
        return False
    whole = loaded.causal(input_ids=ids, use_cache=False).logits
    return torch.allclose(apart.float(), whole.float(), rtol=1e-2, atol=1e-2)
