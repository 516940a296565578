"""Kinds of decoders: the MLP's second projection is edited, saved, exported; or they are refused.

All families of transformers are in test_families.py.

The tiny models have random weights; what an edit holds is measured elsewhere.
"""

import contextlib

import peft
import pytest
import torch
import transformers as T
from torch.nn.utils import parametrizations

from horse_plugin import HorseEditor
from horse_plugin.editing.export import save_adapter, to_rank
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.model.backbone import Backbone
from tests import tiny
from tests.fast import fast
from tests.model.roundtrip import edited_and_undone

SIZES = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {k: v for k, v in tiny._SIZES.items() if k != "head_dim"}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 128}
OLD = SIZES | {"n_embd": 32, "n_layer": 8, "n_head": 4, "n_positions": 128}
OPT = SIZES | HEADS | {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
MAMBA |= {"mamba_d_state": 8, "mamba_chunk_size": 8}
DOWN = "model.layers.{}.mlp.down_proj"
EDITED = {
    "opt": (lambda: T.OPTConfig(**OPT, word_embed_proj_dim=32), "model.decoder.layers.{}.fc2"),
    "opt, narrow embeddings": (
        lambda: T.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
        "model.decoder.layers.{}.fc2",
    ),
    "bloom": (
        lambda: T.BloomConfig(**SIZES, hidden_size=32, n_layer=8, n_head=4),
        "transformer.h.{}.mlp.dense_4h_to_h",
    ),
    "mpt": (
        lambda: T.MptConfig(vocab_size=400, d_model=32, n_layers=8, n_heads=4, max_seq_len=128),
        "transformer.blocks.{}.ffn.down_proj",
    ),
    "cohere": (lambda: T.CohereConfig(**LLAMA), DOWN),
    "phi": (lambda: T.PhiConfig(**LLAMA), "model.layers.{}.mlp.fc2"),
    "gpt-bigcode": (lambda: T.GPTBigCodeConfig(**OLD), "transformer.h.{}.mlp.c_proj"),
    "codegen": (lambda: T.CodeGenConfig(**OLD, rotary_dim=4), "transformer.h.{}.mlp.fc_out"),
    "olmo2": (lambda: T.Olmo2Config(**LLAMA), DOWN),
    "granite": (lambda: T.GraniteConfig(**LLAMA), DOWN),
    "glm4": (lambda: T.Glm4Config(**tiny._SIZES), DOWN),
    "smollm3": (lambda: T.SmolLM3Config(**LLAMA), DOWN),
    "ernie": (lambda: T.Ernie4_5Config(**LLAMA), DOWN),
    "lfm2": (lambda: T.Lfm2Config(**LLAMA), "model.layers.{}.feed_forward.w2"),
    "bert": (
        lambda: T.BertConfig(**LLAMA, is_decoder=True),
        "bert.encoder.layer.{}.output.dense",
    ),
    "shared expert": (
        lambda: T.Qwen2MoeConfig(**LLAMA, **MOE, shared_expert_intermediate_size=24),
        "model.layers.{}.mlp.shared_expert.down_proj",
    ),
    "shared expert in a tuple": (
        lambda: T.Llama4TextConfig(
            **tiny._SIZES, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1
        ),
        "model.layers.{}.feed_forward.shared_expert.down_proj",
    ),
    "linear attention": (
        lambda: T.Qwen3NextConfig(
            **tiny._SIZES, **MOE, **LINEAR, shared_expert_intermediate_size=16
        ),
        "model.layers.{}.mlp.shared_expert.down_proj",
    ),
    "two mixers in a block": (
        lambda: T.FalconH1Config(**tiny._SIZES, **MAMBA, mamba_d_ssm=64),
        "model.layers.{}.feed_forward.down_proj",
    ),
    "blocks with and without attention": (
        lambda: T.BambaConfig(**LLAMA, **MAMBA, attn_layer_indices=[2, 5]),
        "model.layers.{}.feed_forward.down_proj",
    ),
    "inputs per layer": (
        lambda: T.Gemma4TextConfig(
            **tiny._SIZES,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=400,
            num_kv_shared_layers=0,
            sliding_window=4,
            layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2,
        ),
        DOWN,
    ),
}
EXPERTS = "mixture of experts without a shared one"
REFUSED = {
    "mixtral": (
        lambda: T.MixtralConfig(**tiny._SIZES, num_local_experts=4, num_experts_per_tok=2),
        EXPERTS,
    ),
    "fused experts": (
        lambda: T.GptOssConfig(
            **tiny._SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
        ),
        EXPERTS,
    ),
    "mamba": (
        lambda: T.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=8, state_size=4),
        "no MLP projection found",
    ),
    "rwkv": (
        lambda: T.RwkvConfig(
            vocab_size=400, hidden_size=32, num_hidden_layers=8, attention_hidden_size=32
        ),
        "cannot run this architecture's blocks in two halves",
    ),
}


