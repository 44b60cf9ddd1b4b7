"""The base model and its tokenizer; device, dtype and attention are resolved once, at load.

What the probes find is written into `LoadedModel.facts` and from there into the run's files. The base model is never loaded
twice and never changed: adapters are put on it and taken off (`adapter`).
"""

import ctypes
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from fulcrum.config.settings import TrainSettings
from fulcrum.core.errors import ModelError
from fulcrum.core.store import file_sha256, fingerprint
from fulcrum.data import encode
from fulcrum.model import attention, distributed, download, packing

# oneDNN keeps the kernels of the last 1,024 shapes; rows and answers of ever new lengths made that 3 GiB and more. It reads
# this at its first product. 64 cost no speed (LOG.md, 2026-11-22).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def _keep_memory() -> None:
    """Let the C library keep freed blocks: every step asks for the same again, and new pages cost up to a fifth of its time.

    glibc gives blocks of some MiB back at once, unless told otherwise; other systems' libraries are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        # Before 2.35 it takes no more than 32 MiB; where it takes neither, setting the other alone would make things worse.
        if mallopt is not None and (
            mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
        ):
            mallopt(_M_TRIM_THRESHOLD, 2**29)


_keep_memory()


@dataclass
class LoadedModel:
    """A causal language model, ready to train adapters on.

    `packed`: several examples may stand in a row (else one example per row); `shares`: their common prefixes may stand there
    once. `split_head`: the output head can be applied to chosen positions only. `context`: the longest row in tokens, None
    where the architecture has no limit. `compiled`: layers that train compiled, with their compiled calls (`fulcrum.compiled`).
    `dropouts`: the adapter's; `recomputes`: whether layers recompute their activations. Both are asked at every step, where a
    walk over thousands of modules would take 10 ms and more.
    """

    name: str
    path: str
    causal: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    context: int | None
    parameters: int
    packed: bool = False
    shares: bool = False
    split_head: bool = False
    peft: Any = None
    facts: tuple[str, ...] = ()
    compiled: list[tuple[nn.Module, Any]] = field(default_factory=list)
    dropouts: list[nn.Module] = field(default_factory=list)
    recomputes: bool = False

    @property
    def sharded(self) -> bool:
        """Whether its layers are spread over several processes (FSDP), which must then run it at the same times."""
        return isinstance(self.body, FSDPModule)

    @property
    def flash(self) -> bool:
        """Whether rows go to a GPU's variable-length kernel."""
        return self.device.type == "cuda" and self.packed

    @property
    def body(self) -> nn.Module:
        """The model below its output head: ids -> hidden states."""
        return cast(nn.Module, getattr(self.causal, self.causal.base_model_prefix))

    def fingerprint(self) -> str:
        """SHA-256 over the model's files (weights, configuration, tokenizer); of a hub model its commit."""
        folder = Path(self.path)
        files = (
            sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
        )
        revision = getattr(
            self.causal.config, "_commit_hash", None
        )  # what the hub calls these files
        return fingerprint([revision, [(file.name, file_sha256(file)) for file in files]])

    def precision(self) -> torch.autocast:
        """Context in which matrix products run in the resolved dtype while adapters and optimizer stay in fp32."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, d) -> logits (n, vocabulary) with the model's own bias, scale and soft-cap."""
        logits: Tensor = self.causal.get_output_embeddings()(hidden)
        config = self.causal.config
        scale = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        cap = getattr(config, "final_logit_softcapping", None)
        logits = logits * scale if scale is not None else logits
        logits = logits / divisor if divisor is not None else logits
        return torch.tanh(logits / cap) * cap if cap is not None else logits


