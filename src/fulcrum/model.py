"""The base model, its tokenizer and its adapters; device, dtype and attention are resolved once, at load.

What the probes find is written into `LoadedModel.facts` and from there into the run's files. Adapters are swapped; the base
model is never loaded twice and never changed.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fulcrum import attention, encode, gguf
from fulcrum.config import TrainSettings
from fulcrum.errors import ModelError

State = dict[str, Tensor]

# PEFT refuses these layers in models whose kernels read the weights directly.
_STATE_SPACE = {"mamba": ["out_proj", "conv1d"], "mamba2": ["out_proj", "conv1d"], "falcon_mamba": ["out_proj", "conv1d"]}
_STATE_SPACE["falcon_h1"] = ["out_proj", "conv1d"]


@dataclass
class LoadedModel:
    """A causal language model, ready to train adapters on.

    `packed`: several examples may share a row (else one example per row). `split_head`: the output head can be applied to
    chosen positions only. `context`: the longest row in tokens, None where the architecture has no limit.
    """

    name: str
    path: str
    causal: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    context: int | None
    packed: bool = False
    split_head: bool = False
    peft: Any = None
    facts: tuple[str, ...] = ()

    @property
    def flash(self) -> bool:
        """Whether rows go to a GPU's variable-length kernel."""
        return self.device.type == "cuda" and self.packed

    @property
    def body(self) -> nn.Module:
        """The model below its output head: ids -> hidden states."""
        return cast(nn.Module, getattr(self.causal, self.causal.base_model_prefix))

    def precision(self) -> torch.autocast:
        """Context in which matrix products run in the resolved dtype while adapters and optimizer stay in fp32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

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


def load(name: str, settings: TrainSettings, *, trust_remote_code: bool = False, quiet: bool = True) -> LoadedModel:
    """Load a model by hub id, folder, .gguf file or built-in name, and probe what it allows.

    Raises ModelError where the name is unknown, the weights are not safe to load, or the model cannot be run.
    """
    path = gguf.prepare(name)
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, device)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    if settings.load_in_4bit:
        options["quantization_config"] = _four_bit(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        causal = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"model {name!r}: cannot load: {str(error).strip().splitlines()[0]}") from error
    return adopt(name, path, causal.to(device), tokenizer, dtype)


def adopt(name: str, path: str, causal: Any, tokenizer: Any, dtype: torch.dtype) -> LoadedModel:
    """Take a model and tokenizer that are in memory already: freeze, complete the tokenizer, probe."""
    causal.requires_grad_(False)
    causal.eval()
    facts = [f"matrix products in {str(dtype).removeprefix('torch.')}"]
    if tokenizer.chat_template is None:
        starts = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = encode.plain_template(adds_bos=starts)
        facts.append("the tokenizer has no chat template: the plain one is used")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = next(causal.parameters()).device
    config = causal.config.get_text_config()
    loaded = LoadedModel(name, path, causal, tokenizer, device, dtype, getattr(config, "max_position_embeddings", None))
    with torch.no_grad():
        why = _probe_packing(loaded)
        loaded.split_head = _probe_head(loaded)
    facts.append("examples share packed rows" if loaded.packed else f"one example per row: {why}")
    if not loaded.split_head:
        facts.append("the output head runs at every position (its own form is not known)")
    loaded.facts = tuple(facts)
    return loaded


def _device(wanted: str) -> torch.device:
    if wanted != "auto":
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ModelError("device 'cuda' was asked for and PyTorch sees no GPU; set train.device to auto or cpu")
        return torch.device(wanted)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Resolve `auto`: bf16 where a matrix product in a small model's shape is at least 1.3 times as fast as in fp32."""
    if wanted != "auto":
        return cast(torch.dtype, getattr(torch, wanted))
    if device.type != "cpu":
        return torch.bfloat16
    seconds = _product_seconds()
    return torch.bfloat16 if seconds[torch.bfloat16] * 1.3 < seconds[torch.float32] else torch.float32


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
        raise ModelError("train.load_in_4bit needs a GPU (bitsandbytes); set it to false on this machine")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _probe_packing(loaded: LoadedModel) -> str:
    """Switch packed attention on and compare two examples in one row with the same two alone. Returns why not, or ''.

    A model that mixes neighbours by other means (convolutions, state spaces) gives other logits at the second example.
    """
    causal = loaded.causal
    ids = torch.arange(3, 24, device=loaded.device)[None] % causal.config.get_text_config().vocab_size
    alone = [causal(input_ids=part).logits.float() for part in (ids[:, :9], ids[:, 9:])]
    stock = causal.config._attn_implementation
    try:
        causal.set_attn_implementation("flash_attention_2" if loaded.device.type == "cuda" else attention.NAME)
        places = torch.tensor([[*range(9), *range(12)]], device=loaded.device)
        keywords = attention.boundaries((0, 9, 21), loaded.device.type == "cuda", loaded.device)
        together = causal(input_ids=ids, position_ids=places, use_cache=False, **keywords).logits.float()
    except (TypeError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, ModelError) as error:
        causal.set_attn_implementation(stock)
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    expected = torch.cat(alone, dim=1)
    # bf16 keeps 8 bits, and the two ways add in different orders; a leak moves logits by about their own spread.
    tolerance = (0.1 if loaded.dtype == torch.bfloat16 else 1e-3) * max(float(expected.std()), 1e-6)
    error_size = float((together - expected).abs().mean())
    if not error_size <= tolerance:
        causal.set_attn_implementation(stock)
        return f"packed logits differ from single ones by {error_size:.2g} (allowed {tolerance:.2g}): segments would mix"
    loaded.packed = True
    return ""