def made(config) -> torch.nn.Module:
    torch.manual_seed(0)
    return T.AutoModelForCausalLM.from_config(config()).eval()


@pytest.mark.parametrize("name", fast(EDITED, ["codegen", "shared expert"]))
@torch.no_grad()
def test_its_edit_is_saved_as_a_model_and_as_an_adapter(name, tmp_path):
    model = made(EDITED[name][0])
    model.save_pretrained(tmp_path / "before")
    editor = HorseEditor(model, tiny.bpe_tokenizer(), tiny.hparams(strength=20.0, ridge=0.01))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    unedited = model(ids, use_cache=False).logits
    with torch.enable_grad():
        delta = editor.edit(tiny.records())
    edited = model(ids, use_cache=False).logits
    assert (edited - unedited).abs().max() > 1e-3
    editor.save_model(tmp_path / "after")
    has_experts = any("expert" in n for n in editor.backbone.modules)
    with pytest.warns(match="does nothing") if has_experts else contextlib.nullcontext():
        save_adapter(to_rank(editor, [delta]), editor.backbone, tmp_path / "adapter")
    opened = T.AutoModelForCausalLM.from_pretrained(tmp_path / "after").eval()
    torch.testing.assert_close(opened(ids, use_cache=False).logits, edited)
    if name == "linear attention":  # the warning is of this one
        return
    base = T.AutoModelForCausalLM.from_pretrained(tmp_path / "before").eval()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    logits = adapted(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, edited, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", EDITED)
def test_it_is_edited_where_its_mlp_ends_and_undone(name):
    config, module = EDITED[name]
    backbone = edited_and_undone(made(config))
    assert list(backbone.modules) == [module.format(i) for i in range(2, 8)]


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name):
    config, says = REFUSED[name]
    with pytest.raises(UsageError, match=f"ForCausalLM: .*{says}"):
        Backbone(made(config), None)


def test_an_expert_is_refused_where_it_is_named():
    model = tiny.model()
    model.model.layers[5].mlp = torch.nn.ModuleDict({"experts": model.model.layers[5].mlp})
    with pytest.raises(UsageError, match=r"experts\.down_proj' belongs to an expert"):
        Backbone(model, None, ["model.layers.5.mlp.experts.down_proj"])


def test_the_attention_of_a_model_with_experts_is_edited():
    model = made(REFUSED["mixtral"][0])
    names = [f"model.layers.{i}.self_attn.o_proj" for i in (4, 5)]
    settings = tiny.hparams(strength=0.5, inner_params=names)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    HorseEditor(model, tiny.bpe_tokenizer(), settings).edit(tiny.records())
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved == [f"{n}.weight" for n in names]


def test_blocks_of_several_kinds_are_edited_where_they_have_an_mlp():
    model = made(
        lambda: T.JambaConfig(
            **LLAMA,
            num_experts=2,
            attn_layer_period=4,
            attn_layer_offset=2,
            use_mamba_kernels=False,
        )
    )
    names = [f"model.layers.{i}.feed_forward.down_proj" for i in (0, 2, 4, 6)]
    assert list(Backbone(model, None).modules) == names


def test_lora_is_left_alone_and_its_base_edited():
    model, plain = tiny.model(), tiny.model()
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)  # does nothing before it is trained
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    editors = [
        HorseEditor(m, tiny.bpe_tokenizer(), tiny.hparams(strength=0.5, rank=4))
        for m in (wrapped, plain)
    ]
    assert all(n.endswith("mlp.down_proj.base_layer") for n in editors[0].backbone.modules)
    for editor in editors:
        editor.edit(tiny.records())
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(wrapped(ids).logits, plain(ids).logits)
    assert trained == [n for n, p in wrapped.named_parameters() if p.requires_grad]
    name = "base_model.model.model.layers.4.mlp.down_proj"
    assert list(Backbone(wrapped, None, [name]).modules) == [f"{name}.base_layer"]


