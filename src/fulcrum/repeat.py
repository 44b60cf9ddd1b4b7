"""A finished run made again from its own settings: same seed, machine type and number of threads give the same bits."""

import tempfile
from pathlib import Path

import torch

from fulcrum import config, run_folder, store, use
from fulcrum.progress import ProgressListener, Silent
from fulcrum.run_folder import OUTPUTS
from fulcrum.verification import Verification

# What depends on nothing but the manifest; results hold seconds too.
_SAME = ("adapter_model.safetensors", "predictions.jsonl")


def again(folder: Path, progress: ProgressListener | None = None) -> Verification:
    """Make a finished run again, with its number of threads, and compare weights and predictions with what its manifest says.

    What else differs here (machine, versions, code) is named as unchecked: other bits are then no fault. Raises StoreError
    where the run is not finished, and what made it raises.
    """
    known = store.read_json(folder / store.MANIFEST)
    run_folder.unsealed(folder)  # it must be finished
    torch.set_num_threads(int(known["environment"]["threads"]))
    with tempfile.TemporaryDirectory() as name:
        new = Path(name) / "again"
        settings = config.load(folder / "config.yaml").model_copy(update={"output_dir": str(new)})
        use.VERBS[known["kind"]](settings, progress=progress or Silent())
        made = store.read_json(new / store.MANIFEST)
    differs = store.changes(known["environment"], made["environment"])
    unchecked = [f"made elsewhere, where the bits may be others: {', '.join(differs)}"] if differs else []
    if data := store.changes(known["data"], made["data"]):
        unchecked.append(f"the data are no longer what they were: {', '.join(data)}")
    if (folder / store.PLAN).exists():
        unchecked.append("a time budget may have left seeds out, which were made now")
    before, after = known[OUTPUTS], made[OUTPUTS]
    same = [file for file in before if Path(file).name in _SAME]
    return Verification([f"{file}: other bits than before" for file in same if before[file] != after.get(file)], unchecked)