def _probe_head(loaded: LoadedModel) -> bool:
    """Whether `head` on the body's hidden states gives the model's own logits."""
    ids = torch.arange(3, 12, device=loaded.device)[None] % loaded.causal.config.get_text_config().vocab_size
    try:
        own = loaded.head(loaded.body(input_ids=ids, use_cache=False)[0])
    except (TypeError, AttributeError, RuntimeError):
        return False
    return torch.allclose(own.float(), loaded.causal(input_ids=ids, use_cache=False).logits.float(), rtol=1e-2, atol=1e-2)


def generation_attention(loaded: LoadedModel) -> str:
    """Switch to the stock attention for generation (padded batches, key/value cache); returns the name to switch back to."""
    causal = loaded.causal
    training = str(causal.config._attn_implementation)
    if loaded.packed:
        capped = getattr(causal.config.get_text_config(), "attn_logit_softcapping", None) is not None
        causal.set_attn_implementation("eager" if capped else "sdpa")
    return training


def new_adapter(loaded: LoadedModel, settings: TrainSettings, seed: int) -> None:
    """Put a fresh LoRA adapter on the base model (dropping the one before); its initial weights depend on `seed` only.

    Source: Hu et al. 2021 (arXiv 2106.09685); rsLoRA: arXiv 2312.03732; DoRA: arXiv 2402.09353; through PEFT.
    """
    config = lora_config(loaded, settings)
    if loaded.peft is not None:
        loaded.causal = loaded.peft.unload()
    torch.manual_seed(seed)
    loaded.peft = get_peft_model(loaded.causal, config, autocast_adapter_dtype=True)
    loaded.causal = loaded.peft.get_base_model()


def lora_config(loaded: LoadedModel, settings: TrainSettings) -> LoraConfig:
    """The PEFT configuration that the settings describe."""
    kind = loaded.causal.config.model_type
    targets = settings.lora_target_modules
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=_STATE_SPACE.get(kind) if targets == "all-linear" else None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def drop_adapter(loaded: LoadedModel) -> None:
    """Return to the untouched base model."""
    if loaded.peft is not None:
        loaded.causal = loaded.peft.unload()
        loaded.peft = None


def adapter_state(loaded: LoadedModel) -> State:
    """A copy of the adapter's weights, in PEFT's names."""
    return {name: tensor.detach().clone().cpu() for name, tensor in get_peft_model_state_dict(loaded.peft).items()}


def set_adapter_state(loaded: LoadedModel, state: Mapping[str, Tensor]) -> None:
    """Put weights into the present adapter. Raises ModelError where they do not fit."""
    result = set_peft_model_state_dict(loaded.peft, dict(state))
    if result.unexpected_keys:
        raise ModelError(f"adapter does not fit {loaded.name!r}: unknown weights {result.unexpected_keys[:3]}")


def use(loaded: LoadedModel, state: State | None, settings: TrainSettings) -> None:
    """Put an adapter on the base model, or none."""
    if state is None:
        drop_adapter(loaded)
        return
    if loaded.peft is None:
        new_adapter(loaded, settings, 0)
    set_adapter_state(loaded, state)