def load(name: str, settings: TrainSettings, *, trust_remote_code: bool = False) -> LoadedModel:
    """Load a model by hub id, folder, .gguf file or built-in name, and probe what it allows.

    Raises ModelError where the name is unknown, the weights are not safe to load, or the model cannot be run.
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
            "train.load_in_4bit: 4-bit weights are not spread over processes (FSDP); ask for one of the two"
        )
    if settings.load_in_4bit:
        options["quantization_config"] = _four_bit(device)
    with download.explained(name):
        tokenizer = download.tokenizer(path, trust_remote_code=trust_remote_code)
        causal, info = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, **options
        )
    if absent := sorted(
        info["missing_keys"]
    ):  # Transformers draws them at random, and says so where nobody looks
        raise ModelError(
            f"model {name!r}: its files lack {len(absent)} of the weights ({', '.join(absent[:3])}"
            f"{' ...' if absent[3:] else ''}), which would be random numbers; fetch or save the whole model again"
        )
    if sharded:  # layer by layer, so that no device ever holds them all
        distributed.spread(causal, getattr(causal, causal.base_model_prefix), device)
    if not settings.load_in_4bit:  # bitsandbytes has put its weights where they belong
        causal = causal.to(device)
    return adopt(name, path, causal, tokenizer, dtype)


def adopt(name: str, path: str, causal: Any, tokenizer: Any, dtype: torch.dtype) -> LoadedModel:
    """Take a model and tokenizer that are in memory already: freeze, complete the tokenizer, probe."""
    causal.requires_grad_(False)
    causal.eval()
    _drop_dropout(causal)
    head = causal.get_output_embeddings()
    if head is not None:
        # For a slice of the hidden states (the last position of each prompt) PyTorch copies the head's weights once a row:
        # 3.2 GiB for 60 prompts of SmolLM2, 19 GiB for Gemma.
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    facts = [f"matrix products in {str(dtype).removeprefix('torch.')}"]
    facts += download.complete(tokenizer)
    _know_ends(causal, encode.make_format(tokenizer, None).end_ids)
    device = next(causal.parameters()).device
    loaded = LoadedModel(
        name,
        path,
        causal,
        tokenizer,
        device,
        dtype,
        download.context(causal.config),
        causal.num_parameters(),
    )
    with torch.no_grad():
        why = _probe_packing(loaded)
        loaded.split_head = _probe_head(loaded)
    facts.append(
        "examples are packed into rows" if loaded.packed else f"one example per row: {why}"
    )
    if loaded.shares:
        facts.append("common prefixes are computed once")
    if loaded.sharded:
        facts.append(f"layers are spread over {distributed.processes().num_processes} processes")
    if not loaded.split_head:
        facts.append("the output head runs at every position (its own form is not known)")
    loaded.facts = tuple(facts)
    return loaded


def _know_ends(causal: Any, ends: Sequence[int]) -> None:
    """Have whatever is saved of the model stop where its chat template ends an answer: not every model's settings do."""
    config = causal.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    missing = [token for token in ends if token not in known]
    if missing:
        config.eos_token_id = [*(token for token in known if token is not None), *missing]


def _drop_dropout(causal: nn.Module) -> None:
    """The frozen base runs without dropout, also where a layer is told that it trains, so as to recompute its activations."""
    for module in causal.modules():
        for name, value in list(vars(module).items()):
            if ("dropout" in name or "layerdrop" in name) and isinstance(value, float):
                setattr(module, name, 0.0)


def _device(wanted: str) -> torch.device:
    if wanted != "auto":
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ModelError(
                "device 'cuda' was asked for and PyTorch sees no GPU; set train.device to auto or cpu"
            )
        if wanted == "mps" and not torch.backends.mps.is_available():
            raise ModelError(
                "device 'mps' was asked for and PyTorch sees no Apple GPU; set train.device to auto or cpu"
            )
        return torch.device(wanted)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Resolve `auto`: bf16 where a matrix product in a small model's shape is at least 1.3 times as fast as in fp32."""
    if wanted != "auto":
        return cast(torch.dtype, getattr(torch, wanted))
    if device.type != "cpu":
        return torch.bfloat16
    seconds = _product_seconds()
    return (
        torch.bfloat16 if seconds[torch.bfloat16] * 1.3 < seconds[torch.float32] else torch.float32
    )


