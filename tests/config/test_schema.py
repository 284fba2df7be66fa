"""YAML as people write it: what is meant is understood, what is wrong is one clear line."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.config.docs import help_text
from guided_diffusion.config.keys import DataConf, InpaintConf, OutputPaths
from guided_diffusion.config.reading import load_conf
from guided_diffusion.config.schema import conf_from_dict, conf_to_dict, describe, keys_of
from guided_diffusion.config.train_keys import TrainConf
from guided_diffusion.errors import UserError

BASE = """\
name: run
model_path: model.pt
data: {eval: {faces: {gt_path: gt, mask_path: mask}}}
"""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(tmp_path):
    def load_text(text, overrides=(), base=BASE):
        path = tmp_path / "a.yml"
        path.write_bytes((base + text).encode() if isinstance(text, str) else text)
        return load_conf(path, InpaintConf, overrides)

    return load_text


def problem(load, text, overrides=(), base=BASE):
    with pytest.raises(UserError) as caught:
        load(text, overrides, base)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("timestep_respacing: 250", "timestep_respacing", "250"),
        ("timestep_respacing: [20, 30]", "timestep_respacing", "20,30"),
        ("timestep_respacing:", "timestep_respacing", "250"),
        ("attention_resolutions: 32, 16", "attention_resolutions", "32,16"),
        ("channel_mult: [0.5, 1]", "channel_mult", "0.5,1"),
        ("channel_mult: null", "channel_mult", ""),
        ("dropout: 1e-1", "dropout", 0.1),
        ("classifier_scale: 1.5e1", "classifier_scale", 15.0),
        ("classifier_scale: 4", "classifier_scale", 4.0),
        ("num_channels: 128.0", "num_channels", 128),
        ("use_fp16: yes", "use_fp16", True),
        ("cond_y: ''", "cond_y", None),
        ("device: 0", "device", "0"),
        ("compile: off", "compile", False),
    ],
)
def test_values_as_people_write_them(load, text, key, value):
    found = getattr(load(text), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("classifier_scale: 1e400", "classifier_scale: expected a finite number"),
        ("image_size: 0x100", "image_size: expected an integer"),
        ("image_size: " + "9" * 10_000, "image_size: expected an integer"),
        ("classifier_scale: 1:30.5", "at least 0, found '1:30.5'"),
        ("classifier_scale: " + "1:" * 200 + "1.0", "classifier_scale: expected a finite number"),
        ("device: yes", "device: text that YAML takes for something else needs quotes; found true"),
        ('device: "\\ud800"', "device: expected text"),
        (r'device: "C:\new"', "(in double quotes \\ is special, so write single quotes or /)"),
        (r'device: "C:\Program Files"', "in double quotes \\ is special"),  # \P ends a paragraph
    ],
)
def test_values_that_are_something_else(load, text, words):
    message = problem(load, text)
    assert "a.yml: " in message
    assert words in message


@pytest.mark.parametrize(
    ("name", "kept"),
    [("'é'", "é"), *((name, name) for name in ("012", "12", "1:30", "1:30.5", "1e5", "1.5e1"))],
)
def test_names_stay_as_they_are_written(load, name, kept):
    assert load("", base=BASE.replace("name: run", f"name: {name}")).name == kept


def test_a_conf_checks_itself_however_it_is_made(load):
    loaded = load("")
    with pytest.raises(UserError, match=r"^num_channels: expected"):
        dataclasses.replace(loaded, num_channels=1)
    assert dataclasses.replace(loaded, channel_mult=[1, 2]).channel_mult == "1,2"
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.name = "other"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "line 4, column 6"),
        ("\tseed: 1", "line 4, column 1"),
        ("seed: 1\nname: again", "line 5, column 1: the key name is here twice"),
        ("schedule_jump_params: {t_T: 9, t_T: 8}", "line 4, column 32: the key t_T is here twice"),
        ("seed: *nowhere", "line 4, column 7"),
        ("[a]: 1", "line 4, column 1"),
        ("seed: \x07", "line 4, column 7"),
        ("seed: !!python/object/apply:os.system ['true']", "line 4, column 7"),
        (r'device: "C:\Users"', r"column 14: expected escape sequence of 8 hexadecimal numbers"),
        (r'device: "C:\Users"', r"in double quotes \ is special, so write single quotes or /"),
        (r'device: "a\data"', r"unknown escape character 'd'; in double quotes \ is special"),
        ("a: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_yaml_errors_tell_line_and_column(load, text, words):
    message = problem(load, text)
    assert re.search(r"a\.yml: no valid YAML: line \d+, column \d+: \S", message)
    assert words in message


def test_a_date_that_does_not_exist_is_one_line(load):
    assert "a.yml: no valid YAML: day" in problem(load, "device: 2024-02-31")


def test_a_number_may_name_the_data_set(load):
    base = BASE.replace("faces:", "12:")
    assert base != BASE
    for option in ("data.eval.12.max_len=3", "data.max_len=3"):
        loaded = load("", [option], base)
        assert (loaded.data.name, loaded.data.max_len) == ("12", 3)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "found an empty file"),
        (b"- a\n- b\n", "expected keys and values, found ['a', 'b']"),
        (b"just text", "expected keys and values, found 'just text'"),
        ("name: é\n".encode("latin-1"), "line 1 is in another encoding"),
        ("name: a\n".encode("utf-16"), "expected YAML in UTF-8, found UTF-16 "),
        (b"PK\x03\x04\0\0\0\0", "found a binary file"),
    ],
)
def test_files_that_are_no_conf(load, raw, words):
    message = problem(load, raw)
    assert "a.yml: " in message
    assert words in message


def test_byte_order_mark_and_line_ends(load):
    assert load(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode()).name == "run"


def test_a_folder_a_null_byte_and_a_pipe_that_is_not_waited_for(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_conf(tmp_path)
    with pytest.raises(UserError, match="cannot be read: embedded null byte"):
        load_conf("a\0b")
    os.mkfifo(tmp_path / "a.yml")
    with pytest.raises(UserError, match=r"a\.yml: cannot be read: is a pipe or device"):
        load_conf(tmp_path / "a.yml")


def test_a_relative_path_that_is_missing_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="No such file") as caught:
        load_conf("none.yml")
    assert str(caught.value).endswith(f" (looked for in {tmp_path})")
    with pytest.raises(UserError, match=r"but it is in .*: start the program there\)$"):
        load_conf("confs/demo.yml")
    with pytest.raises(UserError, match=r"none\.yml: cannot be read: No such file") as caught:
        load_conf(tmp_path / "none.yml")
    assert "looked for" not in str(caught.value)


def test_a_tilde_is_the_home_folder_in_the_path_of_the_conf(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yml").write_text(BASE)
    assert load_conf("~/a.yml").name == "run"
    with pytest.raises(UserError, match=f"^{tmp_path}/b.yml: cannot be read"):
        load_conf("~/b.yml")


@pytest.mark.parametrize(
    ("written", "expected"), [("~/x", "/home/me/x"), ("./~/x", "./~/x"), ("a~", "a~")]
)
def test_a_tilde_is_the_home_folder_in_a_path(load, monkeypatch, written, expected):
    monkeypatch.setenv("HOME", "/home/me")
    assert load("", [f"data.gt_path={written}"]).data.gt_path == expected


def test_every_key_that_is_a_path_is_known_to_be_one():
    """A new key of a path, by its name or its sentence, has to be marked as one."""
    for cls in (InpaintConf, TrainConf, DataConf):
        for field in keys_of(cls).values():
            if field.name.endswith(("_path", "_dir")) or "heckpoint" in field.metadata["text"][:10]:
                assert field.metadata["path"], field.name
    assert all(field.metadata["path"] for field in keys_of(OutputPaths).values())


@pytest.mark.parametrize(
    ("option", "path", "value"),
    [
        ("seed=5", "seed", 5),
        ("channel_mult=[1, 2]", "channel_mult", "1,2"),
        ("schedule_jump_params.t_T=50", "schedule_jump_params.t_T", 50),
        ("data.eval.faces.gt_path=x=y", "data.gt_path", "x=y"),
        ("data.gt_path=/tmp/pictures", "data.gt_path", "/tmp/pictures"),
        ("data.paths.srs=o", "data.paths.srs", "o"),
        ("data.eval={b: {gt_path: g, mask_path: m}}", "data.name", "b"),
        ("classifier_scale=", "classifier_scale", 4.0),
        ("mask_hole=#ff0000", "mask_hole", "#ff0000"),
        ("mask_hole='#ff0000'", "mask_hole", "#ff0000"),
        ("data.gt_path= my pictures #1/a.png", "data.gt_path", "my pictures #1/a.png"),
    ],
)
def test_overrides(load, option, path, value):
    found = load("", [option])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_later_overrides_win_and_folders_follow_the_name(load):
    loaded = load("seed: 1", ["seed=2", "name=new", "seed=3"])
    assert loaded.seed == 3
    assert loaded.data.paths.srs == "./log/new/inpainted"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("seed=x", "seed: expected an integer, at least 0"),
        ("sed=1", "sed: unknown key; the nearest known key is seed"),
        ("data.gt_pth=1", "data.eval.faces.gt_pth: unknown key"),
        ("image_size=96", "image_size and channel_mult"),
        ("data.paths={a: 1}", "data.eval.faces.paths.a: unknown key"),
        ("name=", "name: is missing"),
        ("seed.a.b=1", "seed: expected an integer"),
        ("name.x=1", "name is a value and has no keys in it"),
        ("seed=[1", "no valid YAML: line 1, column 3"),
        (r'model_path="C:\Users"', "in double quotes"),
        ("a.b=1", "a: unknown key"),
        ("data.eval.other.gt_path=a", "data.eval: expected one set of keys"),
        ("seed", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
    ],
)
def test_wrong_overrides_are_named(load, option, words):
    message = problem(load, "", [option])
    assert message.startswith(f"--set {option}: ")
    assert words in message


def test_a_long_override_is_quoted_in_part(load):
    message = problem(load, "", ["seed=" + "[" * 1000])
    assert message.startswith("--set seed=[[[")
    assert message.endswith("[…: no valid YAML: line 1, column 1: nested too deeply")


def test_an_error_of_the_file_is_not_blamed_on_an_override(load):
    message = problem(load, "dropout: 2", ["seed=1"])
    assert "--set" not in message
    assert "a.yml: dropout: " in message


def test_short_form_needs_one_data_set(load):
    base = "name: a\nmodel_path: b\n"
    assert "no data.eval.<set>" in problem(load, "", ["data.gt_path=a"], base)
    two = base + "data: {eval: {a: {}, b: {}}}\n"
    assert "no data.eval.<set>" in problem(load, "", ["data.gt_path=a"], two)


@pytest.mark.parametrize("cls", [InpaintConf, TrainConf])
def test_every_key_is_documented_in_one_sentence(cls):
    docs = describe(cls)
    for doc in docs:
        assert doc.text[0].isupper() or doc.text.startswith(("cpu", "`"))
        assert doc.text.endswith(".")
        assert ". " not in doc.text, doc.key
        assert doc.type
        assert doc.default
    assert len({doc.key for doc in docs}) == len(docs)


@pytest.mark.parametrize("cls", [InpaintConf, TrainConf])
def test_help_has_all_keys_and_fits_the_terminal(cls):
    text = help_text(cls, width=80)
    assert all(f"  {doc.key}  (" in text for doc in describe(cls))
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith("      "))


PIECES = (
    *"[]{}:,-?&*!|>'\"#%@`=~\n\t ",
    *("&a ", "*a", "<<: ", "!!int ", "!!float ", "!!binary ", "---\n", "name: a\n", "seed: "),
    *("!!set ", "!!map ", "!!omap ", "!!timestamp ", "1:1:1.0", '"\\U'),
    *("data: ", "1e5", "0x1", "2024-13-45", "null", "yes", "\x00", "\ud800"),
)
texts = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


def check(path, start, *overrides):
    """A conf loads and survives being written, or its error is one line that begins so."""
    try:
        loaded = load_conf(path, InpaintConf, overrides)
    except UserError as error:
        assert str(error).startswith(start)
        assert len(str(error).splitlines()) == 1
    else:
        assert conf_from_dict(conf_to_dict(loaded), InpaintConf) == loaded


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40) | texts, raw=st.binary(max_size=60))
def test_any_text_loads_or_is_a_user_error(tmp_path_factory, text, raw):
    path = tmp_path_factory.getbasetemp() / "any.yml"
    path.write_text(BASE)
    for option in (text, f"seed={text}", f"data={text}"):
        check(path, "--set", option)
    for content in (raw, BASE.encode() + text.encode("utf-8", "surrogatepass")):
        path.write_bytes(content)
        check(path, str(path))
