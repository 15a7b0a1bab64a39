"""A model with an adapter computes what `peft` computes, over weights that are held once."""

import json

import pytest
import torch

from crosscode.data import ActivationHarvester, load_language_model, load_skeleton
from crosscode.data.harvest.hookpoints import find_taps
from crosscode.errors import InputError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOKENS_HS = torch.randint(6, 46, (3, 9), generator=torch.Generator().manual_seed(0))
NAMES = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"]
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "qwen3": ["q_proj", "down_proj"],
    "gemma2": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
}
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "norms_to_save": {"modules_to_save": ["input_layernorm", "ln_1"]},
    "bias": {"bias": "all"},
    "tokens": {"trainable_token_indices": [7, 8]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "tied_head": {"target_modules": ["lm_head", "q_proj"]},
    "tied_table": {"target_modules": ["embed_tokens", "q_proj"]},
    "resized": {},
    "resized_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
}
CASES = [
    (family, kind)
    for family in TARGETS
    for kind in KINDS
    if (family, kind) != ("gpt2", "olora")  # peft itself fails
    and (family == "gemma2" or not kind.startswith("tied"))
]
AT_EVERY_HOOKPOINT = [
    pytest.param(kind, marks=[] if kind in ("lora", "rslora", "dora", "norms_to_save") else pytest.mark.soak)
    for kind in KINDS
    if kind != "olora" and not kind.startswith("tied")
]


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory, build_model, tokenizer):
    """`make_adapter(family, kind)`: folders of a base and of an adapter of random weights on it."""
    made = {}

    def make(family, kind, seed=0):
        if (family, kind, seed) in made:
            return made[family, kind, seed]
        folder = tmp_path_factory.mktemp(f"{family}_{kind}")
        base = build_model(family).eval()
        with torch.no_grad():
            for name, param in base.named_parameters():
                if name.endswith("bias"):
                    param.normal_(std=0.1)
        base.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        if kind.startswith("resized"):
            base.resize_token_embeddings(50, mean_resizing=False)
        config = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": TARGETS[family], **KINDS[kind]}
        torch.manual_seed(seed)
        base.name_or_path = base.config._name_or_path = str(folder / "base")
        model = peft.get_peft_model(base, peft.LoraConfig(**config))
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param.add_(0.3 * torch.randn(param.shape))
        model.save_pretrained(folder / "adapter")
        made[family, kind, seed] = (str(folder / "base"), str(folder / "adapter"))
        return made[family, kind, seed]

    return make


