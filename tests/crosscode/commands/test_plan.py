"""`crosscode plan`; that the bytes are those that processes send: tests/crosscode/parallel, tests/check/test_ranks.py."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from crosscode.build.foresight import weight_bytes
from crosscode.build.plan import GPUS, plan
from crosscode.build.schema import check_config, read_yaml
from crosscode.commands.cli import main
from crosscode.config.language_models import LanguageModelConfig
from crosscode.data.harvest.loading import load_skeleton


def test_memory_of_the_coder_falls_with_the_ranks():
    one, four = plan(check_config(read_yaml("topk_crosscoder")), [1, 4], GPUS["h100"])
    assert one.memory and four.memory and four.sent and one.sent
    assert four.memory["coder"] == pytest.approx(one.memory["coder"] / 4, rel=0.02)  # biases are whole everywhere
    assert four.memory["language models"] == one.memory["language models"]
    assert one.sent["step"] == 0 and four.sent["step"] > 0


def test_a_gradient_that_is_not_computed_takes_no_memory():
    values = read_yaml("topk_crosscoder") | {"backend": "triton"}
    coders = []
    for fused, kind in ((False, "topk"), (True, "topk"), (True, "relu")):
        values["train"]["optimizer"]["fused"] = fused
        values["crosscoder"]["activation"] = {"type": kind} | ({"k": 32} if kind == "topk" else {})
        (one,) = plan(check_config(values), [1], GPUS["h100"])
        assert one.memory
        coders.append(one.memory["coder"])
    plain, fused, of_relu = coders
    assert fused == 0.75 * plain and of_relu == plain  # a ReLU's are dense products


@pytest.mark.parametrize(
    ("changes", "graphs"), [({}, 2), ({"cuda_graph": False}, 0), ({"log_every": 1}, 0), ({"grad_accumulation": 2}, 0)]
)
def test_captured_steps_keep_memory_of_their_own(changes, graphs):
    """With AuxK there are two: before and from when on latents may be dead."""
    values = read_yaml("topk_crosscoder")
    sizes = []
    for auxk in ({}, {"auxk": {"k_aux": 8}}):
        train = values["train"] | {"cuda_graph": True} | changes
        one, four = plan(
            check_config(values | {"train": train, "objective": {"recon": {}} | auxk}), [1, 4], GPUS["h100"]
        )
        assert one.memory and four.memory and "captured steps" not in four.memory  # several processes capture none
        sizes.append(one.memory.get("captured steps", 0.0))
        if graphs:
            assert sizes[-1] > one.memory["coder"] / 4  # the gradient alone
    assert (sizes[1] > 1.9 * sizes[0]) if graphs else sizes == [0.0, 0.0]


def test_memory_never_grows_with_the_ranks_and_parts_of_a_batch_keep_less():
    values = read_yaml("batch_topk_crosscoder")
    changed = (values | {"train": values["train"] | {"grad_accumulation": n}} for n in (1, 4))
    whole, in_parts = (plan(check_config(each), [1 << i for i in range(10)], GPUS["h100"]) for each in changed)
    for plans in (whole, in_parts):
        sums = [sum(one.memory.values()) for one in plans if one.memory]
        assert len(sums) == 10 and sums == sorted(sums, reverse=True)
    for one, other in zip(whole, in_parts, strict=True):
        assert one.memory and other.memory and other.memory["batch"] < one.memory["batch"]
        assert one.sent and other.sent and (one.ranks == 1 or other.sent["step"] > one.sent["step"])


def test_the_command_shows_a_line_for_each_number_of_ranks_and_names_what_is_refused(capsys):
    options = ["--crosscoder.n_latents", "300", "--crosscoder.activation", "{type: groupmax, k: 3}"]
    assert main(["plan", "demo", "--ranks", "3", "--gpu", "a100", *options]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()[2:13]
    assert [int(line.split()[0]) for line in lines] == [1, 2, 3, *(2**i for i in range(2, 10))]
    assert "crosscoder.activation.k = 3: GroupMax needs a number that the processes divide" in lines[-1]
    assert "predictions" in said and "one of 3:" in said and "A100" in said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("named", [True, False])
def test_a_language_model_counts_in_the_dtype_it_runs_in(dtype, named, tmp_path):
    """Also where its configuration names none: then it is that of its files."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape)).to(dtype)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values if named else {k: v for k, v in values.items() if k != "dtype"}))
    n_bytes = sum(weight.nbytes for weight in AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
    config = LanguageModelConfig(path=str(tmp_path))
    assert weight_bytes(config, load_skeleton(str(tmp_path))) == n_bytes
