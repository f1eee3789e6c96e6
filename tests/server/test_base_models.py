"""What ``--base-model`` means, and the names that the SDK's tokenizer rule would mangle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinker_core.errors import ConfigurationError
from tinker_core.types import BaseModelSpec
from tinker_server.base_models import check_distinct, parse_base_model


def test_a_name_for_a_directory(tmp_path: Path) -> None:
    model = parse_base_model(f"Qwen/Qwen3-8B={tmp_path}")
    assert (model.name, model.path) == ("Qwen/Qwen3-8B", str(tmp_path))


def test_a_directory_is_its_own_name(tmp_path: Path) -> None:
    directory = tmp_path / "a=b" / "models" / "tiny"
    directory.mkdir(parents=True)
    model = parse_base_model(f"{directory}/")
    assert (model.name, model.path) == (str(directory), str(directory))


def test_a_relative_directory_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = parse_base_model("models/tiny")
    assert (model.name, model.path) == ("models/tiny", str(tmp_path / "models" / "tiny"))


def test_a_hub_name_is_loaded_by_its_name() -> None:
    assert parse_base_model("Qwen/Qwen3-8B") == BaseModelSpec(name="Qwen/Qwen3-8B", path="Qwen/Qwen3-8B")
    assert parse_base_model("a/b=Qwen/Qwen3-8B") == BaseModelSpec(name="a/b", path="Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("/models/tiny", "--base-model /models/./tiny, or give the model a name of its own"),
        ("./models/tiny", "exactly two slashes"),
        ("a/b/c=/somewhere/else", "would load the tokenizer of 'a/b'"),
        ("tiny:v2", "contains ':'"),
        ("s3://bucket/model", "contains ':'"),
        ("~/tiny", "do not expand"),
        ("tiny=/no/such/directory/here", "is not a directory"),
        ("tiny=", "needs a name and a path"),
        ("=tiny", "needs a name and a path"),
        ("", "needs a name and a path"),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_base_model(text)
    assert reason in str(refused.value)


def test_the_fix_for_two_slashes_names_the_same_directory(tmp_path: Path) -> None:
    from tinker.lib.public_interfaces import sampling_client

    with pytest.raises(ConfigurationError) as refused:
        parse_base_model("/models/tiny")
    fixed = str(refused.value).split("--base-model ")[1].split(",")[0]
    assert Path(fixed) == Path("/models/tiny")
    assert fixed.count("/") != 2
    assert hasattr(sampling_client, "_load_tokenizer_from_model_info")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is not a directory"):
        parse_base_model(f"tiny={tmp_path / 'file'}")


def test_names_must_differ() -> None:
    with pytest.raises(ConfigurationError, match="'a/b' is given twice, as 'c' and 'd'"):
        check_distinct([parse_base_model("a/b=c"), parse_base_model("a/b=d")])
    with pytest.raises(ConfigurationError, match="no base model"):
        check_distinct([])
