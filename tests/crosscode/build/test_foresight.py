"""What is refused before a language model is loaded: each with its field, its value and what would be right."""

import math
import resource
from pathlib import Path

import pytest
import torch

from crosscode.build import experiment as experiment_module
from crosscode.build.experiment import open_experiment
from crosscode.build.schema import check_config
from crosscode.config.language_models import LanguageModelConfig
from crosscode.data import load_language_model
from crosscode.errors import InputError
from crosscode.files import check_may_be_filled
from crosscode.seeds import derived_seed


@pytest.fixture
def refusal(tiny_config, monkeypatch):
    """The message with which a changed config is refused; loading a language model fails the test."""

    def never(*args, **kwargs):
        raise AssertionError("a language model was about to be loaded")

    monkeypatch.setattr(experiment_module, "open_activations", never)

    def refuse(**changes):
        for path, value in changes.items():
            section, *rest = path.split("__")
            target = tiny_config
            for name in [section, *rest][:-1]:
                target = target[name]
            target[[section, *rest][-1]] = value
        with pytest.raises(InputError) as error:
            open_experiment(check_config(tiny_config))
        message = str(error.value)
        assert "\n" not in message
        return message

    return refuse


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 2**63}, "seed = 9223372036854775808"),
        ({"seed": -1}, "seed = -1"),
        ({"train__optimizer": {"type": "adam", "betas": [0.9, 1.0]}}, "train.optimizer.betas.1 = 1.0"),
        ({"train__optimizer": {"type": "adam", "betas": [-0.1, 0.9]}}, "train.optimizer.betas.0 = -0.1"),
        ({"train__optimizer": {"type": "adam", "lr": math.inf}}, "train.optimizer.lr = inf"),
        ({"train__optimizer": {"type": "adam", "eps": math.nan}}, "train.optimizer.eps = nan"),
        ({"train__clip_grad_norm": math.inf}, "train.clip_grad_norm = inf"),
        ({"objective": {"recon": {"weight": -1.0}}}, "objective.recon.weight"),
        ({"objective": {"recon": {"weight": math.nan}}}, "objective.recon.weight"),
        ({"data__mask_token_ids": [-3]}, "data.mask_token_ids.0 = -3"),
        ({"data__token_workers": 5000}, "data.token_workers = 5000"),
        ({"data__shuffle_buffer_size": 3}, "data.shuffle_buffer_size = 3"),
    ],
)
def test_values_out_of_their_domain(refusal, changes, named):
    assert named in refusal(**changes)


def test_a_hookpoint_beyond_the_last_layer(refusal):
    assert "blocks.99.hook_resid_post" in refusal(hookpoints=["blocks.99.hook_resid_post"])


def test_a_sequence_longer_than_the_model_takes(refusal):
    message = refusal(data__sequence_length=100_000)
    assert message.startswith("data.sequence_length = 100000: ") and "at most" in message


def test_a_shuffle_buffer_that_no_memory_holds(refusal):
    message = refusal(data__shuffle_buffer_size=10**12)
    assert message.startswith("data.shuffle_buffer_size = 1000000000000: ") and "would fit" in message


