"""Settings from defaults, YAML files and raw command-line strings; every problem in one message."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path

import pytest

from fsdp_qlora import config
from fsdp_qlora.cli import COMMANDS
from fsdp_qlora.config import GenerateConfig, TrainConfig
from fsdp_qlora.config.other_names import OTHER_NAMES
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.settings import describe


@pytest.fixture
def write(tmp_path: Path):
    """Write a config file and return its path."""

    def _write(content: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return _write


def problems_of(overrides: dict[str, object], config_file: str | None = None, cls: type = TrainConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(overrides, config_file, cls)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("model", "123", "123"),
        ("model", "true", "true"),
        ("model", "none", "none"),
        ("output_dir", Path("runs/a"), "runs/a"),
        ("packing", "false", False),
        ("packing", "No", False),
        ("packing", "1", True),
        ("packing", True, True),
        ("context_length", "1e3", 1000),
        ("context_length", "1_000", 1000),
        ("context_length", "4096.0", 4096),
        ("context_length", 4096.0, 4096),
        ("max_steps", "-1", -1),
        ("seed", str(2**32 - 1), 2**32 - 1),
        ("lr", "1e-4", 1e-4),
        ("lr", 3, 3.0),
        ("lora_alpha", "1_6", 16.0),
        ("revision", "None", None),
        ("revision", "null", None),
        ("revision", None, None),
        ("revision", "main", "main"),
        ("cpu_offload", "none", "none"),
        ("lora_target_modules", "q_proj, v_proj", "q_proj, v_proj"),
    ],
)
def test_value_takes_its_settings_type(name: str, raw: object, value: object) -> None:
    parsed = getattr(config.parse({name: raw}), name)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "raw", "rule"),
    [
        ("packing", "maybe", "true or false"),
        ("packing", "", "true or false"),
        ("lora_rank", "2.5", "a whole number"),
        ("lora_rank", "true", "a whole number"),
        ("lora_rank", True, "a whole number"),
        ("lora_rank", "1e400", "a whole number"),
        ("lora_rank", [1], "a whole number"),
        ("lr", "fast", "a finite number"),
        ("lr", "nan", "a finite number"),
        ("lr", "inf", "a finite number"),
        ("model", None, "a single value"),
        ("model", " ", "a single value"),
        ("quant_type", "int4", "one of auto, nf4, fp4"),
        ("quant_type", "NF4", "one of auto, nf4, fp4"),
        ("lora_rank", "0", "at least 1"),
        ("lora_alpha", "0", "above 0"),
        ("lora_dropout", "1", "at least 0 and below 1"),
        ("lora_dropout", "-0.1", "at least 0 and below 1"),
        ("router_aux_loss_coef", "-1", "at least 0"),
        ("lora_target_modules", "q_proj,,v_proj", "separated by commas"),
        ("lora_target_modules", "(q|v", "or a regular expression"),
        ("layers_to_transform", "4-", "such as 0-15,20"),
        ("rank_pattern", "q_proj=2.5", "with ranks of at least 1"),
        ("rank_pattern", "q_proj", "pattern=rank pairs"),
        ("alpha_pattern", "q_proj=0", "with values above 0"),
        ("lora_target_parameters", "mlp.experts.(gate_up|down)_proj", "or names of parameters separated by commas"),
        ("modules_to_save", "embed_tokens,norm", "embed_tokens, lm_head, or both"),
        ("loraplus_lr_ratio", "0", "above 0"),
        ("context_length", "7", "at least 8"),
        ("batch_size", "0", "at least 1"),
        ("gradient_accumulation_steps", "0", "at least 1"),
        ("num_epochs", "0", "at least 1"),
        ("max_steps", "0", "-1 (no limit) or at least 1"),
        ("max_steps", "-2", "-1 (no limit) or at least 1"),
        ("lr", "0", "above 0"),
        ("warmup_ratio", "1.01", "from 0 to 1"),
        ("weight_decay", "-1", "at least 0"),
        ("adam_beta1", "1", "at least 0 and below 1"),
        ("adam_beta2", "-0.5", "at least 0 and below 1"),
        ("max_grad_norm", "-1", "at least 0"),
        ("eval_split", "1", "at least 0 and below 1"),
        ("eval_steps", "-1", "at least 0"),
        ("logging_steps", "0", "at least 1"),
        ("timeout_s", "0", "at least 1"),
        ("seed", "-1", "from 0 to 4294967295"),
        ("seed", str(2**32), "from 0 to 4294967295"),
        ("output_dir", "runs/a\nb", "without line breaks"),
        ("output_dir", "runs/" + "x" * 256, "at most 255 bytes"),
        ("output_dir", "runs/" + "\N{SNOWMAN}" * 86, "at most 255 bytes"),
    ],
)
def test_wrong_value_is_named_with_rule_and_default(name: str, raw: object, rule: str) -> None:
    (problem,) = problems_of({name: raw})
    assert problem.startswith(f"--{name}=")
    assert rule in problem
    assert "(default: " in problem


def test_long_output_dir_of_short_parts_is_fine() -> None:
    config.parse({"output_dir": "/".join(["x" * 200] * 3)})


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"sharding": "none", "cpu_offload": "all"}, "use --sharding=full"),
        ({"loading": "broadcast"}, "use --loading=read"),
        (
            {"lora_target_parameters": "experts", "lora_dropout": "0.1"},
            "has no dropout of LoRA on experts; set it to 0",
        ),
        ({"lora_target_parameters": "experts", "use_dora": "true"}, "has no DoRA of experts"),
        ({"eval_steps": "5", "eval_split": "0"}, "give --eval_dataset or an --eval_split above 0"),
        ({"adapter": "runs/a", "lora_rank": "8", "use_rslora": "True"}, "the adapter's own config decides"),
        ({"compute_dtype": "fp8", "precision": "fp32"}, "use --precision=bf16"),
        ({"compute_dtype": "fp8", "train_type": "full"}, "without LoRA and without a quantised base"),
        ({"layers_to_transform": "0-3", "lora_target_modules": ".*q_proj"}, "put the blocks into the expression"),
    ],
)
def test_impossible_combination(overrides: dict[str, object], text: str) -> None:
    (problem,) = problems_of(overrides)
    assert text in problem
    for name, value in overrides.items():
        assert f"--{name}={value}" in problem


def test_combination_is_possible_with_an_eval_dataset() -> None:
    config.parse({"eval_steps": "5", "eval_split": "0", "eval_dataset": "rows.jsonl"})


@pytest.mark.parametrize(("version", "works"), [("2.11.0+cu130", False), ("2.12.0", True), ("3.0.1", True)])
def test_uint8_storage_needs_a_torch_that_shards_integers(
    monkeypatch: pytest.MonkeyPatch, version: str, works: bool
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if works:
        assert config.parse({"quant_storage": "uint8"}).quant_storage == "uint8"
    else:
        (problem,) = problems_of({"quant_storage": "uint8"})
        assert version in problem
        assert "--quant_storage=float32 or torch 2.12" in problem
    config.parse({"quant_storage": "float32"})


def test_every_problem_is_reported_at_once(write) -> None:
    problems = problems_of(
        {"lora_rnak": "8", "batch_size": "0", "sharding": "none", "cpu-offload": "all", "zzz": "hf_secret"},
        write("lr: fast\nseeds: 1\n"),
    )
    assert len(problems) == 6
    text = "\n".join(problems)
    for part in (
        "run.yaml: lr='fast'",
        "run.yaml: seeds: unknown setting; did you mean seed?",
        "did you mean --lora_rank?",
    ):
        assert part in text
    assert "--zzz: unknown setting; see --help" in text
    assert "hf_secret" not in text  # the value of an unknown name may be a token


def test_names_of_other_trainers_lead_to_ours(write) -> None:
    (problem,) = problems_of({}, write("max_seq_length: 512\n"))
    assert problem.endswith("run.yaml: max_seq_length: unknown setting; did you mean context_length?")
    known = {setting.name for command in COMMANDS for setting in describe(command.settings)}
    assert set(OTHER_NAMES.values()) <= known
    of_train = {setting.name for setting in describe(config.TrainConfig)}
    assert not of_train & OTHER_NAMES.keys(), "a setting of our own is not unknown"


def test_long_value_is_shortened() -> None:
    (problem,) = problems_of({"quant_type": "x" * 5000})
    assert len(problem) < 300
    assert "5002 characters" in problem


def test_dash_and_underscore_are_the_same() -> None:
    assert config.parse({"lora-rank": "8"}).lora_rank == config.parse({"lora_rank": "8"}).lora_rank == 8


def test_command_line_wins_over_file_and_file_over_default(write) -> None:
    path = write("lr: 1e-3\nlora-rank: 8\nmodel: 007\nrevision:\npacking: off_is_wrong\n")
    parsed = config.parse({"lr": "5e-4", "packing": "no"}, path)
    assert parsed == dataclasses.replace(TrainConfig(), lr=5e-4, lora_rank=8, model="007", packing=False)


def test_empty_file_means_defaults(write) -> None:
    assert config.parse({}, write("# nothing yet\n")) == TrainConfig()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("- lr\n- seed\n", "is not a mapping"),
        ("just words\n", "is not a mapping"),
        ("lr: [1\n", "is not YAML"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        ("model:\n  name: x\n", "line 1: nested value"),
        ("lr: 1\nlr: 2\n", "line 2: lr is set twice"),
        ("lora-rank: 1\nlora_rank: 2\n", "line 2: lora_rank is set twice"),
    ],
)
def test_broken_config_file(write, content: str | bytes, text: str) -> None:
    path = write(content)
    (problem,) = problems_of({}, path)
    assert text in problem
    assert path in problem


def test_missing_config_file_is_reported_with_the_other_problems(tmp_path: Path) -> None:
    problems = problems_of({"lr": "0"}, str(tmp_path / "no.yaml"))
    assert len(problems) == 2
    assert "no.yaml: cannot be read (No such file or directory); check the path" in problems[0]


def test_yaml_cannot_run_code(write, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = write(f"model: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]\n")
    problems_of({}, path)
    assert config.parse({}, write("model: !!python/name:os.system x\n")).model == "x"
    assert not canary.exists()


def test_required_settings_of_another_command() -> None:
    problems = problems_of({}, cls=GenerateConfig)
    assert [problem.split()[0] for problem in problems] == ["--prompt", "neither"]
    parsed = config.parse({"adapter": "runs/a", "prompt": "5"}, None, GenerateConfig)
    assert parsed == GenerateConfig(adapter="runs/a", prompt="5")


@pytest.mark.parametrize("cls", [command.settings for command in COMMANDS])
def test_every_setting_is_documented_in_a_section(cls: type) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    assert [setting.name for setting in describe(cls)] == names
    for setting in describe(cls):
        assert len(setting.doc) > 5
        assert setting.doc.endswith("."), setting.name
        assert setting.section, setting.name


@pytest.mark.parametrize("value", ["a=x.jsonl,a=y.jsonl", "a=x.jsonl,y.jsonl", "a=,b=y.jsonl", "a=x.jsonl,"])
def test_names_of_evaluation_sets(value: str) -> None:
    (problem,) = problems_of({"eval_dataset": value})
    assert "must be one dataset, or name=dataset pairs with different names" in problem


def test_rules_name_existing_settings() -> None:
    known = {setting.name for command in COMMANDS for setting in describe(command.settings)}
    assert set(config.RULES) <= known
    for cls, checks in config.CHECKS.items():
        for check in checks:
            assert set(check.names) <= {setting.name for setting in describe(cls)}


def test_description_carries_type_choices_and_default() -> None:
    settings = {setting.name: setting for setting in describe(TrainConfig)}
    assert settings["quant_type"].choices == ("auto", "nf4", "fp4", "none")
    assert (settings["revision"].kind, settings["revision"].optional) == (str, True)
    assert (settings["lr"].kind, settings["lr"].default, settings["lr"].section) == (float, 2e-4, "training")
    assert settings["packing"].kind is bool


def test_defaults_satisfy_their_own_rules_and_survive_a_round_trip() -> None:
    assert config.parse({}) == TrainConfig()
    assert config.parse(config.to_dict(TrainConfig())) == TrainConfig()
    assert list(config.to_dict(TrainConfig())) == [field.name for field in dataclasses.fields(TrainConfig)]


@pytest.mark.parametrize(
    ("overrides", "written"),
    [
        ({"use_dora": True}, "--use_dora=true"),
        ({"adapter": "runs/first"}, "--adapter=runs/first"),
        ({"lora_rank": 8, "lora_dropout": 0.1}, "--lora_rank=8 --lora_dropout=0.1"),
        ({"modules_to_save": "lm_head"}, "--modules_to_save=lm_head"),
        ({"loraplus_lr_ratio": 4}, "--loraplus_lr_ratio=4.0"),
        ({"quant_storage": "bfloat16"}, "--quant_storage=bfloat16"),
        ({"quant_type": "nf4"}, "--quant_type=nf4"),
    ],
)
def test_full_fine_tuning_has_neither_lora_nor_4_bits(overrides: dict[str, object], written: str) -> None:
    (problem,) = problems_of({"train_type": "full", **overrides})
    assert problem.startswith(f"--train_type=full with {written}: all parameters are trained in float32")
    assert "use --train_type=lora" in problem


def test_form_of_the_base() -> None:
    assert config.parse({}).base_form == "nf4"
    assert config.parse({"quant_type": "none"}).base_form == "none"
    assert config.parse({"train_type": "full"}).base_form == "none"
    assert config.parse({"train_type": "full", "quant_type": "none"}).base_form == "none"


@pytest.mark.parametrize("overrides", [{"early_stopping_patience": 2}, {"keep_best": True}])
def test_no_best_without_evaluations(overrides: dict[str, object]) -> None:
    (problem,) = problems_of(overrides)
    assert "without --eval_steps: there are no evaluations in between" in problem
