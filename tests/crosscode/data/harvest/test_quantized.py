"""Packed weights of bitsandbytes: activations are those of `transformers` and `peft`, bases are shared, fingerprints stay."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from crosscode.data import ActivationHarvester, load_language_model
from crosscode.data.harvest.language_models import wrap_language_model
from crosscode.errors import InputError

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS_HS = torch.randint(128, (3, 9), generator=torch.Generator().manual_seed(0))
NAMES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
IN_BITS = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    8: {"load_in_8bit": True},
}
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
CASES = [(4, ["lora", "dora"]), (8, ["lora", "rslora"])]
"""`peft` itself fails at the second run of DoRA on 8 bits on a CPU."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folders = {kind: str(tmp_path_factory.mktemp(kind)) for kind in KINDS}
    for kind, options in KINDS.items():
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folders[kind])
    return folders


def plain_acts(base, bits, adapter=None):
    """Of both layers, by hooks of our own on the libraries' own classes, in a model that nothing else was done with."""
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**IN_BITS[bits]), dtype="auto", device_map={"": "cpu"}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    whole = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        whole(input_ids=TOKENS_HS)
    return torch.stack(seen, dim=2).float()


@pytest.mark.parametrize(("bits", "kinds"), CASES)
def test_base_and_two_adapters_are_those_of_the_libraries(bits, kinds, base, adapters):
    loaded = {}
    models = [
        load_language_model(base, adapter=kind and adapters[kind], quantization=IN_BITS[bits], loaded=loaded)
        for kind in (None, *kinds)
    ]
    before = [model.fingerprint() for model in models]
    acts_HSMPD = ActivationHarvester(models, NAMES).harvest(TOKENS_HS)
    for m, kind in enumerate((None, *kinds)):
        plain = plain_acts(base, bits, kind and adapters[kind])
        assert torch.equal(acts_HSMPD[:, :, m], plain), kind
    assert len(set(before)) == len(models)
    assert [model.fingerprint() for model in models] == before
    assert torch.equal(ActivationHarvester(models, NAMES).harvest(TOKENS_HS), acts_HSMPD)
    where = [{weight.data_ptr() for weight in model.model.parameters()} for model in models]
    assert where[0] <= where[1] & where[2]


@pytest.mark.parametrize("bits", IN_BITS)
def test_a_bridge_over_an_adapter_leaves_the_base_as_it_is(bits, base, adapters):
    loaded = {}
    models = [
        load_language_model(base, adapter=adapter, quantization=IN_BITS[bits], loaded=loaded)
        for adapter in (None, adapters["lora"])
    ]
    before = ActivationHarvester(models, NAMES).harvest(TOKENS_HS)
    ActivationHarvester(models, ["blocks.1.attn.hook_rot_q"]).harvest(TOKENS_HS)
    assert torch.equal(ActivationHarvester(models, NAMES).harvest(TOKENS_HS), before)


class Packed(torch.Tensor):
    """As torchao packs weights: a tensor that cannot be viewed, of tensors within."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


def test_fingerprint_reads_what_a_packed_tensor_holds(base):
    def of(code, scale):
        model = LlamaForCausalLM.from_pretrained(base)
        packed = Packed(torch.full((128, 64), code, dtype=torch.int8), torch.tensor(scale))
        model.lm_head.weight = torch.nn.Parameter(packed, requires_grad=False)
        return wrap_language_model(model, None).fingerprint()

    assert of(1, 1.0) == of(1, 1.0)
    assert len({of(1, 1.0), of(2, 1.0), of(1, 2.0)}) == 3


def test_whatever_a_quantisation_library_raises_is_one_line(base, monkeypatch):
    def refuse(_fields):
        raise AssertionError("expected 'default'")

    monkeypatch.setattr("transformers.quantizers.auto.AutoQuantizationConfig.from_dict", refuse)
    with pytest.raises(InputError, match=r"quantization = .*torchao.*: expected 'default'"):
        load_language_model(base, quantization={"quant_method": "torchao", "quant_type": "int8"})
