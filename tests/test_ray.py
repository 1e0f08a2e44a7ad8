"""runs/ray_train.py: two local workers of Ray continue a run of one process, and end with its losses."""
import json
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, SMALL, losses, run


def test_two_workers_resume_the_run_of_one_process(tiny, tmp_path):
    pytest.importorskip("ray.train.torch")
    if subprocess.run([sys.executable, "-c", "import ray; ray.init(num_cpus=2, include_dashboard=False)"], capture_output=True).returncode:
        pytest.skip("Ray itself does not start on this machine")
    flags = [f"--dataset={tiny}", *SMALL, "--compile=off", "--log_every=1", "--eval_every=0", "--max_steps=6", "--save_every=3"]
    run(ROOT / "train.py", *flags, f"--out={tmp_path / 'one'}", cwd=tmp_path)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/state/step-0000006")
    run(ROOT / "runs/ray_train.py", "--workers=2", "--failures=0", "--", *flags, f"--out={tmp_path / 'two'}", cwd=tmp_path, fresh=True)
    ours, theirs = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(ours) == 6 and len(theirs) >= 6 and theirs[-3:] == pytest.approx(ours[-3:], abs=1e-5)
    manifest = json.loads((tmp_path / "two/manifest.json").read_text(encoding="utf-8"))
    assert len(manifest["resumed"]) == 1


def test_bad_flags_are_one_line_before_ray_starts(tmp_path):
    done = run(ROOT / "runs/ray_train.py", "--", "--max_steps=6", cwd=tmp_path, check=False)
    assert done.returncode and done.stderr.startswith("give the run a folder") and done.stderr.count("\n") == 1
    done = run(ROOT / "runs/ray_train.py", "--workers=0", "--", f"--out={tmp_path}", cwd=tmp_path, check=False)
    assert done.returncode and done.stderr == "--workers=0: must be at least 1\n"
    done = run(ROOT / "runs/ray_train.py", "--", "--max_steps=-6", f"--out={tmp_path}", cwd=tmp_path, check=False)
    assert done.returncode and done.stderr.startswith("--max_steps=-6") and done.stderr.count("\n") == 1
