"""What `make test-versions` runs, and that it says what it does not."""

import configparser
import re

import pytest

from keras_milr import _keras
from tests import versions


def test_the_oldest_are_the_bounds_of_the_package():
    bounds = versions.lower_bounds()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", bound) for bound in bounds)
    oldest = dict(bound.split("==") for bound in bounds)
    assert set(oldest) > {*versions.SHOWN, "matplotlib", "pytest"}
    assert _keras.TESTED.split(" to ")[0] == oldest["keras"]


def test_all_pythons_that_the_package_names():
    config = configparser.ConfigParser()
    config.read(versions.ROOT / "setup.cfg")
    named = re.findall(r":: (3\.\d+)", config["metadata"]["classifiers"])
    assert set(versions.PYTHONS.values()) == set(named)
    assert config["options"]["python_requires"] == f">={named[0]}"
    assert versions.PYTHONS["oldest"] == named[0]


def test_a_python_that_is_not_there_is_named_and_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(versions, "PYTHONS", {"9.9": "9.9"})
    monkeypatch.setattr("sys.argv", ["versions", "--pythons", "/no/such", "python3"])
    with pytest.raises(SystemExit, match="1"):
        versions.main()
    said = capsys.readouterr().out
    assert said == "9.9: FAILED: NOT RUN: no Python 9.9 was found\n"
