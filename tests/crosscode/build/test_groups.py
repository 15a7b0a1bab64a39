"""Figures apart by text and role: in evaluation.json, the report, the table of latents; against masks by hand."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import crosscode
from crosscode.data.text.labels import ROLES
from crosscode.evaluation.fvu import FvuAccumulator

TEMPLATE = "{% for m in messages %}{{ ' <s> ' + m['role'] + ' ' + m['content'] }}{% endfor %}"


@pytest.fixture
def run(tiny_config, tiny_corpus, save_tiny_lm, tmp_path):
    from transformers import AutoTokenizer

    words = ["user", "assistant", *(f"w{i}" for i in range(60))]
    paths = [str(save_tiny_lm(tmp_path / name, seed, words)) for seed, name in enumerate(("one", "two"))]
    for path in paths:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(path)
    rows = [json.loads(line)["text"] for line in Path(tiny_corpus).read_text().splitlines()]
    chats = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in zip(rows[::2], rows[1::2], strict=True)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    parts = [
        {"source": {"type": "local", "path": tiny_corpus}},
        {"source": {"type": "local", "path": str(tmp_path / "chats.jsonl"), "column": "messages"}},
    ]
    values = {**tiny_config, "language_models": [{"path": path} for path in paths]}
    values["data"] = {**values["data"], "source": {"type": "mixture", "parts": parts}}
    values["evaluation"] = {"n_tokens": 400, "loss_recovered": "never"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return crosscode.train(tmp_path / "config.yaml", progress=False)


def test_figures_are_split_by_text_and_role(run):
    result = run.evaluate()
    assert [*result.groups] == ["source", "role"]
    assert {"text", "user", "assistant"} <= {*result.groups["role"]} <= {"text", "user", "assistant", "template"}
    for kind in ("source", "role"):
        assert sum(group.n_tokens for group in result.groups[kind].values()) == result.n_tokens
    experiment, model = run.experiment, run.model
    by_hand, l0 = {}, {}
    for batch in experiment.heldout_batches():
        acts, roles = batch.usable(), batch.group_HSG[batch.mask_HS][:, 1]
        for role in roles.unique().tolist():
            x = acts[roles == role]
            found = model.forward_train(x)
            by_hand.setdefault(ROLES[role], FvuAccumulator(model.out_dims)).update(x, found.output_BXoDo)
            l0.setdefault(ROLES[role], []).append(found.latents.l0_B())
    for role, figures in result.groups["role"].items():
        assert figures.fvu == pytest.approx(by_hand[role].fvu(), rel=1e-5)
        assert figures.l0 == pytest.approx(float(torch.cat(l0[role]).double().mean()))
        assert [*figures.fvu_by_position.values()] == pytest.approx(by_hand[role].fvu_Xo().flatten().tolist(), rel=1e-5)
    stored = json.loads((run.path / "evaluation.json").read_text())["groups"]
    assert stored["role"]["assistant"]["n_tokens"] == result.groups["role"]["assistant"].n_tokens
    table = run.table()
    per_role = {role: table[f"density_{role}"] * figures.n_tokens for role, figures in result.groups["role"].items()}
    assert (sum(per_role.values()).round() == table["firings"]).all()
    of_texts = [
        name
        for name in table.columns
        if name.startswith("density_") and name not in {f"density_{role}" for role in ROLES}
    ]
    assert len(of_texts) == 2
    page = run.report().read_text()
    assert "role: assistant" in page
    assert "source: " in page