def _product_seconds() -> dict[torch.dtype, float]:
    """Best of many short timings, taken in turn, so that other work on the machine does not decide."""
    pairs = {
        dtype: (torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(pairs, math.inf)
    for _ in range(25):
        for dtype, (a, b) in pairs.items():
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


def _probe_packing(loaded: LoadedModel) -> str:
    """Switch packed attention on, and off again where a packed row is not what its examples are alone. Returns why, or ''.

    Two checks on plain text: changing the first example must not move the others' logits (models that mix neighbours by
    convolutions or state spaces fail here), and the nats of every token must be those of the stock attention, one by one.
    Done with the others' common prefix standing in the row once; on a GPU, whose kernel cannot, and where that fails, twice.
    """
    causal, stock = loaded.causal, loaded.causal.config._attn_implementation
    gpu = loaded.device.type == "cuda"
    first, other, head = (probe_ids(loaded, text, special=True) for text in PROBE_TEXTS[:3])
    pair = [torch.cat([head, probe_ids(loaded, text)], dim=1) for text in PROBE_TEXTS[3:]]
    alone = [probe_nats(causal(input_ids=ids).logits, ids) for ids in (first, *pair)]
    allowed = allowed_distance(loaded, (first, *pair), alone)
    why = ""
    for shares in (False,) if gpu else (True, False):
        try:
            causal.set_attn_implementation("flash_attention_2" if gpu else attention.NAME)
            (logits, windows), (moved, _) = (
                _probe_logits(loaded, [start, *pair], shares) for start in (first, other)
            )
        except (
            Exception
        ) as error:  # whatever a model's own code raises, it can still be run one example at a time
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            continue
        if not gpu and declares_window(causal.config.get_text_config()) and windows == {None}:
            why = "its sliding window or chunked attention does not reach the packed attention"
            continue
        leak = max(float((a - b).abs().max()) for a, b in zip(logits[1:], moved[1:], strict=True))
        together = [probe_nats(part, ids) for part, ids in zip(logits, (first, *pair), strict=True)]
        distance = float((torch.cat(together) - torch.cat(alone)).abs().mean())
        if leak <= 1e-4 * float(logits[1].float().std()) and distance <= allowed:
            loaded.packed, loaded.shares = True, shares
            return ""
        why = f"packed examples differ from single ones (leak {leak:.2g}, {distance:.2g} nats a token, allowed {allowed:g})"
    causal.set_attn_implementation(stock)
    return why


def declares_window(config: Any) -> bool:
    """Whether some layer sees a window or chunk only. A probe's few words cannot tell: windows are longer."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds:
        return bool(kinds & {"sliding_attention", "chunked_attention"})
    return bool(getattr(config, "sliding_window", None)) and getattr(
        config, "use_sliding_window", True
    )


def _probe_logits(
    loaded: LoadedModel, examples: list[Tensor], shares: bool
) -> tuple[list[Tensor], set[int | None]]:
    """The logits (1, tokens, vocabulary) of each example, computed in one row, and the windows that layers asked for."""
    ids = [example[0].cpu().numpy() for example in examples]
    forest = (
        packing.trees(ids, sys.maxsize)
        if shares
        else [packing.single(k, len(each)) for k, each in enumerate(ids)]
    )
    laid = packing.layout(ids, forest)
    inputs = (
        torch.as_tensor(array, dtype=torch.int64, device=loaded.device)[None]
        for array in (laid.ids, laid.positions)
    )
    options = attention.keywords(laid.segments, loaded.device.type == "cuda", loaded.device)
    logits = loaded.causal(
        **dict(zip(("input_ids", "position_ids"), inputs, strict=True)), use_cache=False, **options
    ).logits
    seen = options["segments"].windows if "segments" in options else set()
    return [logits[:, laid.places[k]] for k in range(len(examples))], seen


def allowed_distance(
    loaded: LoadedModel, examples: Sequence[Tensor], stock: Sequence[Tensor]
) -> float:
    """How far, in nats a token, another way of computing may be from the stock attention's on some examples.

    bf16 keeps 8 bits, and sums run in other orders: as far as two of the model's own ways, twice, within bounds.
    """
    return (
        min(max(0.1, 2 * _rounding(loaded, examples, stock)), 0.3)
        if loaded.dtype == torch.bfloat16
        else 1e-3
    )


def _rounding(loaded: LoadedModel, examples: Sequence[Tensor], stock: Sequence[Tensor]) -> float:
    """Mean distance, in nats a token, between the stock attention and the plainest one of the same model; 0 without that."""
    causal, name = loaded.causal, loaded.causal.config._attn_implementation
    try:
        causal.set_attn_implementation("eager")
        plain = [probe_nats(causal(input_ids=ids).logits, ids) for ids in examples]
    except Exception:  # whatever a model's own code raises: it has no such way
        return 0.0
    finally:
        causal.set_attn_implementation(name)
    distance = float((torch.cat(plain) - torch.cat(list(stock))).abs().mean())
    return distance if math.isfinite(distance) else 0.0


PROBE_TEXTS = (
    "The river rises in the hills and runs west to the sea.",
    "Please send the report before noon, so that we can read it on the train.",
    "A small shop sells bread, milk and newspapers to the people of the village, every day.",
    "They come before work, and the talk is of the weather.",
    "Some stay for a coffee until the bus comes.",
)


def probe_ids(loaded: LoadedModel, text: str, *, special: bool = False) -> Tensor:
    """The first tokens of a text; with `special` as the tokenizer begins a text (some models are lost without that)."""
    ids: Tensor = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=special)[
        "input_ids"
    ]
    return ids[:, :12].to(loaded.device)


def probe_nats(logits: Tensor, ids: Tensor) -> Tensor:
    """Nats of each token but the first, by logits (1, tokens, vocabulary)."""
    return functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")


def _probe_head(loaded: LoadedModel) -> bool:
    """Whether `head` on the body's hidden states gives the model's own logits."""
    ids = probe_ids(loaded, PROBE_TEXTS[0])
    try:
        own = loaded.head(loaded.body(input_ids=ids, use_cache=False)[0])
    except (TypeError, AttributeError, RuntimeError):
        return False
    return torch.allclose(
        own.float(),
        loaded.causal(input_ids=ids, use_cache=False).logits.float(),
        rtol=1e-2,
        atol=1e-2,
    )


def generation_attention(loaded: LoadedModel) -> str:
    """Switch to the stock attention for generation (padded batches, key/value cache); returns the name to switch back to."""
    causal = loaded.causal
    training = str(causal.config._attn_implementation)
    if loaded.packed:
        capped = (
            getattr(causal.config.get_text_config(), "attn_logit_softcapping", None) is not None
        )
        causal.set_attn_implementation("eager" if capped else "sdpa")
    return training