def test_a_dictionary_that_no_memory_holds_and_one_that_the_process_may_not_take(refusal):
    assert refusal(crosscoder__n_latents=10**10).startswith("crosscoder.n_latents = 10000000000: ")
    before = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/status").read_text().splitlines()
    used = int(next(line for line in status if line.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        message = refusal(crosscoder__n_latents=4_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert message.startswith("crosscoder.n_latents = 4000000: ")


def test_the_corrected_size_is_taken(refusal, tiny_config):
    message = refusal(crosscoder__n_latents=10**10)
    fits = int(float(message.rpartition("about ")[2].split()[0]) * 0.5)
    tiny_config["crosscoder"]["n_latents"] = fits - fits % 8
    with pytest.raises(AssertionError, match="about to be loaded"):
        open_experiment(check_config(tiny_config))


def test_a_revision_of_what_lies_here_is_refused_at_its_field(refusal, tiny_config):
    given = [{**m, "revision": "step1000"} for m in models(tiny_config)]
    assert refusal(language_models=given).startswith("language_models.0.revision = 'step1000': ")


def test_seeds_of_streams_fit_a_generator_and_are_what_they_were():
    assert derived_seed(7, 3, 5) == (7 * 1_000_003 + 3) * 1_000_003 + 5
    torch.Generator().manual_seed(derived_seed(2**63 - 1, 3, 5))


def test_language_models_that_cannot_fit_are_refused_with_the_numbers(refusal, tiny_config, monkeypatch):
    from crosscode.build import foresight

    monkeypatch.setattr(foresight, "_memory", lambda device: 20_000)
    message = refusal()
    assert "language_models.0.path = " in message
    assert "billion weights in float32 take" in message
    assert "are free on cpu" in message
    n_bytes = sum(
        p.numel() * 4 for p in load_language_model(tiny_config["language_models"][0]["path"]).model.parameters()
    )
    monkeypatch.setattr(foresight, "_memory", lambda device: n_bytes)
    assert "language_models.1.path = " in refusal()
    monkeypatch.setattr(foresight, "_memory", lambda device: n_bytes // 2)
    assert "language_models.1.path = " in refusal(
        language_models=[{**m, "dtype": "bfloat16"} for m in models(tiny_config)]
    )
    packed = {"quantization": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    monkeypatch.setattr(foresight, "_memory", lambda device: n_bytes // 8 - 1)
    monkeypatch.setattr(foresight, "check_options", lambda *_: None)  # that bitsandbytes is installed
    assert "billion weights packed take" in refusal(language_models=[{**m, **packed} for m in models(tiny_config)])
    assert [foresight.dtype_bytes(name) for name in ("float64", "float32", "bfloat16", "float16")] == [8, 4, 2, 2]


def test_ids_to_mask_are_tokens(refusal):
    assert refusal(data__mask_token_ids=[1, 999_999]).startswith("data.mask_token_ids: 999999 is no token of")


def test_run_directories_have_names_that_can_be_printed_and_made(refusal):
    assert refusal(run_dir="a\nb").startswith("run_dir = ")
    with pytest.raises(InputError, match=r"^run_dir = .* is a longer path"):
        check_may_be_filled("/".join(["a" * 200] * 30), "run_dir")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attn_implementation": "nothing"}, "attn_implementation = 'nothing': Specified"),
        (
            {"attn_implementation": "someone/kernel"},
            "attn_implementation = 'someone/kernel': would run code from the hub",
        ),
        ({"quantization": {"quant_method": "none"}}, "quantization = {'quant_method': 'none'}: Unknown"),
        ({"quantization": {"quant_method": "fp8"}}, "quantization = {'quant_method': 'fp8'}: "),
        ({"quantization": {}}, "quantization = {}: set load_in_4bit or load_in_8bit"),
        (
            {"quantization": {"quant_method": "awq"}},
            "quantization = {'quant_method': 'awq'}: this method reads weights",
        ),
        ({"device_map": "somewhere"}, "device_map = 'somewhere': "),
        ({"device_map": {}}, "device_map = {}: places nothing"),
        ({"device_map": {"": "meta"}}, "device_map = {'': 'meta'}: device = 'meta': holds no numbers"),
        ({"device": "meta"}, "device = 'meta': holds no numbers"),
        ({"device": "cuda:99"}, "device = 'cuda:99': not available here"),
        ({"device_map": {"model": "cpu", "lm_head": 99}}, "device_map = {'model': 'cpu', 'lm_head': 99}: "),
    ],
)
def test_options_of_transformers_are_judged_before_a_model_is_loaded(options, said, refusal, tiny_config):
    first, second = models(tiny_config)
    assert refusal(language_models=[first, {**second, **options}]).startswith(f"language_models.1.{said}")


def test_a_base_that_two_models_share_is_counted_once(tiny_config, monkeypatch):
    from crosscode.build import foresight

    base = models(tiny_config)[0]
    n_bytes = sum(p.numel() * 4 for p in load_language_model(base["path"]).model.parameters())
    monkeypatch.setattr(foresight, "_memory", lambda device: n_bytes)
    two = [base, {**base, "name": "again"}]
    assert foresight.check_language_models(check_config({**tiny_config, "language_models": two})).widest == 16


def models(config):
    return [{"path": model["path"]} for model in config["language_models"]]


@pytest.mark.parametrize(
    ("fields", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, 8),
        ({"quant_method": "quanto", "weights": "int2"}, 2),
        ({"quant_method": "quanto", "weights": "float8"}, 8),
        ({"quant_method": "gptq", "bits": 3}, 3),
        ({"quant_method": "aqlm"}, 1),
    ],
)
def test_packed_weights_take_their_bits_beside_the_table_of_tokens(fields, bits, tiny_config):
    from crosscode.build import foresight

    lm = LanguageModelConfig(path=tiny_config["language_models"][0]["path"], quantization=fields, dtype="bfloat16")
    skeleton = foresight.skeleton_of(lm, "language_models.0")
    weights = {name: weight.numel() for name, weight in skeleton.model.named_parameters()}
    table = next(n for name, n in weights.items() if "embed" in name or "wte" in name)
    assert foresight.weight_bytes(lm, skeleton) == table * 2 + (sum(weights.values()) - table) * bits / 8