def plain_peft(base, adapter, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    rows = peft.utils.load_peft_weights(adapter, device="cpu")
    sizes = [len(rows[key]) for key in rows if key.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))]
    if sizes:
        model.resize_token_embeddings(sizes[0], mean_resizing=False)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def own_hooks(model, tokens_HS):
    """The residual stream from `hidden_states`, an MLP from a hook of one's own, and logits."""
    plain = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    blocks = next(m for m in plain.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    mlp = (
        blocks[1].mlp if not hasattr(blocks[1], "post_feedforward_layernorm") else blocks[1].post_feedforward_layernorm
    )
    seen = {}
    hooks = [
        mlp.register_forward_hook(lambda _m, _a, out: seen.update(mlp=out)),
        blocks[2].register_forward_hook(
            lambda _m, _a, out: seen.update(last=out if isinstance(out, torch.Tensor) else out[0])
        ),
    ]
    with torch.no_grad():
        out = model(input_ids=tokens_HS, output_hidden_states=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    acts_HSPD = torch.stack([out.hidden_states[0], out.hidden_states[1], seen["mlp"], seen["last"]], 2)
    return acts_HSPD, out.logits


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_activations_and_logits_are_those_of_peft_to_the_bit(family, kind, make_adapter):
    base, adapter = make_adapter(family, kind)
    expected_HSPD, logits_HSV = own_hooks(plain_peft(base, adapter), TOKENS_HS)
    model = load_language_model(base, adapter=adapter)
    acts_HSMPD = ActivationHarvester([model], NAMES).harvest(TOKENS_HS)
    assert torch.equal(acts_HSMPD[:, :, 0], expected_HSPD)
    with torch.no_grad():
        assert torch.equal(model.model(TOKENS_HS).logits, logits_HSV)
    unadapted_HSPD, _ = own_hooks(load_language_model(base).model, TOKENS_HS)
    assert not torch.equal(expected_HSPD, unadapted_HSPD) or "lm_head" in KINDS[kind].get("modules_to_save", ())


@pytest.mark.parametrize("adapter_dtype", ["float32", "auto"])
@pytest.mark.parametrize("kind", ["rslora", "dora", "modules_to_save"])
def test_on_a_half_precision_base_an_adapter_is_in_float32_or_in_the_bases_dtype(kind, adapter_dtype, make_adapter):
    from transformers import AutoModelForCausalLM

    base, adapter = make_adapter("llama", kind)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft_model = peft.PeftModel.from_pretrained(plain, adapter, autocast_adapter_dtype=adapter_dtype == "float32")
    expected_HSPD, logits_HSV = own_hooks(peft_model.eval(), TOKENS_HS)
    model = load_language_model(base, adapter=adapter, dtype="bfloat16", adapter_dtype=adapter_dtype)
    assert torch.equal(ActivationHarvester([model], NAMES).harvest(TOKENS_HS)[:, :, 0], expected_HSPD)
    with torch.no_grad():
        assert torch.equal(model.model(TOKENS_HS).logits, logits_HSV)
    lora_A = next(weight for name, weight in model.model.named_parameters() if "lora_A" in name)
    assert lora_A.dtype == (torch.float32 if adapter_dtype == "float32" else torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("kind", AT_EVERY_HOOKPOINT)
def test_every_kind_of_hookpoint_reads_what_a_hook_on_pefts_module_reads(family, kind, make_adapter):
    base, adapter = make_adapter(family, kind)
    model = load_language_model(base, adapter=adapter)
    taps = {
        name: tap for name, tap in find_taps(model).items() if "blocks." not in name or name.startswith("blocks.1.")
    }
    assert len(taps) > 15
    plain, seen = plain_peft(base, adapter).get_base_model(), {}
    places = {id(module): path for path, module in plain.named_modules(remove_duplicate=False)}
    by_path = dict(plain.named_modules(remove_duplicate=False))

    def keep(module, args, kwargs, out):
        inside = args[0] if args else kwargs["hidden_states"]
        seen[places[id(module)]] = {"in": inside, "out": out if isinstance(out, torch.Tensor) else out[0]}

    for tap in taps.values():
        by_path[tap.module_path].register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        plain(input_ids=TOKENS_HS, use_cache=False)
    for name, tap in taps.items():
        acts_HSMPD = ActivationHarvester([model], [name]).harvest(TOKENS_HS)
        expected = seen[places[id(by_path[tap.module_path])]][tap.side]
        assert torch.equal(acts_HSMPD[:, :, 0, 0], expected.reshape(*TOKENS_HS.shape, -1)), name


@pytest.mark.parametrize("kind", ["lora", "modules_to_save", "resized", "bias", "dora"])
def test_the_base_beside_it_is_the_base(kind, make_adapter):
    base, adapter = make_adapter("llama", kind)
    loaded = {}
    adapted = load_language_model(base, adapter=adapter, loaded=loaded)
    plain = load_language_model(base, loaded=loaded)
    alone_HSPD, logits_HSV = own_hooks(load_language_model(base).model, TOKENS_HS)
    own_hooks(adapted.model, TOKENS_HS)
    acts_HSPD, plain_HSV = own_hooks(plain.model, TOKENS_HS)
    assert torch.equal(acts_HSPD, alone_HSPD)
    assert torch.equal(plain_HSV, logits_HSV)
    assert plain.fingerprint() == load_language_model(base).fingerprint() != adapted.fingerprint()
    if kind != "resized":  # there the embeddings are the adapter's
        with adapted.peft_model.disable_adapter():
            off_HSPD, _ = own_hooks(adapted.model, TOKENS_HS)
        assert torch.equal(off_HSPD, alone_HSPD) or kind == "bias"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_that_of_peft_to_the_bit(dtype, make_adapter):
    base, adapter = make_adapter("qwen3", "lora")
    expected_HSPD, _ = own_hooks(plain_peft(base, adapter, getattr(torch, dtype)), TOKENS_HS)
    model = load_language_model(base, adapter=adapter, dtype=dtype)
    assert torch.equal(ActivationHarvester([model], NAMES).harvest(TOKENS_HS)[:, :, 0], expected_HSPD.float())


def _n_bytes(models):
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for m in models for t in m.model.parameters()
    }
    return sum(storages.values())


def test_models_that_share_a_base_hold_it_once(make_adapter):
    base, first = make_adapter("llama", "lora")
    _, second = make_adapter("llama", "lora", seed=1)
    loaded = {}
    models = [load_language_model(base, adapter=adapter, loaded=loaded) for adapter in (None, first, second)]
    n_base = _n_bytes(models[:1])
    n_adapters = sum(
        tensor.numel() * tensor.element_size()
        for folder in (first, second)
        for tensor in peft.utils.load_peft_weights(folder, device="cpu").values()
    )
    assert _n_bytes(models) == n_base + n_adapters
    one, two = (ActivationHarvester([model], NAMES).harvest(TOKENS_HS) for model in models[1:])
    both = ActivationHarvester(models[1:], NAMES).harvest(TOKENS_HS)
    assert torch.equal(both, torch.cat([one, two], 2))
    assert not torch.equal(one, two)


def test_what_takes_something_out_of_the_base_copies_no_more_than_that(make_adapter):
    base, adapter = make_adapter("llama", "olora")
    loaded = {}
    models = [load_language_model(base, adapter=one, loaded=loaded) for one in (None, adapter)]
    n_targets = sum(
        weight.numel() * 4
        for name, weight in models[0].model.named_parameters()
        if "q_proj" in name or "down_proj" in name
    )
    n_adapter = sum(4 * tensor.numel() for tensor in peft.utils.load_peft_weights(adapter, device="cpu").values())
    assert _n_bytes(models) == _n_bytes(models[:1]) + n_targets + n_adapter


def test_modules_that_share_a_bank_of_vectors_are_loaded(make_adapter, tmp_path):
    base, _ = make_adapter("llama", "lora")
    rules = {"num_vectors": 16, "vector_length": 4, "r": 2, "topk": 2, "target_modules": ["q_proj", "v_proj"]}
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.VBLoRAConfig(**rules))
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.3 * torch.randn(param.shape))
    model.save_pretrained(tmp_path)
    expected, _ = own_hooks(plain_peft(base, str(tmp_path)), TOKENS_HS)
    mine = load_language_model(base, adapter=str(tmp_path))
    assert torch.equal(ActivationHarvester([mine], NAMES).harvest(TOKENS_HS)[:, :, 0], expected)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "modules_to_save", "resized"])
