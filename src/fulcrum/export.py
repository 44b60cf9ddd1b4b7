"""What leaves a run: the adapter in PEFT's format, beside a tokenizer whose chat template carries the anchor.

Whoever loads the two with plain Transformers and PEFT and calls `apply_chat_template` gets the anchor's tokens.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError

from fulcrum import anchor as anchors
from fulcrum import encode, modelfile, store
from fulcrum.model import LoadedModel
from fulcrum.records import Anchor
from fulcrum.sources import BUILTIN

NOTE = (
    "The chat template saved beside the adapter adds the anchor by itself: call `apply_chat_template` and do not write the "
    "anchor into your messages. With several tasks on one adapter, choose by name: "
    "`apply_chat_template(..., chat_template=NAME)`; the default template then adds no anchor."
)


def save_adapter(loaded: LoadedModel, folder: Path, task_anchors: Mapping[str, Anchor | None]) -> Path:
    """Write adapter_model.safetensors, adapter_config.json, tokenizer, generation_config.json and (where the chat template
    allows it) a Modelfile into `folder`, atomically.

    One task: its anchor is in the default chat template. Several: one named template and Modelfile a task. Raises StoreError.
    """
    template = loaded.tokenizer.chat_template

    def fill(place: Path) -> None:
        try:
            loaded.peft.save_pretrained(str(place), save_embedding_layers=False)
        except SafetensorError as error:
            raise OSError(str(error)) from error  # what the disk refused, in its library's words
        _finish_config(place / "adapter_config.json", _base_of(loaded))
        (place / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; the run folder has a full one
        loaded.causal.generation_config.save_pretrained(str(place))
        for name, anchor in task_anchors.items():
            text = modelfile.modelfile(_base_of(loaded), encode.make_format(loaded.tokenizer, anchor))
            if text is not None:
                file = place / ("Modelfile" if len(task_anchors) == 1 else f"Modelfile.{name}")
                file.write_text(text, encoding="utf-8")
        baked = {name: anchors.bake(template, anchor) for name, anchor in task_anchors.items()}
        loaded.tokenizer.chat_template = next(iter(baked.values())) if len(baked) == 1 else {"default": template, **baked}
        loaded.tokenizer.save_pretrained(str(place))

    try:
        store.write_folder(folder, fill)
    finally:
        loaded.tokenizer.chat_template = template
    return folder


def _base_of(loaded: LoadedModel) -> str:
    """What names the base model on other machines too: the name as written; of a folder its path, for it has no other."""
    is_folder = loaded.name not in BUILTIN and Path(loaded.name).expanduser().is_dir()
    return loaded.path if is_folder else loaded.name


def _finish_config(file: Path, base: str) -> None:
    """Name the base model (PEFT names a folder of this machine's cache) and sort what PEFT writes in the order of a hash seed:
    equal runs shall write equal bytes.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
