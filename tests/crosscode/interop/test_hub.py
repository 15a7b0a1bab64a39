"""Push, pull and load through a local double of the hub's HTTP interface."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
import yaml

from crosscode.commands.cli import main
from crosscode.interop.hub import contents, is_repo
from crosscode.models import BaseCrosscoder
from crosscode.runs.run_files import read_marker

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of it as `huggingface_hub` asks for: one revision of each repository, files in the commits themselves."""

    def log_message(self, format, *args):
        pass

    def _send(self, value, code=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        sent, repos = self.rfile.read(int(self.headers["Content-Length"])), self.server.repos
        if self.path.endswith("/create"):
            value = json.loads(sent)
            name = f"{value.get('organization') or 'somebody'}/{value['name']}"
            repos.setdefault(name, {})
            self.server.made.append(value)
            return self._send({"url": f"{self.server.address}/{name}", "name": name})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(sent)["files"]]
            return self._send({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        if "/commit/" in self.path:
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/{name}/commit/{COMMIT}"
            return self._send({"success": True, "commitUrl": url, "commitOid": COMMIT})
        self._send({})

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.server.repos:
                return self._send({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            files = self.server.repos[name]
            if "tree" in parts:
                listed = [{"type": "file", "path": f, "size": len(t), "oid": _sha(t)} for f, t in files.items()]
                return self._send(listed)
            siblings = [{"rfilename": file} for file in files]
            return self._send({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False})
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        if file not in self.server.repos.get(name, {}):
            return self._send({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        content = self.server.repos[name][file]
        self._send(content, ETag=f'"{_sha(content)}"')

    do_HEAD = do_GET


def _sha(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.made, server.address = {}, [], f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    # The library reads these once, when it is imported: commands run in a process of their own.
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield server
    server.shutdown()


SCRIPT = """
import json, sys
import crosscode
from crosscode.commands.cli import main
print(json.dumps([main(words) for words in json.loads(sys.argv[1])]))
print(crosscode.BaseCrosscoder.from_pretrained("somebody/diff").n_latents if len(sys.argv) > 2 else "")
"""


def commands(*words, then_load=False):
    """Exit codes of commands in a process of their own, and all that they say."""
    arguments = [json.dumps(words), *(["load"] if then_load else [])]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    codes = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    return codes, done.stdout + done.stderr


@pytest.fixture
def run_dir(awkward, tmp_path):
    """A folder that looks like a run, with what belongs on the hub and what does not."""
    path = tmp_path / "run"
    case = awkward("crosscoder_2x1", "batch_topk_by_norm")
    case.model.save(path / "final")
    (path / "config.yaml").write_text("name: run\n")
    figures = {"fvu": 0.123456, "l0": 31.5, "dead_fraction": 0.25, "fvu_by_position": {"base/x": 0.1}}
    (path / "evaluation.json").write_text(json.dumps(figures))
    (path / "metrics.jsonl").write_text("{}")
    (path / "notes.txt").write_text("mine")
    (path / "checkpoints" / "step_5").mkdir(parents=True)
    (path / "checkpoints" / "step_5" / "trainer_state.json").write_text("{}")
    return path, case


@pytest.mark.slow
def test_a_model_goes_up_and_comes_down(hub, run_dir, tmp_path):
    path, case = run_dir
    pull = ["pull", "somebody/diff", "--out", str(tmp_path / "pulled")]
    codes, said = commands(
        ["push", str(path), "somebody/diff", "--license", "mit", "--private"],
        pull,
        pull,
        ["pull", "somebody/nothing", "--out", str(tmp_path / "none")],
        ["export", "somebody/diff", "--to", "dictionary-learning", "--out", str(tmp_path / "out")],
        ["verify", "somebody/diff"],
        ["evaluate", "somebody/diff"],
        then_load=True,
    )
    assert codes == [0, 0, 2, 2, 0, 1, 2], said  # the figures and the config are made up
    assert said.count("whole ") >= 3, "a repository is verified as the run that it is pulled as"
    assert f"hf/crosscode/somebody/diff/{COMMIT}" in said, "where evaluate looked"
    assert said.splitlines()[-1] == "24" or "24" in said.splitlines()
    assert "is there already" in said and "hub 'somebody/nothing': " in said and "Traceback" not in said
    assert "private" in (hub.made[0].get("visibility"), *hub.made[0])
    files = hub.repos["somebody/diff"]
    belongs = "README.md checksums.json config.json config.yaml evaluation.json model.safetensors"
    assert sorted(files) == belongs.split()
    _, front, text = files["README.md"].decode().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "crosscode" and front["license"] == "mit"
    assert front["base_model"] == ["somebody/base", "somebody/tuned"]
    assert "| FVU | 0.1235 |" in text and 'from_pretrained("somebody/diff")' in text and "```yaml\nname: run" in text
    assert read_marker(tmp_path / "pulled")["kind"] == "run", "one with a config is a run again"
    pulled = BaseCrosscoder.load(tmp_path / "pulled" / "final", backend="torch")
    assert torch.equal(pulled(case.raw_BXiDi), case.model(case.raw_BXiDi))
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "none").exists()


def test_files_of_another_library_are_imported_from_a_repository(hub, awkward, tmp_path):
    case = awkward("set", "jumprelu")
    folder = case.model.export("circuit-tracer", tmp_path / "out")
    hub.repos["them/set"] = {file.name: file.read_bytes() for file in folder.iterdir()} | {
        "evil.py": b"",
        "a/b.bin": b"",
    }
    hub.repos["them/none"] = {"sub/params.npz": b""}
    codes, said = commands(
        ["import", "them/set", "--out", str(tmp_path / "model")],
        ["import", "them/none", "--out", str(tmp_path / "none")],
    )
    assert codes == [0, 2] and "no files of those libraries at its top" in said, said
    back = BaseCrosscoder.load(tmp_path / "model", backend="torch")
    torch.testing.assert_close(back(case.raw_BXiDi), case.model(case.raw_BXiDi))


def test_feature_files_go_up_beside_the_model_and_a_data_set_by_itself(hub, run_dir, tmp_path, capsys):
    path, _ = run_dir
    (tmp_path / "a" / "features").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    for file in ("a/features/index.json.gz", "a/features/layer_0.bin", "b/latents.parquet", "b/README.md"):
        (tmp_path / file).write_text("x")
    push = ["push", str(path), "somebody/diff", "--dry-run", "--features"]
    assert main([*push, str(tmp_path / "a")]) == 0 and main([*push, str(tmp_path / "b")]) == 0
    beside, apart = capsys.readouterr().out.split("model somebody/diff\n")[1:]
    assert "features/layer_0.bin" in beside and "dataset" not in beside
    assert "latents.parquet" in apart.split("dataset somebody/diff-latents")[1]
    codes, said = commands([word for word in push if word != "--dry-run"] + [str(tmp_path / "a")])
    assert codes == [0] and "features/layer_0.bin" in hub.repos["somebody/diff"], said
    assert main([*push, str(tmp_path)]) == 2
    assert "holds nothing that `crosscode features" in capsys.readouterr().err


def test_paths_of_this_machine_are_said_and_run_dir_stays_here(run_dir, caplog, capsys):
    path, _ = run_dir
    (path / "config.yaml").write_text("name: run\nrun_dir: /home/me/run\ndata: {cache: {path: /home/me/store}}\n")
    with caplog.at_level("WARNING"):
        text = contents(path / "final", path, "somebody/diff")["config.yaml"]
    assert "run_dir" not in text and "data.cache.path = '/home/me/store'" in caplog.text


def test_a_dry_run_shows_what_would_go_up(run_dir, capsys):
    path, _ = run_dir
    assert main(["push", str(path), "somebody/diff", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "model.safetensors" in said and "library_name: crosscode" in said
    assert "notes.txt" not in said and "metrics.jsonl" not in said and "trainer_state" not in said
    assert main(["push", str(path), "nobody", "--dry-run"]) == 2
    assert main(["push", str(path)]) == 2


def test_a_folder_that_is_missing_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_repo("somebody/model") and not is_repo("runs/model")
    assert not any(map(is_repo, ("model", "a/b/c", "./a", "/a/b", "~/a", "../a/b")))