def test_equal_to_the_merged_model_within_rounding(kind, make_adapter):
    base, adapter = make_adapter("llama", kind)
    model = load_language_model(base, adapter=adapter)
    expected, _ = own_hooks(plain_peft(base, adapter).merge_and_unload(), TOKENS_HS)
    plain = ActivationHarvester([model], NAMES).harvest(TOKENS_HS)[:, :, 0]
    bridge = ActivationHarvester([model], NAMES, path="bridge").harvest(TOKENS_HS)[:, :, 0]
    torch.testing.assert_close(plain, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(bridge, expected, atol=2e-5, rtol=1e-4)
    again = ActivationHarvester([model], NAMES).harvest(TOKENS_HS)[:, :, 0]
    assert torch.equal(again, plain)


@pytest.mark.parametrize("kind", ["tied_head", "tied_table"])
def test_of_tied_weights_the_one_is_merged_that_is_adapted(kind, make_adapter):
    base, adapter = make_adapter("gemma2", kind)
    model = load_language_model(base, adapter=adapter)
    assert model.config.tie_word_embeddings
    own_HSPD, logits_HSV = own_hooks(model.model, TOKENS_HS)
    _, merged_HSV = own_hooks(model.plain_tree(), TOKENS_HS)
    torch.testing.assert_close(merged_HSV, logits_HSV, atol=2e-5, rtol=1e-4)
    bridge = ActivationHarvester([model], NAMES, path="bridge").harvest(TOKENS_HS)[:, :, 0]
    torch.testing.assert_close(bridge, own_HSPD, atol=5e-5, rtol=1e-4)
    assert torch.equal(own_hooks(model.model, TOKENS_HS)[1], logits_HSV)


def test_an_adapter_alone_stands_on_the_base_that_it_names(make_adapter):
    base, adapter = make_adapter("llama", "lora")
    alone, named = load_language_model(adapter), load_language_model(base, adapter=adapter)
    assert alone.fingerprint() == named.fingerprint()
    assert (alone.name, alone.tokenizer.get_vocab()) == (f"{base} + {adapter}", named.tokenizer.get_vocab())
    assert load_skeleton(adapter).n_layers == 3


def test_scale_multiplies_what_lora_adds(make_adapter):
    base, adapter = make_adapter("llama", "lora")
    doubled = load_language_model(base, adapter=adapter, adapter_scale=2.0)
    by_hand = plain_peft(base, adapter)
    with torch.no_grad():
        for name, param in by_hand.named_parameters():
            if "lora_B" in name:
                param.mul_(2)
    expected, _ = own_hooks(by_hand, TOKENS_HS)
    torch.testing.assert_close(ActivationHarvester([doubled], NAMES).harvest(TOKENS_HS)[:, :, 0], expected)
    assert doubled.fingerprint() != load_language_model(base, adapter=adapter).fingerprint()


@pytest.fixture
def copies(make_adapter, tmp_path):
    import shutil

    base, adapter = make_adapter("llama", "lora")
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def _change(folder, make):
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file(make(load_file(file)), file)


def _config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _change(f, lambda w: {k: v * 0 if "lora_B" in k else v for k, v in w.items()}), "changes no logit"),
        (lambda f: _change(f, lambda w: w | {"base_model.model.model.layers.9.x.lora_A.weight": torch.ones(1)}), "unexp"),
        (lambda f: _change(f, lambda w: dict(sorted(w.items())[1:])), "1 weights are missing"),
        (lambda f: _change(f, lambda w: {k: v[:, :1].clone() for k, v in w.items()}), "size mismatch|shapes|Error"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_config.json is there, but no adapter_model"),
        (lambda f: (f / "adapter_config.json").unlink(), "no folder or hub repository with an adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "is no JSON"),
        (lambda f: (f / "more.safetensors").write_bytes(b""), "its file 'more.safetensors' would not be used"),
        (lambda f: (f / "non_lora_trainables.bin").write_bytes(b""), "its file 'non_lora_trainables.bin' would not be used"),
        (lambda f: _config(f, target_modules=["nowhere"]), "nowhere"),
        (lambda f: _config(f, init_lora_weights="pissa_niter_4"), "'pissa_niter_4' took a random part out of the base"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused_in_one_line(damage, message, copies):
    base, adapter = copies
    damage(adapter)
    with pytest.raises(InputError, match=message) as error:
        load_language_model(str(base), adapter=str(adapter))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("./nowhere", "= './nowhere': no folder or hub repo"), ("two words", "'two words' .* cannot be loaded")],
)
def test_a_name_that_is_neither_folder_nor_repository_is_refused_by_name(name, message, make_adapter):
    with pytest.raises(InputError, match=f"adapter {message}") as error:
        load_language_model(make_adapter("llama", "lora")[0], adapter=name)
    assert "\n" not in str(error.value)


def test_a_folder_has_no_revisions(copies):
    with pytest.raises(InputError, match=r"adapter_revision = 'v9': '.*adapter' is a folder"):
        load_language_model(str(copies[0]), adapter=str(copies[1]), adapter_revision="v9")


def test_the_subfolder_of_a_repository_alone_stands_for_its_adapter(copies, tmp_path, monkeypatch):
    from huggingface_hub import constants

    base, adapter = copies
    _config(adapter, base_model_name_or_path=str(base))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit, repository = "c" * 40, tmp_path / "models--own--lora"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / "ck").mkdir(parents=True)
    adapter.rename(repository / "snapshots" / commit / "ck" / "last")
    loaded = load_language_model("own/lora/ck/last")
    assert loaded.name.endswith("base + own/lora/ck/last") and loaded.peft_model is not None
    with pytest.raises(InputError, match="'own/lora/ck/first': no such folder"):
        load_language_model("own/lora/ck/first")
    with pytest.raises(InputError, match=r"adapter_config.json at revision 'v2'"):
        load_language_model(str(base), adapter="own/lora/ck/last", adapter_revision="v2")


