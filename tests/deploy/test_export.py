"""What is exported is the adapter that was trained, as other programs load it; what is not is
refused with the reason."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import fulcrum
from fulcrum import api
from fulcrum.core import store
from fulcrum.core.errors import ConfigError, DataError, ModelError
from fulcrum.core.types import Message
from fulcrum.data import encode
from fulcrum.deploy import check, export
from fulcrum.deploy.export import Wanted
from fulcrum.model import gguf
from helpers.commands import done, refused
from helpers.exports import trained
from helpers.finished_runs import settings
from helpers.gguf_files import write_gguf
from helpers.tiny import save_tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shipping")
    return trained(place, save_tiny(place / "model"), task={"metrics": ["nll", "exact_match"]})


@pytest.fixture(scope="module")
def from_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("from-gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULCRUM_CACHE", str(place / "cache"))
        return trained(
            place,
            write_gguf(place / "model.gguf"),
            task={"anchor": "say:"},
            eval={"general_rows": 0, "draws": 100},
        )


def answers(folder: Path, **dtype: Any) -> torch.Tensor:
    """Logits of a question in plain Transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    causal = AutoModelForCausalLM.from_pretrained(folder, **dtype)
    given = tokenizer.apply_chat_template(
        [{"role": "user", "content": "colour ox"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    return causal(**given).logits.float()


def test_a_merged_folder_in_plain_transformers_is_the_adapter_with_its_anchor(
    run: Path, tmp_path: Path
) -> None:
    found = export.export(run, Wanted("merged", dtype="float32"), out=tmp_path / "merged")
    adapter = api.load_adapter(run)
    form = encode.make_format(adapter.loaded.tokenizer, adapter.anchor())
    ids = encode.prompt_ids((Message("user", "colour ox"),), form)
    torch.testing.assert_close(
        answers(tmp_path / "merged"),
        adapter.loaded.causal(input_ids=torch.tensor([ids])).logits,
        atol=1e-4,
        rtol=1e-4,
    )
    with adapter.loaded.peft.disable_adapter():
        base = adapter.loaded.causal(input_ids=torch.tensor([ids])).logits
    assert (answers(tmp_path / "merged") - base).abs().max() > 0.5
    check = found.check
    assert check is not None
    assert (check.reader, check.rows, check.agreement, check.same_answers, check.wrong) == (
        "Transformers",
        3,
        1.0,
        1.0,
        "",
    )
    assert abs(check.nats[0] - check.nats[1]) < 1e-4
    assert [name for name, *_ in check.scores] == ["exact_match"]


def test_each_export_says_what_went_in_and_how_it_was_checked(run: Path, tmp_path: Path) -> None:
    found = export.export(run, Wanted("merged", dtype="float32"), out=tmp_path / "m")
    assert {"README.md", "export.json", "model.safetensors", "chat_template.jinja"} <= set(
        found.files
    )
    assert store.damaged(tmp_path / "m") == []
    card = (tmp_path / "m" / "README.md").read_text()
    assert "Name it." in card
    assert "Scored again by Transformers on 3 rows" in card
    manifest = store.read_json(run / store.MANIFEST)
    weights = manifest["environment"]["weights"]
    (rows,) = manifest["data"]["colour train"]
    assert f"| model | {run.parent / 'model'} | {weights} | not stated |" in card
    assert f"| data | rows: colour train | {rows} | not stated |" in card
    assert f"| library | peft {manifest['environment']['peft']} |  |  |" in card


def test_the_card_of_an_adapter_has_the_command_of_another_server(
    run: Path, tmp_path: Path
) -> None:
    export.export(run, export.Wanted("adapter"), out=tmp_path / "a", rows=0)
    command = next(
        line
        for line in (tmp_path / "a" / "README.md").read_text().splitlines()
        if line.startswith("$ vllm")
    )
    assert " --max-lora-rank 8 --lora-modules " in command  # of rank 2; vLLM knows 8 as the least
    assert (tmp_path / "a" / command.split("--chat-template ")[1].split()[0]).read_text().count(
        "Name it."
    ) == 1


@pytest.mark.parametrize("to", ["adapter", "modelfile"])
def test_an_adapter_is_scored_by_plain_peft(run: Path, tmp_path: Path, to: Any) -> None:
    found = export.export(run, Wanted(to), out=tmp_path / "a")
    assert found.check is not None
    assert (found.check.reader, found.check.agreement) == ("Transformers and PEFT", 1.0)
    assert {"adapter_model.safetensors", "Modelfile"} <= set(found.files)
    assert "ADAPTER ." in (tmp_path / "a" / "Modelfile").read_text()


@pytest.mark.parametrize("quantization", ["f16", "q8_0"])
def test_a_gguf_file_is_the_adapter_on_the_file_that_the_model_came_as(
    from_gguf: Path, tmp_path: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULCRUM_CACHE", str(from_gguf.parent / "cache"))
    monkeypatch.setattr(
        check, "LEAST_AGREEMENT", 0.8
    )  # of a random model's tokens some are near ties
    monkeypatch.setattr(check, "MAX_LOSS_DIFFERENCE", {"merged": 0.05, "f16": 0.05, "q8_0": 0.3})
    found = export.export(from_gguf, Wanted("gguf", quantization), out=tmp_path / "g")
    file = f"sft_anchor-{quantization}.gguf"
    assert {file, "Modelfile", "README.md"} <= set(found.files)
    assert f"FROM ./{file}" in (tmp_path / "g" / "Modelfile").read_text()
    assert "ADAPTER" not in (tmp_path / "g" / "Modelfile").read_text()
    tokenizer, _ = gguf.read(tmp_path / "g" / file)
    assert "say:" in tokenizer.chat_template


def test_a_lost_adapter_is_refused_and_nothing_stays(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault of `lm-eval` and others: the base model is served, without a word."""
    real = export.save_merged

    def without(causal: Any, tokenizer: Any, folder: Path, *rest: Any) -> None:
        base = AutoModelForCausalLM.from_pretrained(run.parent / "model", dtype=torch.float32)
        real(base, tokenizer, folder, *rest)

    monkeypatch.setattr(export, "save_merged", without)
    with pytest.raises(
        ModelError,
        match=r"sft_anchor-merged: not written: weights: the loss .* 14 of 21 tensors are not the",
    ):
        export.export(run, Wanted("merged"), out=tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    export.export(run, Wanted("merged"), out=tmp_path / "m", rows=0)
    assert "It was not scored again." in (tmp_path / "m" / "README.md").read_text()


def test_rounding_is_named_where_the_weights_are_all_there(
    run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(check, "MAX_LOSS_DIFFERENCE", {"merged": 1e-5})
    with pytest.raises(
        ModelError,
        match=(
            r"precision: the loss is .* nats .* \(1e-05 is allowed\); try --dtype "
            r"float32 \(--rows"
        ),
    ):
        export.export(run, Wanted("merged"), out=tmp_path / "m")


def test_another_template_is_named_as_the_cause(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.save_merged
    monkeypatch.setattr(export, "save_merged", lambda *given: real(*given[:3], None, given[4]))
    with pytest.raises(
        ModelError, match=r"template: the prompts of 3 of 3 rows have other tokens than in training"
    ):
        export.export(run, Wanted("merged", dtype="float32"), out=tmp_path / "m")


def test_an_export_that_would_not_stop_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its losses are right, and each of its answers goes on until it is cut off."""
    real = export.save_merged

    def endless(causal: Any, *rest: Any) -> None:
        causal.generation_config.eos_token_id = 1
        real(causal, *rest)

    monkeypatch.setattr(export, "save_merged", endless)
    with pytest.raises(
        ModelError,
        match=r"ending: Transformers does not stop at '<\|im_end\|>', with which each answer ends",
    ):
        export.export(run, Wanted("merged", dtype="float32"), out=tmp_path / "m")


def test_a_merge_that_goes_wrong_is_told_from_rounding(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.merge_adapter

    def half(*given: Any) -> Any:
        causal, tokenizer = real(*given)
        causal.model.layers[0].mlp.down_proj.weight.data.mul_(0.2)
        return causal, tokenizer

    monkeypatch.setattr(export, "merge_adapter", half)
    with pytest.raises(
        ModelError, match=r"merging: .* has as much before it is rounded; use the adapter itself"
    ):
        export.export(run, Wanted("merged", dtype="float32"), out=tmp_path / "m")


def test_what_needs_llama_cpp_says_how_to_get_it(
    run: Path, from_gguf: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    with pytest.raises(
        ModelError,
        match=r"a model that came as safetensors needs llama\.cpp's own converter; get it with",
    ):
        export.export(run, Wanted("gguf"), out=tmp_path / "g")
    monkeypatch.setenv("FULCRUM_CACHE", str(from_gguf.parent / "cache"))
    with pytest.raises(
        ModelError,
        match=r"q4_k_m of .* needs llama\.cpp's own converter, and .*convert_hf_to_gguf.py is not",
    ):
        export.export(from_gguf, Wanted("gguf", "q4_k_m", llama_cpp=tmp_path), out=tmp_path / "g")


def test_llama_cpps_converter_is_called_with_the_merged_folder(run: Path, tmp_path: Path) -> None:
    """A converter that writes down what it was asked for, and a quantiser that cannot be found."""
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(
        "import json, pathlib, sys\n"
        "merged, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[5])\n"
        "assert 'Name it.' in (merged / 'chat_template.jinja').read_text()\n"
        "kind = json.loads((merged / 'config.json').read_text())['dtype']\n"
        "out.write_text(' '.join([kind, sys.argv[2], sys.argv[3], sys.argv[4]]))\n"
    )
    for kind in ("f16", "bf16"):
        found = export.export(
            run, Wanted("gguf", kind, llama_cpp=tmp_path), out=tmp_path / "g", rows=0
        )
        (file,) = [name for name in found.files if name.endswith(".gguf")]
        # Rounded by the converter, and not before.
        assert (tmp_path / "g" / file).read_text() == f"float32 --outtype {kind} --outfile"
    converter.write_text("raise SystemExit('must not be called')")
    with pytest.raises(ModelError, match="llama-quantize is neither in"):
        export.export(run, Wanted("gguf", "q4_k_m", llama_cpp=tmp_path), out=tmp_path / "h", rows=0)
    converter.write_text("import nowhere")
    with pytest.raises(
        ModelError,
        match=(
            r"convert_hf_to_gguf\.py: ModuleNotFoundError: .*'nowhere'; install that "
            r"package next to"
        ),
    ):
        export.export(run, Wanted("gguf", "f16", llama_cpp=tmp_path), out=tmp_path / "h", rows=0)


def test_of_several_tasks_each_has_an_export_of_its_own(run: Path, tmp_path: Path) -> None:
    """The run keeps one template a task, the export has its own; the other task's stays beside
    it."""
    task = yaml.safe_load((run / "config.yaml").read_text())["tasks"][0]
    both = [
        {**task, "name": "colour", "anchor": "Name it."},
        {**task, "name": "hue", "anchor": "Hue of it:"},
    ]
    changed = {
        name: value
        for name, value in settings(run.parent, tmp_path / "two").items()
        if name != "task"
    }
    fulcrum.train(**changed, tasks=both)
    with pytest.raises(
        ConfigError,
        match=r"the run has the tasks colour, hue, an export has one anchor: choose with --task",
    ):
        export.export(tmp_path / "two", Wanted("adapter"))
    with pytest.raises(ConfigError, match="no task 'hu' in this run; did you mean 'hue'"):
        export.export(tmp_path / "two", Wanted("adapter"), task="hu")
    found = [
        export.export(tmp_path / "two", Wanted("adapter"), task=name) for name in ("colour", "hue")
    ]
    assert [each.folder.name for each in found] == [
        "sft_anchor-colour-adapter",
        "sft_anchor-hue-adapter",
    ]
    for each, anchor in zip(found, ("Name it.", "Hue of it:"), strict=True):
        assert {"Modelfile", "chat_template.jinja"} <= set(each.files)
        assert anchor in AutoTokenizer.from_pretrained(each.folder).chat_template
        assert each.check is not None
        assert each.check.agreement == 1.0


def test_where_the_runs_rows_are_gone_it_can_be_written_unchecked(
    run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "a disk" / "run")
    file = tmp_path / "a disk" / "run" / "config.yaml"
    file.write_text(file.read_text().replace("dev.jsonl", "gone.jsonl"))
    with pytest.raises(
        DataError,
        match=r"gone\.jsonl: no such file.*; export where .* was trained, .* \(--rows 0\)",
    ):
        export.export(tmp_path / "a disk" / "run", Wanted("merged"))
    found = export.export(tmp_path / "a disk" / "run", Wanted("merged"), rows=0)
    assert found.folder == tmp_path / "a disk" / "run" / "export" / "sft_anchor-merged"


def test_exports_of_other_kinds_have_other_folders() -> None:
    every = [Wanted(to) for to in ("adapter", "merged", "modelfile")]
    every += [
        Wanted("merged", dtype="float16"),
        *(Wanted("gguf", kind) for kind in ("f16", "q8_0")),
    ]
    assert [wanted.names for wanted in every] == [
        ("adapter",),
        ("merged",),
        ("modelfile",),
        ("merged", "float16"),
        ("gguf", "f16"),
        ("gguf", "q8_0"),
    ]


def test_an_empty_folder_is_filled(run: Path, tmp_path: Path) -> None:
    assert export.export(run, Wanted("adapter"), out=tmp_path, rows=0).folder == tmp_path


def test_a_folder_that_is_no_export_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is no export"):
        export.export(run, Wanted("merged"), out=tmp_path / "mine")


@pytest.mark.parametrize(("target", "moves"), [("lm_head", "output"), ("embed_tokens", "input")])
def test_an_adapter_on_one_end_of_tied_embeddings_does_not_reach_the_other(
    tmp_path: Path, target: str, moves: str
) -> None:
    model = save_tiny(tmp_path / "model", "qwen3")
    modules = {
        "batch_size": 4,
        "lora_r": 2,
        "evaluations": 1,
        "dtype": "float32",
        "device": "cpu",
        "lora_target_modules": [target],
    }
    run = trained(tmp_path, model, train=modules)
    found = export.export(run, Wanted("merged", dtype="float32"), out=tmp_path / "m")
    assert found.check is not None
    assert found.check.agreement == 1.0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    base = AutoModelForCausalLM.from_pretrained(model)
    for end in ("input", "output"):
        one, other = (getattr(each, f"get_{end}_embeddings")().weight for each in (whole, base))
        assert torch.equal(one, other) is (end != moves), end


def test_the_command_line_shows_the_difference(run: Path, tmp_path: Path) -> None:
    said = done("export", run, "--to", "merged", "--dtype", "float32", "--out", tmp_path / "m")
    assert "Scored again by Transformers: 3 rows" in said
    assert "nats per answer token" in said
    assert "exact_match" in said
    assert "likeliest tokens agree in 100.0%; 100% of the answers are equal" in said
    assert "did you mean" in refused("export", run, "--to", "merge")
