"""Sets read from a Hub by streaming: the real loader, a real socket, every preset in its own layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from armorm.data.presets import PREFERENCE_PRESETS, RATING_PRESETS
from armorm.training.dataset import preset_location
from armorm.training.schema import SetSection
from tests.helpers.local_sets import local_sets
from tests.helpers.raw_layouts import PAIRED, RATED, written

pytestmark = pytest.mark.slow  # the endpoint is read when the libraries are imported: a process for each

READ = """
import json, sys
from pathlib import Path
from armorm.data.presets import PREFERENCE_PRESETS, RATING_PRESETS
from armorm.training.dataset import preset_location
from armorm.training.schema import SetSection

presets = {**RATING_PRESETS, **PREFERENCE_PRESETS}
for name in sys.argv[2:]:
    location = preset_location(presets[name], SetSection(), Path(sys.argv[1]))
    assert location.path is None
    print(json.dumps([name, [[row.file, row.number, row.values] for row in location.rows()]], default=str))
"""


def run(code: str, endpoint: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own that takes the endpoint for the Hub and has nothing in its cache."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_DATASETS_OFFLINE": "0"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def rounds() -> list[list[str]]:
    """Names of all presets, those of one hub set in different rounds."""
    found: list[dict[str, str]] = []
    for name, preset in {**RATING_PRESETS, **PREFERENCE_PRESETS}.items():
        place = next((r for r in found if preset.hub_id not in r.values()), None)
        if place is None:
            found.append(place := {})
        place[name] = preset.hub_id
    return [list(one) for one in found]


@pytest.mark.parametrize("names", rounds(), ids=lambda names: f"{len(names)} sets")
def test_every_preset_streams_from_the_hub_as_from_its_folder(tmp_path, names):
    presets = {**RATING_PRESETS, **PREFERENCE_PRESETS}
    folders, expected = {}, {}
    for name in names:
        file, rows, splits, _ = {**RATED, **PAIRED}[name]
        folders[presets[name].hub_id] = written(tmp_path / "sets", presets[name].hub_id, file, rows, splits)
        location = preset_location(presets[name], SetSection(), tmp_path / "sets")
        expected[name] = [[row.file, row.number, row.values] for row in location.rows()]
    with local_sets(folders) as hub:
        done = run(READ, hub.endpoint, tmp_path, str(tmp_path / "nothing"), *names)
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert found == json.loads(json.dumps(expected, default=str))
    for name in names:
        assert hub.revisions[presets[name].hub_id] == {presets[name].revision or "main"}


def test_nothing_is_stored_and_a_set_that_is_not_there_is_one_line(tmp_path):
    rows = [{"prompt": f"p{i}", "response": f"r{i} {'word ' * 40}", "mine": i % 5} for i in range(300)]
    folder = written(tmp_path, "someone/rated", "train.jsonl", rows)
    code = (
        "from armorm.data.sources import Location\n"
        "rows = Location.find('someone/rated').rows()\n"
        "print([next(rows).values['response'][:2] for _ in range(3)])\n"
    )
    with local_sets({"someone/rated": folder}) as hub:
        done = run(code, hub.endpoint, tmp_path)
        assert done.stdout.strip() == "['r0', 'r1', 'r2']", done.stderr[-2000:]
        cached = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        assert not [path for path in cached if b"word word" in path.read_bytes()], "no row is stored"
        missing = run(code.replace("someone/rated", "someone/else"), hub.endpoint, tmp_path)
    assert missing.stderr.strip().splitlines()[-1].startswith("armorm.errors.DataError: someone/else:")
