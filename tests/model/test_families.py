"""Every family that transformers loads as a causal language model, with a few small numbers.

A family is edited with logits that are its own, and undone, or refused by name. What is saved and
exported is tested on the kinds of test_architectures.py.
"""

import re

import pytest
import torch
import transformers as T
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from horse_plugin.errors import UsageError
from horse_plugin.model.backbone import Backbone
from tests.fast import fast
from tests.model.roundtrip import edited_and_undone

N_BLOCKS = 8  # two of them a trunk
# Number → what configs call the things that are so large here.
SIZES = (
    (
        1,
        """n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group
        n_groups mamba_n_groups mamba_ngroups first_k_dense_replace""",
    ),
    (
        2,
        """num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_k
        moe_top_k moe_topk top_k_experts index_n_heads""",
    ),
    (
        4,
        """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
        num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim
        linear_num_key_heads sliding_window laurel_rank time_step_rank""",
    ),
    (
        8,
        """head_dim rotary_dim mamba_d_head mamba_head_dim mamba_headdim v_head_dim kv_channels
        qk_nope_head_dim kv_lora_rank q_lora_rank linear_key_head_dim linear_value_head_dim
        mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size index_head_dim
        hidden_size_per_layer_input dim_head mamba_n_heads mamba_num_heads
        linear_num_value_heads""",
    ),
    (
        N_BLOCKS,
        """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        num_decoder_layers num_encoder_layers""",
    ),
    (
        16,
        """moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size
        moe_shared_expert_intermediate_size""",
    ),
    (
        32,
        """hidden_size d_model n_embd dim embedding_size word_embed_proj_dim lru_width emb_dim
        attention_hidden_size""",
    ),
    (
        48,
        """intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dim_ff dff
        intermediate_size_mlp shared_intermediate_size""",
    ),
    (64, "mamba_d_ssm index_topk"),
    (128, "max_position_embeddings n_positions max_seq_len n_ctx"),
    (400, "vocab_size vocab_size_per_layer_input"),
)
SMALL = {name: n for n, names in SIZES for name in names.split()}
SMALL |= {
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_mamba_kernels": False,
}
# What a family needs beside that.
OWN = {
    "gpt_neo": {"attention_types": [[["global", "local"], N_BLOCKS // 2]]},
    "mamba2": {"num_heads": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "xmod": {"default_language": "en_XX"},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (N_BLOCKS // 2)},
}
# Other kinds of a family.
VARIANTS = {
    "falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "llama, biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "bert, both ways": ("bert", {"is_decoder": False}),
    "qwen3_moe, dense in part": ("qwen3_moe", {"mlp_only_layers": [2, 5]}),
}
EXPERTS, NO_MLP = "without a shared one", "no MLP projection found"
NO_LIST, OTHER_BLOCKS = "no list of transformer blocks", "blocks in two halves"
REFUSED = {
    EXPERTS: """beam flex_olmo gpt_oss granitemoe inkling2_text inkling_text jetmoe mellum
        mimo_v2_flash minimax minimax_m2 mixtral olmoe phimoe qwen3_moe zaya""",
    NO_MLP: "falcon_mamba mamba mamba2",
    NO_LIST: "hrm_text longcat_flash",
    OTHER_BLOCKS: "gemma3n_text hy_v4 rwkv",
    "no causal language model": "cpmant prophetnet xlm xlnet",
}
REFUSED = {name: says for says, names in REFUSED.items() for name in names.split()}
REFUSED["bert, both ways"] = "no causal language model"
# Those with images or sound hold a language model of another family. Others are not built, or take
# a minute, with a small config like these.
LEFT_OUT = """bailing_hybrid blt cohere_compass_text dbrx dots3_note dots3_note_text emu3 fuyu
    gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git got_ocr2
    kimi_linear llama4 mllama moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal
    qwen3_5 qwen3_5_moe qwen4_exp qwen4_exp_text reformer xlstm zamba zamba2""".split()

# What `make test-fast` tries.
COMMON = """deepseek_v3 falcon gemma2 gemma3_text gpt2 gpt_neo gpt_neox gptj llama mamba2 mistral
    mixtral olmo2 opt phi phi3 qwen2 qwen3 smollm3 stablelm""".split()


def small(name: str):
    """Return a config of a family, or a variant, with every number that it knows made small."""
    name, own = VARIANTS.get(name, (name, OWN.get(name, {})))
    default = T.AutoConfig.for_model(name)
    known = default.to_dict()
    sizes = {k: v for k, v in SMALL.items() if k in known and k not in default.attribute_map}
    if "qk_rope_head_dim" in known:  # latent attention
        sizes |= {k: 4 for k in ("head_dim", "num_key_value_heads") if k in known}
    for kind, of_layers in known.items():
        if kind.endswith(("layer_types", "block_type")) and isinstance(of_layers, list):
            sizes[kind] = of_layers[-N_BLOCKS:]
    return type(default)(**sizes | own)


@pytest.mark.parametrize(
    "name", fast((*sorted(FAMILIES.keys() - set(LEFT_OUT)), *VARIANTS), COMMON)
)
def test_a_family_is_edited_and_undone_or_refused_by_name(name):
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(small(name)).eval()
    if name in REFUSED:
        with pytest.raises(UsageError, match=f"{type(model).__name__}: .*{REFUSED[name]}"):
            Backbone(model, None)
        return
    backbone = edited_and_undone(model)
    assert not any(re.search(r"\.\d+\..*(norm|att)", n) for n in backbone.modules)
    assert backbone.late_backward == (name != "deepseek_v4")


def test_every_family_is_counted():
    assert len(FAMILIES.keys() - set(LEFT_OUT) - REFUSED.keys()) > 100
    assert FAMILIES.keys() >= set(COMMON)
