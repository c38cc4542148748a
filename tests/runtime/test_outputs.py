"""What a killed `save` left is known of a folder without listing it for each of its files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cdiff.runtime import outputs
from cdiff.runtime.files import PART
from cdiff.runtime.outputs import cut_short


def test_a_folder_is_listed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[Path] = []
    reports = outputs._reports
    monkeypatch.setattr(outputs, "_reports", lambda folder: listed.append(folder) or reports(folder))

    def age(seconds: int) -> None:
        past = time.time_ns() - seconds * 10**9
        os.utime(tmp_path, ns=(past, past))

    age(60)
    assert [cut_short(tmp_path) for _ in range(5)] == [set()] * 5
    assert len(listed) == 1
    (tmp_path / f"{PART}1.json").write_text(json.dumps({"outputs": {"a_mask.nii.gz": {}}}))
    # So soon after a change the folder's time says nothing of another one.
    assert [cut_short(tmp_path) for _ in range(2)] == [{"a_mask.nii.gz"}] * 2
    assert len(listed) == 3
    age(30)
    assert [cut_short(tmp_path) for _ in range(2)] == [{"a_mask.nii.gz"}] * 2
    assert len(listed) == 4
    (tmp_path / f"{PART}2.json").write_text('{"cases": ')
    assert cut_short(tmp_path) == {"a_mask.nii.gz"}, "another program of this package was killed there too"
    assert cut_short(tmp_path / "none") == set()
