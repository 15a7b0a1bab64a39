"""Figures apart by text and role: in evaluation.json, the report, the table of latents; against masks by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import crosscode
from crosscode.analysis.latents_pass import study_latents
from crosscode.build.data import build_token_loader
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
    values["evaluation"] = {"n_tokens": 400, "loss_recovered_n_tokens": 100}
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
    assert json.loads((run.path / "summary.json").read_text())["groups"] == stored
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
    assert "role: assistant" in page and "source: " in page
    assert "loss recovered two" in page and "two-specific" in page


def test_loss_recovered_is_split_by_the_predicted_token(run):
    """Against plain `transformers` with a hook of the test's own."""
    found = run.evaluate().loss_recovered
    experiment, by_role = run.experiment, {}
    for batch in build_token_loader(experiment, heldout=True):
        acts = experiment.harvester.harvest(batch.tokens_HS, batch.segments_HS).float()
        recon = acts[:, :, :, 0].clone()
        with torch.no_grad():
            recon[batch.mask_HS] = run.model(acts[batch.mask_HS])[:, :, 0]
        for m, name in enumerate(found):
            clean, spliced, zero = (
                _losses(experiment.harvester.models[m].model, batch, new_HSD)
                for new_HSD in (None, recon[:, :, m], torch.zeros_like(recon[:, :, m]))
            )
            for h, s in (batch.mask_HS[:, :-1] & batch.mask_HS[:, 1:]).nonzero().tolist():
                role = ROLES[int(batch.labels.role_T[h, s + 1])]
                losses = [clean[h, s], spliced[h, s], zero[h, s]]
                by_role.setdefault((name, role), []).append(losses)
        if sum(len(some) for some in by_role.values()) >= 2 * found[name].n_tokens:
            break
    for (name, role), losses in by_role.items():
        of = found[name].groups["role"][role]
        assert of.n_tokens == len(losses)
        means = torch.tensor(losses, dtype=torch.float64).mean(0).tolist()
        assert [of.ce_clean, of.ce_spliced, of.ce_zero] == pytest.approx(means, rel=1e-5)
    assert {role for _, role in by_role} == {*found[name].groups["role"]} > {"assistant", "text"}
    assert sum(of.n_tokens for of in found[name].groups["role"].values()) == found[name].n_tokens


def _losses(model, batch, new_HSD):
    def swap(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.where(batch.mask_HS[..., None], new_HSD, hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = None if new_HSD is None else model.model.layers[1].register_forward_hook(swap)
    with torch.no_grad():
        logits = model(batch.tokens_HS).logits.double()
    if handle is not None:
        handle.remove()
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch.tokens_HS[:, 1:], reduction="none")


def test_scaling_and_verdicts_are_split_as_if_a_group_were_all_there_is(run):
    experiment = run.experiment
    number, (verdict,) = ROLES.index("assistant"), run.verdicts_by_group["role"]["assistant"]
    alone = [
        replace(batch, mask_HS=batch.mask_HS & (batch.group_HSG[..., 1] == number))
        for batch in experiment.heldout_batches()
    ]
    study = study_latents(run.model, alone, experiment.split, experiment.output_names())
    (expected,), table = study.verdicts, run.table()
    assert not study.apart and verdict.tag == expected.tag and verdict.why == expected.why
    assert verdict.ranking("two") == expected.ranking("two") and verdict.difference == pytest.approx(
        expected.difference
    )
    for kind, share in study.pairs[0].scaling.shares.items():
        torch.testing.assert_close(
            torch.tensor(table[f"nu_{kind}_assistant"].to_numpy()), share.nu_L, rtol=1e-6, atol=1e-9, equal_nan=True
        )
    torch.testing.assert_close(
        torch.tensor(table["effect_assistant"].to_numpy()), study.pairs[0].effect_L, equal_nan=True
    )
    assert table["tag_assistant"].tolist() == expected.names and "why_assistant" not in table