def test_a_prompt_is_no_adapter_of_weights(copies, tmp_path, build_model):
    model = peft.get_peft_model(
        build_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    model.save_pretrained(tmp_path / "prompt")
    with pytest.raises(InputError, match="PROMPT_TUNING adds tokens to the text"):
        load_language_model(str(copies[0]), adapter=str(tmp_path / "prompt"))


@pytest.mark.parametrize(
    ("kind", "part"), [("dora", "use_dora"), ("modules_to_save", "modules_to_save"), ("bias", "bias")]
)
def test_a_scale_that_would_not_reach_all_is_refused(kind, part, make_adapter):
    base, adapter = make_adapter("llama", kind)
    with pytest.raises(InputError, match=f"adapter_scale = 0.5: .* has {part}"):
        load_language_model(base, adapter=adapter, adapter_scale=0.5)
    with pytest.raises(InputError, match=r"adapter_scale = 0.5: .* has no adapter"):
        load_language_model(base, adapter_scale=0.5)


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_lora_weights.bin", "pytorch_adapter.bin"])
def test_an_adapter_beside_the_weights_is_never_passed_over(name, copies):
    base, adapter = copies
    (adapter / "adapter_config.json").rename(base / name)
    with pytest.raises(InputError, match="would not be applied"):
        load_language_model(str(base))