def test_the_folder_of_an_adapter_is_a_model(tmp_path):
    """An edit there is exported for the plain model, where PEFT adds it to the adapter."""
    tiny.model().save_pretrained(tmp_path / "base")
    base = T.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(base, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(tmp_path / "tuned")
    settings = {"model_name": str(tmp_path / "tuned"), "strength": 20.0, "ridge": 0.01}
    with pytest.raises(UsageError, match="name one with tokenizer_name"):
        HorseEditor.from_hparams(tiny.hparams(**settings))
    tiny.bpe_tokenizer().save_pretrained(tmp_path / "tokenizer")
    settings["tokenizer_name"] = str(tmp_path / "tokenizer")
    editor = HorseEditor.from_hparams(tiny.hparams(**settings))
    ids = torch.tensor([[5, 6, 7, 8]])
    before = editor.backbone.model(ids).logits
    torch.testing.assert_close(before, tuned(ids).logits)
    delta = editor.edit(tiny.records())
    edited = editor.backbone.model(ids).logits
    assert (edited - before).abs().max() > 1e-3
    with pytest.raises(UsageError, match="an adapter is attached"):
        editor.save_model(tmp_path / "model")
    editor.undo()
    save_adapter(to_rank(editor, [delta]), editor.backbone, tmp_path / "edit")
    tuned.load_adapter(tmp_path / "edit", "edit")
    tuned.base_model.set_adapter(["default", "edit"])
    torch.testing.assert_close(tuned(ids).logits, edited, atol=1e-4, rtol=1e-4)


def replaced(weight):
    model = tiny.model()
    projection = model.model.layers[5].mlp.down_proj
    del projection.weight
    projection.weight = weight(torch.zeros(32, 48))
    return model


class Packed(torch.Tensor):
    """A stand-in for the tensors of torchao, quanto and bitsandbytes."""


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (lambda w: torch.nn.Parameter(w.char(), requires_grad=False), "quantised.*int8"),
        (lambda w: torch.nn.Parameter(w.as_subclass(Packed)), "quantised.*Packed"),
        (lambda w: torch.nn.Parameter(w.flatten()), "quantised or packed"),
        (lambda w: torch.nn.Parameter(w.to("meta")), "offloaded"),
    ],
)
def test_a_weight_that_no_shift_can_be_added_to_is_refused(weight, says):
    name = "model.layers.5.mlp.down_proj"
    with pytest.raises(UsageError, match=f"{name}: its weight is {says}"):
        Backbone(replaced(weight), None, [name])


def test_a_weight_that_is_computed_is_refused():
    model = tiny.model()
    parametrizations.weight_norm(model.model.layers[5].mlp.down_proj)
    with pytest.raises(UsageError, match="remove_parametrizations"):
        Backbone(model, None)


def test_an_edit_that_moves_nothing_is_an_error():
    model = tiny.model(dtype=torch.float16)
    editor = HorseEditor(model, tiny.bpe_tokenizer(), tiny.hparams(lr=1e-12))
    before = editor.backbone.weights.clones()
    with pytest.raises(HorseError, match="the edit moved no weight"):
        editor.edit(tiny.records())
    assert not editor.history
    now = editor.backbone.weights.clones()
    assert all(torch.equal(before[n], now[n]) for n in before)


TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8}
TOWER |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
WITH_IMAGES = {
    "llava": lambda: T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**TOWER, projection_dim=32),
        text_config=T.LlamaConfig(**tiny._SIZES),
        image_token_index=399,
    ),
    "qwen2-vl": lambda: T.Qwen2VLConfig(
        text_config={**LLAMA, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 8, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
        image_token_id=399,
        video_token_id=398,
        vision_start_token_id=397,
    ),
    "gemma3": lambda: T.Gemma3Config(
        text_config={**tiny._SIZES, "sliding_window": 4},
        vision_config=TOWER,
        mm_tokens_per_image=4,
        image_token_index=399,
    ),
}


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_of_a_model_for_images_the_language_model_is_edited(tmp_path, name):
    """It is loaded from a folder as the command line does; both towers have eight blocks."""
    torch.manual_seed(0)
    T.AutoModelForImageTextToText.from_config(WITH_IMAGES[name]()).save_pretrained(tmp_path)
    tiny.bpe_tokenizer().save_pretrained(tmp_path)
    settings = tiny.hparams(model_name=str(tmp_path), strength=0.5)
    editor = HorseEditor.from_hparams(settings)
    names = [f"model.language_model.layers.{i}.mlp.down_proj" for i in range(2, 8)]
    assert list(editor.backbone.modules) == names
    editor.edit(tiny.records())
    editor.undo()
